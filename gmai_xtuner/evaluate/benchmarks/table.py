"""A tab-separated table with images in it -> rows without, and where the images stand.

The tables of VLMEvalKit and of GMAI-MMBench hold every image as base64 text; twenty thousand rows are
6 GB. One pass over the file gives the texts, the SHA-256, and the places of the images, which
:class:`~gmai_xtuner.evaluate.benchmarks.stored_images.Base64Image` reads when they are asked for.
Fields are quoted as pandas writes them: a field that begins with a quote ends at the next single one, and
may hold tabs, line ends and doubled quotes.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.benchmark import BenchmarkError, SourceFile
from gmai_xtuner.evaluate.benchmarks.reading import UnreadableOptions, parse_list
from gmai_xtuner.evaluate.benchmarks.stored_images import Base64Image
from gmai_xtuner.evaluate.questions import ImageSource

IMAGE = "image"
"""Name of the column with the images."""

_SHORT = 64
"""VLMEvalKit: an image text of at most so many characters is the index of the row that has the image."""


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
    """Options keep their letter, every other name is lower case, as VLMEvalKit loads them."""
    name = name.strip()
    return name if name in string.ascii_uppercase and len(name) == 1 else name.lower()


def read_header(path: Path) -> tuple[str, ...]:
    """Names of the columns.

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
    """Columns, rows and the file with its hash.

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
    """A row's images, which may stand in another row.

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


def _records(
    file, path: Path, digest: hashlib._Hash | None = None
) -> Iterator[tuple[int, int, bytes, list[_Span]]]:
    """(line, offset of the record, its bytes, where its fields stand in it), blank lines passed over."""
    offset = 0
    line = 1
    pending = b""
    begins = 1
    for data in file:
        if digest is not None:
            digest.update(data)
        if offset == 0 and not pending and data.startswith(b"\xef\xbb\xbf"):
            data, offset = data[3:], 3
        record = pending + data
        spans = _fields(record)
        if spans is None:  # a quoted field goes on in the next line
            pending = record
        else:
            if record.strip():
                yield begins, offset, record, spans
            offset += len(record)
            pending = b""
            begins = line + 1
        line += 1
    if pending:
        raise BenchmarkError(
            f"{str(path)!r}, line {begins}: a quoted field has no end. Fetch it again."
        )


def _fields(record: bytes) -> list[_Span] | None:
    """(start, end, quoted) of each field; None where a quoted one is not closed yet."""
    end = len(record)
    if record.endswith(b"\n"):
        end -= 1
    if end and record[end - 1 : end] == b"\r":
        end -= 1
    spans: list[_Span] = []
    position = 0
    while True:
        if record[position : position + 1] == b'"' and position < end:
            close = position + 1
            while True:
                close = record.find(b'"', close)
                if close < 0:
                    return None
                if record[close + 1 : close + 2] != b'"':
                    break
                close += 2
            spans.append((position + 1, close, True))
            tab = record.find(b"\t", close, end)
        else:
            tab = record.find(b"\t", position, end)
            spans.append((position, end if tab < 0 else tab, False))
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
    """Paths of a column ``image_path``: one, or a list; relative to the first folder that has the file.

    Raises:
        UnreadableOptions: a list that can't be parsed.
    """
    names = parse_list(text) if text.lstrip().startswith("[") else (text.strip(),)
    return tuple(find_file(name, folders) for name in names if name)


def find_file(name: str, folders: tuple[Path, ...]) -> Path:
    """The first that exists of a name in several folders; in the first folder where none does."""
    candidates = [folder / name for folder in folders]
    return next((path for path in candidates if path.is_file()), candidates[0])


__all__ = [
    "IMAGE",
    "Row",
    "UnreadableOptions",
    "column_name",
    "find_file",
    "images_of",
    "paths_of",
    "read_header",
    "read_table",
]
