# SPDX-License-Identifier: Apache-2.0

"""Rows of a CSV, TSV, JSONL or Excel table, in little memory.

`grouped` gives the rows of one image together, wherever in the table they are: a temporary file takes the
cells that are used, and 16 bytes a row stay in memory: where it begins there, and a hash of its image's name.

pyarrow reads a million rows in a fifth of the time, but takes a quote that is not closed, or that stands
inside a cell, for a good cell: whole rows vanish without an error. And it knows no line numbers.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import pickle
import tempfile
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
MAX_WIDE = 256 * 2**20  # of a file in UTF-16 or UTF-32, whose lines aren't bounded
MAX_SHEETS = 2**28  # of what an Excel file unpacks to


@dataclass(frozen=True, slots=True)
class Row:
    """A row's cells of the columns that are used.

    Args:
        line: of the file, from 1, where the row begins; of an Excel sheet its row.
        cells: column -> cell; of a row with a ``problem`` as far as they can be told.
        problem: reason for which the row can't be used, or "".
    """

    line: int
    cells: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """An open table, to be gone through once. Made by `open_table`.

    Args:
        shown: name in error texts: source and path.
        columns: of the header; None for a JSONL.
        parsed: line, and cells, or what is wrong with them.
    """

    shown: str
    columns: list[str] | None
    parsed: Iterator[tuple[int, list[Any] | dict[str, Any] | str]]

    def rows(self, used: Sequence[str], *, strict: bool = False) -> Iterator[Row]:
        """Yield the rows that are not empty.

        Args:
            used: the columns whose cells are wanted.
            strict: whether each object of a JSONL must have them all; else a missing one is None.

        Raises:
            SourceError: a column is missing, or there is no row.
        """
        if self.columns is not None:
            self._check(used, self.columns)
        places = {name: self.columns.index(name) for name in used} if self.columns else {}
        seen: dict[str, None] = {}
        empty = True
        for line, cells in self.parsed:
            empty = False
            if isinstance(cells, str):
                yield Row(line, {}, cells)
            elif isinstance(cells, dict):
                seen.update(dict.fromkeys(cells))
                if strict:
                    self._check(used, list(cells))
                yield Row(line, {name: cells.get(name) for name in used})
            elif len(cells) != len(self.columns or ()):
                told = {name: cells[at] for name, at in places.items() if at < len(cells)}
                yield Row(line, told, "row with another number of cells than the header")
            else:
                yield Row(line, {name: cells[at] for name, at in places.items()})
        if empty:
            raise SourceError(f"{self.shown} has no row.")
        if self.columns is None:
            self._check(used, list(seen))

    def _check(self, used: Sequence[str], there: Sequence[str]) -> None:
        missing = [name for name in used if name not in there]
        if missing:
            hints = []
            for name in missing:
                alike = near(name, there)
                hints.append(f"{name!r}" + (f" (did you mean {listed(alike)}?)" if alike else ""))
            other = [sign for sign in ";\t|," if len(there) == 1 and sign in there[0]]
            remedy = f" It is one column: say `delimiter: {other[0]!r}`." if other else ""
            raise SourceError(
                f"{self.shown} has no column {', '.join(hints)}. There are {listed(there)}.{remedy}"
            )
        for name in used:
            if (count := there.count(name)) > 1:
                raise SourceError(f"{self.shown} has {count} columns {name!r}.")


@contextmanager
def open_table(
    path: Path,
    *,
    source: str,
    form: Format | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    sheet: str | None = None,
) -> Iterator[Table]:
    """Open a table.

    Args:
        path: of the file.
        source: name in the job, for error texts.
        form: default by suffix.
        encoding: of a text.
        delimiter: of a CSV; default a comma, of a TSV a tab.
        sheet: of an Excel file; default the first.

    Raises:
        SourceError: it can't be read, or its form is unknown.
    """
    shown = f"Source {source}: {path}"
    form = form or FORMATS.get(path.suffix.lower())
    if form is None:
        raise SourceError(f"{shown}: the suffix is none of {', '.join(FORMATS)}. Say `format`.")
    parsed: Generator[tuple[int, Any], None, None]
    if form == "excel":
        parsed = _excel(path, shown, sheet)
    elif form == "jsonl":
        parsed = _jsonl(path, shown, encoding)
    else:
        parsed = _csv(path, shown, encoding, delimiter or ("\t" if form == "tsv" else ","))
    with closing(parsed):
        header = None
        if form != "jsonl":
            line, cells = next(parsed, (0, None))
            if cells is None:
                raise SourceError(f"{shown} is empty. A header of column names is expected.")
            if isinstance(cells, str):
                raise SourceError(f"{shown} line {line}: {cells}.")
            header = [cell_text(cell) for cell in cells]
        yield Table(shown, header, parsed)


def _csv(
    path: Path, shown: str, encoding: str, delimiter: str
) -> Generator[tuple[int, list[str] | str], None, None]:
    reader = csv.reader(_lines(path, shown, encoding), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "limit" in str(error) or "unexpected end" in str(error):
                raise SourceError(
                    f"{shown} line {line}: a cell begins with a quote that is not closed, or is larger than "
                    f"{csv.field_size_limit()} characters ({error}). Correct the row."
                ) from error
            yield line, "row that can't be read"
            continue
        if cells:
            yield line, cells


def _jsonl(
    path: Path, shown: str, encoding: str
) -> Generator[tuple[int, dict[str, Any] | str], None, None]:
    for line, text in enumerate(_lines(path, shown, encoding), 1):
        if not text.strip():
            continue
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        yield line, content if isinstance(content, dict) else "row that is no JSON object"


def _excel(
    path: Path, shown: str, sheet: str | None
) -> Generator[tuple[int, list[Any]], None, None]:
    import zipfile

    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # Python unpacks bzip2 and LZMA without a bound, and Excel writes neither.
            packed = {info.compress_type for info in members}
            if packed - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise SourceError(f"{shown} is packed as no Excel file is; save it anew.")
            if sum(info.file_size for info in members) > MAX_SHEETS:
                raise SourceError(
                    f"{shown} unpacks to more than {MAX_SHEETS} bytes; save it as CSV."
                )
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except SourceError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, InvalidFileException) as error:
        raise SourceError(f"{shown} is no Excel file ({error}).") from error
    with closing(book):
        if sheet is not None and sheet not in book.sheetnames:
            raise SourceError(
                f"{shown} has no sheet {sheet!r}; there are {listed(book.sheetnames)}."
            )
        width = None
        rows = book[sheet or book.sheetnames[0]].iter_rows(values_only=True)
        for number, cells in enumerate(rows, 1):
            width = width or len(cells)
            if any(cell is not None for cell in cells):
                yield number, [*cells, *[None] * (width - len(cells))]


def _lines(path: Path, shown: str, encoding: str) -> Iterator[str]:
    """Yield the lines of a text with their ends.

    Raises:
        SourceError: the file or its encoding can't be read, or a line is too long.
    """
    try:
        codec = codecs.lookup(encoding).name.removesuffix("-sig")
    except LookupError as error:
        raise SourceError(f"{shown}: {encoding!r} is no encoding that Python knows.") from error
    try:
        file = path.open("rb")
    except OSError as error:
        raise SourceError(f"{shown} can't be read: {error.strerror}.") from error
    with file:
        if codec.startswith(("utf-16", "utf-32")):
            try:
                if path.stat().st_size > MAX_WIDE:
                    raise SourceError(
                        f"{shown}: {codec} of more than {MAX_WIDE} bytes; save it as UTF-8."
                    )
                with codecs.getreader(encoding)(file) as text:
                    yield from text
            except UnicodeError as error:
                raise SourceError(
                    f"{shown} is not {encoding} ({error}). Correct `encoding`."
                ) from error
            return
        begin = number = 0
        while data := file.readline(MAX_LINE + 1):
            number += 1
            if len(data) > MAX_LINE:
                raise SourceError(f"{shown} line {number} is longer than {MAX_LINE} bytes.")
            try:
                line = data.decode(codec)
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{shown} line {number}: byte {begin + error.start} (0x{data[error.start]:02x}) is not "
                    f"{codec}. Name the table's `encoding`, such as `cp1252`, or save it as UTF-8."
                ) from error
            if number == 1 and data.startswith(codecs.BOM_UTF8):
                line = data[3:].decode(codec)
            begin += len(data)
            yield line


def words_of(cells: Iterable[Any]) -> list[str]:
    """Return the words in cells that should hold numbers: in a shifted row one of them is its label."""
    return [text for text in map(cell_text, cells) if text[:1].isalpha()]


def cell_text(cell: Any) -> str:
    """Return a cell as text: "" for nothing, whole numbers without a fraction."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()


def grouped(
    table: Table,
    used: Sequence[str],
    *,
    key: Callable[[Row], str],
    wanted: Callable[[Row], bool],
) -> Iterator[list[Row]]:
    """Yield the rows of each key together, keys in the order in which they come first.

    The very first list, which may be empty, are the rows of which nobody knows the key: they have none, or
    have a problem and a key that no good row has.

    Args:
        table: open.
        used: columns.
        key: of a row, such as its image's name; "" if it can't be told.
        wanted: whether a row without a problem is taken at all.

    Raises:
        SourceError: a column is missing, or there is no row.
    """
    begins, hashes, bad = array("q"), array("Q"), array("b")
    stray = _hash("")
    with tempfile.TemporaryFile() as file:
        for row in table.rows(used):
            if row.problem or wanted(row):
                begins.append(file.tell())
                hashes.append(_hash(key(row)))
                bad.append(bool(row.problem))
                pickle.dump((row.line, row.cells, row.problem), file)

        def load(number: int) -> Row:
            file.seek(begins[number])
            return Row(*pickle.load(file))

        keys, is_bad = np.frombuffer(hashes, dtype=np.uint64), np.frombuffer(bad, dtype=bool)
        good = np.unique(keys[~is_bad])
        alone = (keys == stray) | (is_bad & ~np.isin(keys, good))
        yield [load(number) for number in np.flatnonzero(alone).tolist()]
        rows = np.flatnonzero(~alone)
        _, index, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
        first = index[inverse]  # of each row, the first row with its key
        together: list[Row] = []
        for number in np.argsort(first, kind="stable").tolist():
            if first[number] == number and together:
                yield together
                together = []
            together.append(load(rows[number]))
        if together:
            yield together


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
