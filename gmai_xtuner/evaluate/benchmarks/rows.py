# SPDX-License-Identifier: Apache-2.0

"""Rows of the files that benchmarks come in: JSON, JSON lines, TSV, CSV, Parquet, and PathVQA's pickle.

Images that stand in a file stay there until they are asked for: a table of twenty thousand rows is 6 GB.
pandas would hold them, and read "None" and "NA", which are answers here, as missing.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import json
import os
import pickle
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from gmai_xtuner.core.errors import ImageError, Unusable
from gmai_xtuner.core.imaging.bounded import iterate_bounded
from gmai_xtuner.core.members import group_column, large_row_group
from gmai_xtuner.core.strict_json import STRICT_JSON
from gmai_xtuner.evaluate.questions import BenchmarkError, ImageSource, SourceFile

if TYPE_CHECKING:
    import pyarrow.parquet as pq

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pkl")
_DELIMITERS = {".tsv": "\t", ".csv": ","}
_BEGINNING = 1 << 20
_MEMORY = 2**32
"""Bytes that a row group may take when it is read."""
_SHORT = 64
"""VLMEvalKit: an image text of at most so many characters is the index of the row that has the image."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: column -> value, and column -> images that stand in the file.

    ``place`` is for people: ``line 7``; ``image_of`` the index of the row of a table whose image this row
    has.
    """

    place: str
    values: Mapping[str, Any]
    images: Mapping[str, tuple[ImageSource, ...]] = field(default_factory=dict)
    image_of: str = ""


Rows = tuple[tuple[str, ...], list[Row], SourceFile]
"""Columns, rows, and the file with its hash."""


class UnreadableOptions(ValueError):
    """An option list that can't be parsed."""


def parse_list(value: object) -> tuple[str, ...]:
    """Return a list, or the text of one as Python writes it, as texts; an empty text is an empty list.

    Only literals are read, nothing is evaluated. An ``UnreadableOptions`` if it is neither.
    """
    parsed = value
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UnreadableOptions(f"{short(value)} is no list ({error})") from error
    if not isinstance(parsed, list | tuple):
        raise UnreadableOptions(f"a list was expected, {short(value)} came")
    if not all(isinstance(item, str | int | float) for item in parsed):
        raise UnreadableOptions(f"a list of texts was expected, {short(value)} came")
    return tuple(str(item) for item in parsed)


def short(value: object) -> str:
    """Return what a message shows of a value."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def read_columns(path: Path, at: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the columns of a file, or the fields of its first record, without reading it whole.

    ``at`` are keys that lead to the records of a JSON file. A ``BenchmarkError`` if it can't be read.
    """
    suffix = path.suffix.lower()
    with _readable(path):
        if suffix in _DELIMITERS:
            with open(path, "rb") as file:
                _, _, fields = next(_fields(path, _Lines(file)), (0, 0, []))
                return tuple(name.strip() for name in fields)
        if suffix == ".parquet":
            with _parquet(path) as file:
                return tuple(file.schema_arrow.names)
        return _json_columns(path, at) if suffix in (".json", ".jsonl") else ()


def read_rows(
    path: Path, *, images: Sequence[str] = (), base64_images: str = "", at: Sequence[str] = ()
) -> Rows:
    """Read a file, of JSON the records behind the keys ``at``.

    ``images`` are columns of a Parquet file that may hold images; those that hold texts are values.
    ``base64_images`` is the column of a TSV or CSV file that holds images as base64 text, a list of such, or
    the index of the row that has the image. A ``BenchmarkError`` names the line that is wrong.
    """
    suffix = path.suffix.lower()
    with _readable(path):
        if suffix in _DELIMITERS:
            return _read_delimited(path, base64_images)
        if suffix == ".parquet":
            return _read_parquet(path, images)
        data = path.read_bytes()
    source = SourceFile(path, hashlib.sha256(data).hexdigest(), len(data))
    records = _unpickled(path, data) if suffix == ".pkl" else _parsed(path, data, at)
    columns = dict.fromkeys(name for _, record in records for name in record)
    return tuple(columns), [Row(place, record) for place, record in records], source


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"{str(path)!r} can't be read ({error}). Check the path.") from error


# JSON, JSON lines, pickle

_Records = list[tuple[str, dict[str, Any]]]


def _json_columns(path: Path, at: Sequence[str]) -> tuple[str, ...]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        beginning = file.read(_BEGINNING)
    start = beginning.find("{", max(0, beginning.find("[")) if at else 0)
    if start < 0:
        return ()
    # of a mapping from ids to records, which goes on beyond the beginning, the first
    inner = re.compile(r'\{\s*"[^"]*"\s*:\s*(?=\{)').match(beginning, start)
    for place in (start, inner.end()) if inner else (start,):
        with suppress(ValueError, RecursionError):
            record, _ = json.JSONDecoder().raw_decode(beginning, place)
            if record and all(isinstance(value, dict) for value in record.values()):
                record = {"key": None, **next(iter(record.values()))}
            return tuple(record)
    return ()


def _parsed(path: Path, data: bytes, at: Sequence[str]) -> _Records:
    """Read a list of records, records by their ids, or a record a line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BenchmarkError(
            f"{str(path)!r} is not UTF-8 at line {line} (byte {data[error.start]:#04x}). Fetch it again."
        ) from error
    first, _, rest = text.strip().partition("\n")
    first_of_several = re.fullmatch(r"\s*\{.*\}\s*", first) and rest.lstrip().startswith("{")
    is_lines = path.suffix.lower() == ".jsonl" or first_of_several
    if is_lines:
        found = [
            (f"line {number}", _loaded(path, line, f", line {number}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    content = None if is_lines else _loaded(path, text)
    for key in at:
        if not isinstance(content, dict) or key not in content:
            raise BenchmarkError(f"{str(path)!r} has no key {key!r}. Fetch it again.")
        content = content[key]
    if isinstance(content, dict):
        by_id = content and all(isinstance(value, dict) for value in content.values())
        content = [{"key": key, **value} for key, value in content.items()] if by_id else [content]
    if not is_lines:
        records = content if isinstance(content, list) else [None]
        found = [(f"record {number}", record) for number, record in enumerate(records, start=1)]
    wrong = [place for place, record in found if not isinstance(record, dict)]
    if wrong:
        where = f": {wrong[0]} is none" if is_lines or isinstance(content, list) else ""
        raise BenchmarkError(f"{str(path)!r} holds no list of records{where}. Fetch it again.")
    return found


def _loaded(path: Path, text: str, place: str = "") -> Any:
    try:
        return STRICT_JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(
            f"{str(path)!r}{place} is not valid JSON ({error}). Fetch it again."
        ) from error


class _OnlyContainers(pickle.Unpickler):
    """Lists, dicts and texts need no class; whatever asks for one is refused, so that no code is run."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _unpickled(path: Path, data: bytes) -> _Records:
    try:
        records = _OnlyContainers(io.BytesIO(data)).load()
        if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
            raise pickle.UnpicklingError(f"it holds a {type(records).__name__}")
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise BenchmarkError(
            f"{str(path)!r} is no pickled list of plain records ({error}); nothing else is unpickled, since "
            "that could run code. Fetch it again from its authors."
        ) from error
    return [(f"record {number}", record) for number, record in enumerate(records, start=1)]


# TSV and CSV


@dataclass(frozen=True, slots=True)
class Base64Image:
    """An image, one ``item`` of a list, as base64 text in a ``column`` of a TSV or CSV file, both from 0.

    ``offset`` and ``length`` in bytes are the row's; another ``file_size`` than the indexed one means another
    file.
    """

    path: Path
    offset: int
    length: int
    column: int
    item: int
    file_size: int

    @property
    def name(self) -> str:
        return f"{self.path.name}, image {self.item + 1} of the row at byte {self.offset}"

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self.offset)
                row = file.read(self.length)
        except OSError as error:
            raise _image_error(self.name, f"{str(self.path)!r} can't be read ({error})") from error
        if size != self.file_size:
            problem = f"had {self.file_size} bytes when it was read, it has {size} now"
            raise _image_error(self.name, f"{str(self.path)!r} {problem}")
        try:
            (fields,) = _reader(self.path, [row.decode()])
            return base64.b64decode(_texts(fields[self.column])[self.item], validate=True)
        except (ValueError, IndexError, csv.Error) as error:
            raise _image_error(self.name, f"not base64 ({error})", "bad_image") from error


def _image_error(name: str, problem: str, reason: str = "missing_image") -> ImageError:
    remedy = "Load the benchmark again; if that does not help, fetch its file again."
    return ImageError(f"image {name}: {problem}", remedy=remedy, reason=reason)


def _texts(field: str) -> tuple[str, ...]:
    return parse_list(field) if field.startswith("[") else (field,)


def lowered(name: str) -> str:
    """Keep the letter of an option, lower every other name, as VLMEvalKit loads them."""
    return name if name in string.ascii_uppercase and len(name) == 1 else name.lower()


def _reader(path: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(1 << 30)
    return csv.reader(lines, delimiter=_DELIMITERS[path.suffix.lower()], strict=True)


class _Lines:
    """The lines of a file, one at a time, with its hash and how far it has been read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.offset = self.number = 0

    def __iter__(self) -> Iterator[str]:
        for number, data in enumerate(self.file, start=1):
            self.digest.update(data)
            self.offset, self.number = self.offset + len(data), number
            yield data.decode("utf-8-sig" if number == 1 else "utf-8")


def _fields(path: Path, lines: _Lines) -> Iterator[tuple[int, int, list[str]]]:
    """Yield line, offset and fields of each row; blank lines are passed over."""
    offset, line = 0, 1
    try:
        for fields in _reader(path, lines):
            if fields:
                yield line, offset, fields
            offset, line = lines.offset, lines.number + 1
    except UnicodeDecodeError as error:
        problem = f"line {lines.number}: not UTF-8 ({error.reason})"
        raise BenchmarkError(f"{str(path)!r}, {problem}. Fetch it again.") from error
    except csv.Error as error:
        raise BenchmarkError(f"{str(path)!r}, line {line}: {error}. Fetch it again.") from error


def _read_delimited(path: Path, base64_images: str) -> Rows:
    columns: list[str] = []
    rows: list[Row] = []
    size = path.stat().st_size
    with open(path, "rb") as file:
        lines = _Lines(file)
        for line, offset, fields in _fields(path, lines):
            if not columns:
                columns = [name.strip() for name in fields]
                if len(set(columns)) < len(columns):
                    told = "two columns of one name. Correct the header."
                    raise BenchmarkError(f"{str(path)!r}, line {line}: {told}")
                stored = next((name for name in columns if lowered(name) == base64_images), "")
                continue
            if len(fields) != len(columns):
                told = f"{len(fields)} fields, the header has {len(columns)}. Fetch it again."
                raise BenchmarkError(f"{str(path)!r}, line {line}: {told}")
            values = dict(zip(columns, fields, strict=True))
            images: tuple[ImageSource, ...] = ()
            image_of = values.pop(stored, "").strip()
            if len(image_of) > _SHORT or image_of.startswith("["):
                at = (path, offset, lines.offset - offset, columns.index(stored))
                try:
                    number = len(_texts(image_of))
                except UnreadableOptions as error:
                    told = f"{str(path)!r}, line {line}: {error}. Fetch it again."
                    raise BenchmarkError(told) from error
                images = tuple(Base64Image(*at, item, size) for item in range(number))
                image_of = ""
            stands = {base64_images: images} if images else {}
            rows.append(Row(f"line {line}", values, stands, image_of))
    return tuple(columns), rows, SourceFile(path, lines.digest.hexdigest(), size)


# Parquet


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """An image in a column of a Parquet file: bytes, or the struct of bytes and path that the hub writes.

    ``row`` is of the row group; ``item`` its place where the column holds lists of images.
    """

    path: Path
    column: str
    row_group: int
    row: int
    item: int | None = None

    @property
    def name(self) -> str:
        return f"{self.path.name}, row {self.row} of group {self.row_group}, column {self.column!r}"

    def read(self) -> bytes:
        import pyarrow as pa

        try:
            state = os.stat(self.path)
            key = (str(self.path), state.st_mtime_ns, state.st_size, self.row_group, self.column)
            value = group_column(*key)[self.row].as_py()
            value = value if self.item is None else value[self.item]
        except (OSError, IndexError, pa.ArrowException, Unusable) as error:
            raise _image_error(self.name, f"can't be read ({error})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise _image_error(self.name, "no image stands there")
        return data


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file; a ``BenchmarkError`` where it is none, or turns out not to be while it is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:  # also of a column's name
        raise BenchmarkError(
            f"{str(path)!r} is no readable Parquet file ({error}). Fetch it again; a file of a few lines of "
            "text is a Git LFS pointer."
        ) from error


def _read_parquet(path: Path, images: Sequence[str]) -> Rows:
    from pyarrow import types

    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        source = SourceFile(path, digest, opened.tell())
    rows: list[Row] = []
    with _parquet(path) as file:
        schema = file.schema_arrow
        stored = []
        for name in images:
            kind = schema.field(name).type if name in schema.names else None
            inner = kind.value_type if kind is not None and types.is_list(kind) else kind
            if inner is None or types.is_string(inner) or types.is_large_string(inner):
                continue
            if not (types.is_struct(inner) or types.is_binary(inner) or types.is_null(inner)):
                raise BenchmarkError(
                    f"{str(path)!r}: column {name!r} should hold images, it holds {kind}."
                )
            stored.append(name)
        columns = tuple(schema.names)
    texts = [name for name in columns if name not in stored]
    try:
        groups = iterate_bounded(_groups, path, texts, stored, memory=_MEMORY, seconds=60)
        for group, (values, numbers) in enumerate(groups):
            for number, row in enumerate(values):
                found: dict[str, tuple[ImageSource, ...]] = {}
                for name, counts in zip(stored, numbers, strict=True):
                    place, count = (path, name, group, number), counts[number]
                    items = [None] if count is True else range(count or 0)
                    found[name] = tuple(ParquetImage(*place, item) for item in items)
                rows.append(Row(f"row {len(rows) + 1}", row, found))
    except Unusable as error:
        raise BenchmarkError(f"{str(path)!r} can't be read ({error}). Fetch it again.") from error
    return columns, rows, source


def _groups(
    path: Path, texts: Sequence[str], images: Sequence[str]
) -> Iterator[tuple[list[dict[str, Any]], list[list[Any]]]]:
    """Yield the rows of each row group, and how many images they have; runs in a worker.

    Of a column with lists of images that is a number, of another True or False.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    pa.set_memory_pool(pa.system_memory_pool())  # which reserves no more than it needs
    with _parquet(path) as file:
        if problem := large_row_group(file, [*texts, *images]):
            raise Unusable(problem)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=list(texts), use_threads=False).to_pylist()
            numbers = []
            for name in images:  # one at a time: together they may not fit
                column = file.read_row_group(group, columns=[name], use_threads=False)[0]
                if len(column) != len(rows):
                    raise Unusable(
                        f"column {name!r} has {len(column)} rows, others have {len(rows)}"
                    )
                is_list = pa.types.is_list(column.type)
                counted = pc.list_value_length(column) if is_list else column.is_valid()
                numbers.append(counted.to_pylist())
            yield rows, numbers
