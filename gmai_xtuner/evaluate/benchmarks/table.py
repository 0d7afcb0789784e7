# SPDX-License-Identifier: Apache-2.0

"""Tables of VLMEvalKit, in which any of the benchmarks may come, with their images inside.

Format as `vlmeval/dataset/image_base.py` loads it (github.com/open-compass/VLMEvalKit, commit e8e78f05f3):
``index``, ``image`` (base64, a list of them, or the index of another row) or ``image_path``, ``question``,
``hint``, ``A``, ``B``, ..., ``answer`` (letter of an option, or the answer's text), ``category``,
``l2-category``, ``split``.

Every image is base64 text; twenty thousand rows are 6 GB. One pass over the file gives the texts, the
SHA-256, and the places of the images, which :class:`Base64Image` reads when they are asked for: readers of
CSV (pandas, pyarrow) hold the images or give no places. Fields are quoted as pandas writes them: a field that
begins with a quote ends at the next single one, and may hold tabs, line ends and doubled quotes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    BenchmarkError,
    Collector,
    SourceFile,
    UnreadableOptions,
    find_file,
    gold_option,
    image_error,
    mark_images,
    parse_list,
)
from gmai_xtuner.evaluate.questions import ImageSource, Question

IMAGE = "image"
"""Name of the column with the images."""

GROUPS: Mapping[str, str] = {
    "answer_type": "answer_type",
    "category": "category",
    "content_type": "content_type",
    "dataset": "dataset",
    "l2-category": "l2-category",
    "modality": "modality",
    "modality_type": "modality",
    "question_type": "question_type",
    "split": "split",
    "subset": "subset",
}
"""Column -> name of the group, of tables that have them."""

_SHORT = 64
"""VLMEvalKit: an image text of at most so many characters is the index of the row that has the image."""


@dataclass(frozen=True, slots=True)
class Base64Image:
    """An image as base64 text in a file.

    Args:
        path: the file.
        offset: of the first character, in bytes.
        length: of the text, in bytes.
        file_size: of the file when it was indexed, in bytes; another size now means another file.
    """

    path: Path
    offset: int
    length: int
    file_size: int

    @property
    def name(self) -> str:
        return f"{self.path.name}, byte {self.offset}"

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self.offset)
                text = file.read(self.length)
        except OSError as error:
            raise image_error(self.name, f"{str(self.path)!r} can't be read ({error})") from error
        if size != self.file_size:
            raise image_error(
                self.name,
                f"{str(self.path)!r} had {self.file_size} bytes when it was read, it has {size} now",
            )
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise image_error(self.name, f"not base64 ({error})", "bad_image") from error


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Args:
        line: of the file, from 1, where it begins.
        values: column -> text; empty where absent. Without the images.
        images: where the row's images stand, or whose they are (an index).
    """

    line: int
    values: dict[str, str]
    images: tuple[Base64Image, ...] | str


def column_name(name: str) -> str:
    """Keep the letter of an option, lower every other name, as VLMEvalKit loads them."""
    name = name.strip()
    return name if name in string.ascii_uppercase and len(name) == 1 else name.lower()


def read_header(path: Path) -> tuple[str, ...]:
    """Return the names of the columns.

    Raises:
        BenchmarkError: the file can't be read.
    """
    try:
        with open(path, "rb") as file:
            for _, _, record, spans in _records(file, path):
                return tuple(column_name(_text(record, span, path, 1)) for span in spans)
    except OSError as error:
        raise BenchmarkError(f"{str(path)!r} can't be read ({error}). Check the path.") from error
    return ()


def read_table(path: Path) -> tuple[tuple[str, ...], list[Row], SourceFile]:
    """Return columns, rows and the file with its hash.

    Raises:
        BenchmarkError: it can't be read, is not UTF-8, or a row has more or fewer fields than the header.
    """
    digest = hashlib.sha256()
    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    try:
        file_size = path.stat().st_size
        with open(path, "rb") as file:
            for line, offset, record, spans in _records(file, path, digest):
                if not columns:
                    columns = tuple(column_name(_text(record, span, path, line)) for span in spans)
                    continue
                if len(spans) != len(columns):
                    raise BenchmarkError(
                        f"{str(path)!r}, line {line}: {len(spans)} fields, the header has "
                        f"{len(columns)}. Fetch it again."
                    )
                values: dict[str, str] = {}
                images: tuple[Base64Image, ...] | str = ""
                for name, span in zip(columns, spans, strict=True):
                    if name == IMAGE:
                        images = _images(record, span, path, offset, file_size, line)
                    else:
                        values[name] = _text(record, span, path, line)
                rows.append(Row(line, values, images))
    except OSError as error:
        raise BenchmarkError(f"{str(path)!r} can't be read ({error}). Check the path.") from error
    return columns, rows, SourceFile(path, digest.hexdigest(), file_size)


def images_of(row: Row, by_index: dict[str, Row]) -> tuple[ImageSource, ...]:
    """Return a row's images, which may stand in another row.

    Raises:
        KeyError: that row is not there, or has none itself; its argument says which.
    """
    if isinstance(row.images, tuple):
        return row.images
    if not row.images:
        return ()
    other = by_index.get(row.images)
    if other is None or not isinstance(other.images, tuple) or not other.images:
        raise KeyError(f"the image is that of index {row.images!r}, which has none")
    return other.images


_Span = tuple[int, int, bool]
_QUOTED = re.compile(rb'"((?:[^"]++|"")*+)"')


def _records(
    file: BinaryIO, path: Path, digest: hashlib._Hash | None = None
) -> Iterator[tuple[int, int, bytes, list[_Span]]]:
    """Yield line, offset, bytes and fields of each record; blank lines are passed over."""
    offset, begins, pending = 0, 1, b""
    for line, data in enumerate(file, 1):
        if digest is not None:
            digest.update(data)
        if line == 1 and data.startswith(b"\xef\xbb\xbf"):
            data, offset = data[3:], 3
        record = pending + data
        spans = _fields(record)
        if spans is None:  # a quoted field goes on in the next line
            pending = record
            continue
        if record.strip():
            yield begins, offset, record, spans
        offset, begins, pending = offset + len(record), line + 1, b""
    if pending:
        raise BenchmarkError(
            f"{str(path)!r}, line {begins}: a quoted field has no end. Fetch it again."
        )


def _fields(record: bytes) -> list[_Span] | None:
    """Return start, end and quotation of each field; None where a quoted one is not closed yet."""
    line = record.removesuffix(b"\n").removesuffix(b"\r")
    spans: list[_Span] = []
    position = 0
    while True:
        quoted = _QUOTED.match(line, position)
        if quoted is None and line.startswith(b'"', position):
            return None
        tab = line.find(b"\t", quoted.end() if quoted else position)
        end = tab if tab >= 0 else len(line)
        spans.append((*quoted.span(1), True) if quoted else (position, end, False))
        if tab < 0:
            return spans
        position = tab + 1


def _text(record: bytes, span: _Span, path: Path, line: int) -> str:
    start, end, quoted = span
    data = record[start:end]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BenchmarkError(
            f"{str(path)!r}, line {line}: not UTF-8 ({error.reason}). Fetch it again."
        ) from error
    return text.replace('""', '"') if quoted else text


def _images(
    record: bytes, span: _Span, path: Path, offset: int, file_size: int, line: int
) -> tuple[Base64Image, ...] | str:
    start, end, _ = span
    if end - start <= _SHORT and record[start : start + 1] != b"[":
        return _text(record, span, path, line).strip()
    if record[start : start + 1] != b"[":
        return (Base64Image(path, offset + start, end - start, file_size),)
    # ['...', '...'] as Python writes a list of texts, or ["..."] with its quotes doubled in a quoted field
    opening = record[start + 1 : end].lstrip()
    quote = next((mark for mark in (b'""', b'"', b"'") if opening.startswith(mark)), None)
    images = []
    position = start
    while quote and (begin := record.find(quote, position, end)) >= 0:
        begin += len(quote)
        finish = record.find(quote, begin, end)
        if finish < 0:
            raise BenchmarkError(f"{str(path)!r}, line {line}: a list of images has no end.")
        images.append(Base64Image(path, offset + begin, finish - begin, file_size))
        position = finish + len(quote)
    return tuple(images)


def paths_of(text: str, folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the paths of a column ``image_path``, relative to the first folder that has the file.

    Raises:
        UnreadableOptions: a list that can't be parsed.
    """
    names = parse_list(text) if text.lstrip().startswith("[") else (text.strip(),)
    return tuple(find_file(name, folders) for name in names if name)


def read_tables(
    paths: Sequence[Path],
    collector: Collector,
    *,
    groups: Mapping[str, str] = GROUPS,
    keep: Callable[[Mapping[str, str]], bool] | None = None,
    answers_hidden: bool = False,
) -> Benchmark:
    """Read the questions of one or several tables.

    Args:
        paths: the tables, in their order.
        collector: takes the questions.
        groups: column of the table, in lower case -> name of the group.
        keep: which rows belong to the variant; all where None.
        answers_hidden: the authors keep the answers; a column ``answer`` is not looked at.

    Raises:
        BenchmarkError: a table without ``index``, ``question`` or images, or one that can't be read.
    """
    sources = []
    for path in paths:
        columns, rows, source = read_table(path)
        missing = {"index", "question"} - set(columns)
        if missing or not {IMAGE, "image_path"} & set(columns):
            raise BenchmarkError(
                f"{str(path)!r} is no table of VLMEvalKit: columns index, question, and image or image_path "
                f"were expected, it has {', '.join(columns) or 'none'}."
            )
        sources.append(source)
        by_index = {row.values["index"]: row for row in rows}
        folders = (path.parent, path.parent / "images", path.parent / "images" / path.stem)
        for row in rows:
            if keep is None or keep(row.values):
                _add(row, by_index, folders, collector, groups, answers_hidden)
    return collector.benchmark(sources)


def _add(
    row: Row,
    by_index: dict[str, Row],
    folders: tuple[Path, ...],
    collector: Collector,
    groups: Mapping[str, str],
    answers_hidden: bool,
) -> None:
    values = row.values
    index = values["index"].strip() or f"line {row.line}"
    images: tuple[ImageSource, ...]
    try:
        images = images_of(row, by_index)
        if not images:
            images = paths_of(values.get("image_path", ""), folders)
    except KeyError as error:
        collector.problem("missing_image", index, str(error.args[0]))
        return
    except UnreadableOptions as error:
        collector.problem("bad_image_path", index, str(error))
        return
    lettered = {
        letter: values[letter] for letter in string.ascii_uppercase if values.get(letter, "")
    }
    question = values["question"]
    if hint := values.get("hint", ""):
        question = f"Hint: {hint}\n{question}"
    try:
        (text, *options), images = mark_images(
            (question, *lettered.values()), dict(enumerate(images, start=1))
        )
    except KeyError as error:
        collector.problem("missing_image", index, f"the text names image {error.args[0]}")
        return
    answer: str | None = None
    if not answers_hidden and (raw := values.get("answer", "")):
        letters = dict(zip(lettered, options, strict=True))
        answer = letters.get(raw.strip()) or gold_option(tuple(options), raw)
    letters_in_order = "".join(lettered)
    named = values.get("answer", "").strip()
    collector.add(
        Question(
            id=index,
            text=text,
            images=images,
            options=tuple(options),
            answer=answer,
            groups={
                group: values[column] for column, group in groups.items() if values.get(column, "")
            },
            letters=""
            if letters_in_order == string.ascii_uppercase[: len(lettered)]
            else letters_in_order,
            gold_letter=named if answer is not None and named in lettered else "",
        )
    )
