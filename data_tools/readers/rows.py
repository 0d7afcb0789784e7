"""Rows of a CSV, TSV, JSONL or Excel table, in little memory.

`grouped` gives the rows of one image together and goes through the table twice. The first pass keeps 24 bytes
a row: where it begins and a hash of its image's name. If rows of an image are scattered, the second pass
jumps; rows of a table in order are read straight through. Excel and UTF-16 can't be jumped in and are copied
into a temporary file first.

pyarrow reads a million rows in a fifth of the time, but takes a quote that is not closed, or that stands
inside a cell, for a good cell: whole rows vanish without an error. And it knows no line numbers.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from data_tools.readers.files import listed, near
from gmai_xtuner.core.errors import SourceError

Format = Literal["csv", "tsv", "jsonl", "excel"]
FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".xlsx": "excel",
    ".xlsm": "excel",
}
MAX_LINE = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """A row's cells of the columns that are used.

    Args:
        line: of the file, from 1, where the row begins; of an Excel sheet its row.
        cells: column -> cell; empty for a row with a ``problem``.
        problem: reason for which the row can't be used, or "".
    """

    line: int
    cells: dict[str, Any]
    problem: str = ""


class TableFile:
    """A table that is open. Made by `open_table`.

    Args:
        file: binary, at its start.
        shown: how error texts call it: source and path.
        kind: ``"csv"`` or ``"jsonl"``.
        delimiter: of a CSV.
        encoding: of the bytes.
        strict: whether every object of a JSONL has all columns.
    """

    def __init__(
        self,
        file: BinaryIO,
        shown: str,
        *,
        kind: str,
        delimiter: str = ",",
        encoding: str = "utf-8",
        strict: bool = False,
    ) -> None:
        self.file = file
        self.shown = shown
        self.kind = kind
        self.delimiter = delimiter
        self.encoding = encoding
        self.strict = strict
        self.header: list[str] = []
        self.keys_seen: dict[str, None] = {}
        self.start = 0
        self.first_line = 1
        if file.read(3) == codecs.BOM_UTF8:
            self.start = 3
        if kind == "csv":
            self._read_header()

    def _read_header(self) -> None:
        for _, end, line, cells in self._csv_rows(self.start, 1):
            if isinstance(cells, str):
                raise SourceError(f"{self.shown} line {line}: {cells}.")
            self.header = [cell.strip() for cell in cells]
            self.start, self.first_line = end, self._line
            return
        raise SourceError(f"{self.shown} is empty. A header of column names is expected.")

    def rows(
        self, used: Sequence[str], start: int | None = None, line: int | None = None
    ) -> Iterator[tuple[int, Row]]:
        """Where each row begins, and the row, from a place of the file on."""
        start, line = (self.start, self.first_line) if start is None else (start, line or 1)
        if self.kind == "jsonl":
            yield from self._json_rows(used, start, line)
            return
        where = [self.header.index(name) for name in used]
        for begin, _, number, cells in self._csv_rows(start, line):
            if isinstance(cells, str):
                yield begin, Row(number, {}, "row that can't be read")
            elif len(cells) != len(self.header):
                yield begin, Row(number, {}, "row with another number of cells than the header")
            else:
                picked = {name: cells[at] for name, at in zip(used, where, strict=True)}
                yield begin, Row(number, picked)

    def _csv_rows(self, start: int, line: int) -> Iterator[tuple[int, int, int, list[str] | str]]:
        """Begin, end, line and cells (or what is wrong) of each row that is not empty."""
        self.file.seek(start)
        self._end, self._line = start, line
        rows = csv.reader(self._lines(), delimiter=self.delimiter, strict=True)
        while True:
            begin, number = self._end, self._line
            cells: list[str] | str
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "limit" in str(error) or "unexpected end" in str(error):
                    raise SourceError(
                        f"{self.shown} line {number}: a cell begins with a quote that is not closed, or is "
                        f"larger than {csv.field_size_limit()} characters ({error}). Correct the row."
                    ) from error
                cells = str(error)
            if cells:
                yield begin, self._end, number, cells

    def _lines(self) -> Iterator[str]:
        while data := self.file.readline(MAX_LINE + 1):
            yield self._decoded(data)

    def _decoded(self, data: bytes) -> str:
        if len(data) > MAX_LINE:
            raise SourceError(f"{self.shown} line {self._line} is longer than {MAX_LINE} bytes.")
        begin = self._end
        self._end += len(data)
        self._line += 1
        try:
            return data.decode(self.encoding)
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.shown} line {self._line - 1}: byte {begin + error.start} "
                f"(0x{data[error.start]:02x}) is not {self.encoding}. Name the table's `encoding`, such as "
                "`cp1252`, or save it as UTF-8."
            ) from error

    def _json_rows(self, used: Sequence[str], start: int, line: int) -> Iterator[tuple[int, Row]]:
        self.file.seek(start)
        self._end, self._line = start, line
        while True:
            begin, number = self._end, self._line
            data = self.file.readline(MAX_LINE + 1)
            if not data:
                return
            text = self._decoded(data).strip()
            if not text:
                continue
            try:
                content = json.loads(text)
            except (ValueError, RecursionError):
                content = None
            if not isinstance(content, dict):
                yield begin, Row(number, {}, "row that is no JSON object")
                continue
            self.keys_seen.update(dict.fromkeys(content))
            if self.strict:
                check_columns(self, used, list(content))
            cells = {name: content.get(name) for name in used}
            yield begin, Row(content.get(_SHEET_ROW, number), cells)


_SHEET_ROW = "\0row"


@contextmanager
def open_table(
    path: Path,
    *,
    source: str,
    form: Format | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    sheet: str | None = None,
    strict: bool = False,
) -> Iterator[TableFile]:
    """Open a table.

    Args:
        path: of the file.
        source: name in the job, for error texts.
        form: default by suffix.
        encoding: of a text.
        delimiter: of a CSV; default a comma, of a TSV a tab.
        sheet: of an Excel file; default the first.
        strict: whether every object of a JSONL has all columns.

    Raises:
        SourceError: it can't be read, or its form is unknown.
    """
    shown = f"Source {source}: {path}"
    form = form or FORMATS.get(path.suffix.lower())
    if form is None:
        raise SourceError(f"{shown}: the suffix is none of {', '.join(FORMATS)}. Say `format`.")
    try:
        codec = codecs.lookup(encoding).name
    except LookupError as error:
        raise SourceError(f"{shown}: {encoding!r} is no encoding that Python knows.") from error
    kind = "jsonl" if form in ("jsonl", "excel") else "csv"
    delimiter = delimiter or ("\t" if form == "tsv" else ",")
    try:
        plain = path.open("rb")
    except OSError as error:
        raise SourceError(f"{shown} can't be read: {error.strerror}.") from error
    with plain, tempfile.TemporaryFile() as copy:
        file: Any = plain
        if form == "excel":
            _copy_sheet(path, copy, shown, sheet)
            file, codec = copy, "utf-8"
        elif codec.startswith(("utf-16", "utf-32")):
            _transcode(path, copy, shown, encoding)
            file, codec = copy, "utf-8"
        file.seek(0)
        codec = codec.removesuffix("-sig")
        yield TableFile(file, shown, kind=kind, delimiter=delimiter, encoding=codec, strict=strict)


def cell_text(cell: Any) -> str:
    """Return a cell as text: "" for nothing, whole numbers without a fraction."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()


def _transcode(path: Path, copy: Any, shown: str, encoding: str) -> None:
    try:
        with path.open(encoding=encoding, newline="") as text:
            while part := text.read(2**20):
                copy.write(part.encode())
    except UnicodeError as error:
        raise SourceError(f"{shown} is not {encoding} ({error}). Correct `encoding`.") from error


def _copy_sheet(path: Path, copy: Any, shown: str, sheet: str | None) -> None:
    import zipfile

    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, InvalidFileException) as error:
        raise SourceError(f"{shown} is no Excel file ({error}).") from error
    try:
        if sheet is not None and sheet not in book.sheetnames:
            raise SourceError(
                f"{shown} has no sheet {sheet!r}; there are {listed(book.sheetnames)}."
            )
        header: list[str] | None = None
        for number, cells in enumerate(
            book[sheet or book.sheetnames[0]].iter_rows(values_only=True), start=1
        ):
            if header is None:
                header = ["" if cell is None else str(cell).strip() for cell in cells]
                used = [name for name in header if name]
                if len(set(used)) != len(used):
                    raise SourceError(f"{shown} has two columns of the same name: {listed(used)}.")
                continue
            row = {name: cell for name, cell in zip(header, cells, strict=False) if name}
            if any(cell is not None for cell in row.values()):
                copy.write(json.dumps({_SHEET_ROW: number, **row}, default=str).encode() + b"\n")
        if header is None:
            raise SourceError(f"{shown} is empty. A header of column names is expected.")
    finally:
        book.close()


# --- rows of an image together --------------------------------------------------------------------


def grouped(
    table: TableFile,
    used: Sequence[str],
    *,
    key: Callable[[Row], str],
    wanted: Callable[[Row], bool],
) -> Iterator[list[Row]]:
    """Yield the rows of each key together, keys in the order in which they come first.

    Args:
        table: open.
        used: columns.
        key: of a row, such as its image's name; a row with a problem is alone.
        wanted: whether a row is read at all.

    Raises:
        SourceError: a column is missing, or there is no row.
    """
    if table.kind == "csv":
        check_columns(table, used, table.header)
    table.keys_seen = {}
    begins, lines, hashes = array("q"), array("q"), array("Q")
    count = 0
    for begin, row in table.rows(used):
        count += 1
        if row.problem or wanted(row):
            begins.append(begin)
            lines.append(row.line)
            hashes.append(_hash(f"\0{row.line}" if row.problem else key(row)))
    if count == 0:
        raise SourceError(f"{table.shown} has no row.")
    if table.kind == "jsonl":
        check_columns(table, used, [name for name in table.keys_seen if name != _SHEET_ROW])
    _, index, inverse = np.unique(
        np.frombuffer(hashes, dtype=np.uint64), return_index=True, return_inverse=True
    )
    first = index[inverse]  # of each row, the first row with its key
    rows: Iterator[tuple[int, Row]] = iter(())
    together: list[Row] = []
    before = -2
    for number in np.argsort(first, kind="stable").tolist():
        if first[number] == number and together:
            yield together
            together = []
        begin, row = next(rows, (-1, None)) if number == before + 1 else (-1, None)
        if row is None or begin != begins[number]:
            rows = table.rows(used, begins[number], lines[number])
            _, row = next(rows)
        together.append(row)
        before = number
    if together:
        yield together


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def check_columns(table: TableFile, used: Sequence[str], there: Sequence[str]) -> None:
    """Check that each column that is used is there, once.

    Raises:
        SourceError: all that are missing, with the names that look most like them.
    """
    missing = [name for name in used if name not in there]
    if missing:
        hints = []
        for name in missing:
            alike = near(name, there)
            hints.append(f"{name!r}" + (f" (did you mean {listed(alike)}?)" if alike else ""))
        raise SourceError(
            f"{table.shown} has no column {', '.join(hints)}. There are {listed(there)}."
        )
    for name in used:
        if list(there).count(name) > 1:
            raise SourceError(f"{table.shown} has {list(there).count(name)} columns {name!r}.")
