# SPDX-License-Identifier: Apache-2.0

"""Annotation file -> raw records, one after the other; the file's objects are never all in memory.

``.json`` (a list), ``.jsonl`` / ``.ndjson`` (an object a line) and ``.parquet``. This half does as little
as it can; the rest is done by :func:`gmai_xtuner.core.conversation.parse_raw`, in a worker if wanted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import DataError, Unusable
from gmai_xtuner.core.imaging.bounded import iterate_bounded
from gmai_xtuner.core.members import MAX_COLUMN, image_columns, large_row_group, parquet_names
from gmai_xtuner.core.strict_json import STRICT_JSON

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
"""File names that :func:`iter_raw` reads."""

COLUMNS = ("id", "question_id", "image", "images", "conversations", "messages")
"""Columns that a conversation has; others of a Parquet file are not read."""

IMAGE_KEY = re.compile(
    r"(?:^|[^A-Za-z])(?i:image|img|picture|photo|figure)s?(?:$|[^a-z])|[a-z](?:Image|Img|Picture|Photo)"
)
"""Keys and columns that are named like one that holds images: ``image_path``, ``img``, ``inputImages``."""

_PARQUET_ROWS = 512
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as it lies in its file; cheap to send to another process.

    ``where`` is its place for people, ``"train.jsonl, line 12"``; ``default_id``, else ``where``, is for one
    without an id; ``payload`` the line's bytes (JSONL), or the decoded object (JSON list, Parquet).
    """

    where: str
    default_id: str
    payload: bytes | object

    def decode(self, *, dataset: str | None = None) -> object:
        """Return the record's object.

        A ``DataError`` if the line isn't one (reasons ``not_utf8``, ``not_json``).
        """
        if not isinstance(self.payload, bytes):
            return self.payload
        try:
            return STRICT_JSON.decode(self.payload.decode("utf-8"))
        except UnicodeDecodeError as error:
            cause: Exception = error
            problem = f"not UTF-8 ({error.reason} at byte {error.start + 1} of the record)"
            remedy, reason = "Save the file as UTF-8.", "not_utf8"
        except ValueError as error:  # also a number of 5,000 digits
            cause, problem = error, f"not valid JSON ({error})"
            remedy, reason = "Each line must be one whole JSON object.", "not_json"
        raise DataError(
            problem, dataset=dataset, record=self.where, remedy=remedy, reason=reason
        ) from cause


def iter_raw(
    path: str | Path, *, dataset: str | None = None, columns: tuple[str, ...] | None = COLUMNS
) -> Iterator[RawRecord]:
    """Yield the records of one annotation file in their order; blank lines are passed over.

    ``columns`` are those of a Parquet file of conversations; None for all of any file.

    Raises:
        DataError: the file as a whole can't be read (reason ``bad_annotation_file``). What is wrong
            with a single line or object is found by ``decode`` and ``parse_raw``, except for a JSON list,
            whose next record can't be found behind a broken one.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str | None], Iterator[RawRecord]]] = {
        ".json": _iter_json_list,
        ".jsonl": _iter_lines,
        ".ndjson": _iter_lines,
        ".parquet": partial(_iter_parquet, columns=columns),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _file_error(
            path, f"has the suffix {path.suffix!r}", f"Use one of {', '.join(SUFFIXES)}.", dataset
        )
    number_of_records = 0
    try:
        for raw in reader(path, dataset):
            number_of_records += 1
            yield raw
    except OSError as error:
        raise _file_error(path, f"can't be read ({error})", "Check the path.", dataset) from error
    if not number_of_records:
        raise _file_error(path, "has no record", "Remove it from the mixture file.", dataset)


def _iter_lines(path: Path, dataset: str | None) -> Iterator[RawRecord]:
    with open(path, "rb") as file:  # bytes: a line that is not UTF-8 costs that line only
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line := line.strip(b" \t\r\n"):
                yield RawRecord(f"{path.name}, line {number}", f"{path.name}:{number}", line)


def _iter_json_list(path: Path, dataset: str | None) -> Iterator[RawRecord]:
    """Decode the text once and scan one item after the other; no tree of the whole file."""
    text = _read_text(path, dataset)
    decode = STRICT_JSON.raw_decode
    number, line, counted = 0, 1, 0

    def broken(what: str, position: int) -> DataError:
        found = f"{what} at line {text.count(chr(10), 0, position) + 1}, record {number}"
        remedy = "Correct it there; everything behind that place is unread."
        problem = f"is not valid JSON: {found}"
        return _file_error(path, problem, remedy, dataset, reason="not_json")

    def passed(position: int, marks: str, what: str) -> tuple[str, int]:
        """Pass over spaces and one of the marks."""
        position = _end_of_space(text, position)
        mark = text[position : position + 1]
        if not mark or mark not in marks:
            raise broken(what, position)
        return mark, _end_of_space(text, position + len(mark))

    if _end_of_space(text, 0) == len(text):
        return
    mark, position = passed(0, "[{", "a list was expected")
    if mark == "{":
        raise _file_error(
            path,
            "holds an object where a list of records was expected",
            "Wrap the records in [ ], or name the file .jsonl if it has one record a line.",
            dataset,
        )
    if text[position : position + 1] == "]":
        mark, position = passed(position, "]", "")
    while mark in ("[", ","):
        number += 1
        line, counted = line + text.count("\n", counted, position), position
        try:
            item, position = decode(text, position)
        except json.JSONDecodeError as error:
            raise broken(error.msg, error.pos) from error
        except ValueError as error:  # also a number of 5,000 digits
            raise broken(str(error), position) from error
        place = f"{path.name}, record {number} (line {line})"
        yield RawRecord(place, f"{path.name}:{number}", item)
        mark, position = passed(position, ",]", "',' or ']' was expected")
    if position != len(text):
        raise broken("text behind the end of the list", position)


def _end_of_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return position if match is None else match.end()


def _read_text(path: Path, dataset: str | None) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _file_error(
            path,
            f"is not UTF-8 at line {line} ({error.reason}, byte {data[error.start]:#04x})",
            "Save it as UTF-8.",
            dataset,
            reason="not_utf8",
        ) from error


def _iter_parquet(
    path: Path, dataset: str | None, *, columns: tuple[str, ...] | None
) -> Iterator[RawRecord]:
    try:
        number = 0
        batches = iterate_bounded(
            _parquet_rows, path, dataset, columns, memory=MAX_COLUMN, seconds=60
        )
        for rows in batches:
            for row in rows:
                number += 1
                yield RawRecord(f"{path.name}, record {number}", f"{path.name}:{number}", row)
    except Unusable as error:
        remedy = "Write it again, with smaller row groups."
        raise _file_error(
            path, f"is not a readable Parquet file ({error})", remedy, dataset
        ) from error


def _parquet_rows(
    path: Path, dataset: str | None, columns: tuple[str, ...] | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield rows, some at a time; runs in a worker, since a few bytes can stand for any number of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # which reserves no more than it needs
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        picked = names if columns is None else [name for name in columns if name in names]
        if columns is not None and not {"image", "images"} & set(picked):
            picked += [name for name in names if IMAGE_KEY.search(name)]
        if columns is not None and not {"conversations", "messages"} & set(picked):
            raise _file_error(
                path,
                f"has no column 'conversations' or 'messages' (it has {', '.join(names)})",
                "Rename the column that holds the turns.",
                dataset,
            )
        if problem := large_row_group(file, picked):
            raise _file_error(path, problem, "Write it anew with smaller row groups.", dataset)
        here = [] if columns is None else image_columns(file.schema_arrow)
        embedded = {name for name in here if name in ("image", "images")}
        members = {name: iter(parquet_names(file, name)) for name in embedded}
        picked = [f"{name}.path" if name in embedded else name for name in picked]
        for batch in file.iter_batches(_PARQUET_ROWS, columns=picked, use_threads=False):
            rows = batch.to_pylist()
            for row, name in product(rows, embedded):
                own = next(members[name])
                row[name] = f"{path.name}/{own}" if own else None
            yield rows


def _file_error(
    path: Path,
    problem: str,
    remedy: str,
    dataset: str | None,
    *,
    reason: str = "bad_annotation_file",
) -> DataError:
    return DataError(
        f"annotation file {str(path)!r} {problem}", dataset=dataset, remedy=remedy, reason=reason
    )
