# SPDX-License-Identifier: Apache-2.0

"""Rows of a CSV, TSV, JSONL or Excel table, in little memory.

`grouped` gives the rows of one image together, wherever in the table they are: a temporary database takes the
cells that are used.

pyarrow reads a million rows in a fifth of the time, but takes a quote that is not closed, or that stands
inside a cell, for a good cell: whole rows vanish without an error. And it knows no line numbers.
"""

from __future__ import annotations

import codecs
import csv
import pickle
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from data_tools.readers.files import listed, near
from gmai_xtuner.core.errors import SourceError
from gmai_xtuner.core.strict_json import STRICT_JSON

Format = Literal["csv", "tsv", "jsonl", "excel"]
FORMATS: dict[str, Format] = {
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab", ".txt"), "tsv"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".xlsx", ".xlsm"), "excel"),
}
MAX_LINE = 16 * 2**20
MAX_WIDE = 256 * 2**20  # of a file in UTF-16 or UTF-32, whose lines aren't bounded
MAX_SHEETS = 2**28  # of what an Excel file unpacks to


Parsed = Generator[tuple[int, Any], None, None]
"""Line, and its cells (of JSONL by their names), or what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row's cells of the columns that are used.

    ``line`` is of the file, from 1, where the row begins; of an Excel sheet its row. Of a row with a
    ``problem``, the reason for which it can't be used, there are the cells that can be told.
    """

    line: int
    cells: dict[str, Any]
    problem: str = ""


def read_table(
    path: Path,
    used: Sequence[str],
    *,
    source: str,
    form: Format | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    sheet: str | None = None,
    strict: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a table that are not empty, with the cells of the columns in ``used``.

    In a JSONL a missing one is None, but an error with ``strict``. Form is by suffix, encoding UTF-8, the
    delimiter a comma (of a TSV a tab), the sheet the first, unless they are said; ``source`` is named in
    errors.

    A `SourceError` if it can't be read, a column is missing, or there is no row.
    """
    shown = f"Source {source}: {path}"
    form = form or FORMATS.get(path.suffix.lower())
    if form is None:
        raise SourceError(f"{shown}: the suffix is none of {', '.join(FORMATS)}. Say `format`.")
    if form == "excel":
        parsed = _excel(path, shown, sheet)
    elif form == "jsonl":
        parsed = _jsonl(path, shown, encoding)
    else:
        parsed = _csv(path, shown, encoding, delimiter or ("\t" if form == "tsv" else ","))
    with closing(parsed):
        columns, places = list[str](), dict[str, int]()
        if form != "jsonl":
            line, header = next(parsed, (0, None))
            if header is None:
                raise SourceError(f"{shown} is empty. A header of column names is expected.")
            if isinstance(header, str):
                raise SourceError(f"{shown} line {line}: {header}.")
            columns = [cell_text(cell) for cell in header]
            _check_columns(shown, used, columns)
            places = {name: columns.index(name) for name in used}
        seen, empty = dict[str, None](), True
        for line, cells in parsed:
            empty = False
            if isinstance(cells, str):
                yield Row(line, {}, cells)
            elif isinstance(cells, dict):
                seen.update(dict.fromkeys(cells))
                if strict:
                    _check_columns(shown, used, list(cells))
                yield Row(line, {name: cells.get(name) for name in used})
            else:
                told = {name: cells[at] for name, at in places.items() if at < len(cells)}
                is_whole = len(cells) == len(columns)
                problem = "" if is_whole else "row with another number of cells than the header"
                yield Row(line, told, problem)
        if empty:
            raise SourceError(f"{shown} has no row.")
        if form == "jsonl":
            _check_columns(shown, used, list(seen))


def _check_columns(shown: str, used: Sequence[str], there: Sequence[str]) -> None:
    hints = []
    for name in (name for name in used if name not in there):
        alike = near(name, there)
        hints.append(f"{name!r}" + (f" (did you mean {listed(alike)}?)" if alike else ""))
    if hints:
        other = [sign for sign in ";\t|," if len(there) == 1 and sign in there[0]]
        remedy = f" It is one column: say `delimiter: {other[0]!r}`." if other else ""
        problem = f"has no column {', '.join(hints)}. There are {listed(there)}"
        raise SourceError(f"{shown} {problem}.{remedy}")
    for name in used:
        if (count := there.count(name)) > 1:
            raise SourceError(f"{shown} has {count} columns {name!r}.")


def _csv(path: Path, shown: str, encoding: str, delimiter: str) -> Parsed:
    reader = csv.reader(_lines(path, shown, encoding), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "limit" in str(error) or "unexpected end" in str(error):
                cause = "a cell begins with a quote that is not closed, or is larger than"
                cause += f" {csv.field_size_limit()} characters ({error})"
                raise SourceError(f"{shown} line {line}: {cause}. Correct the row.") from error
            yield line, "row that can't be read"
        else:
            if cells:
                yield line, cells


def _jsonl(path: Path, shown: str, encoding: str) -> Parsed:
    for line, text in enumerate(_lines(path, shown, encoding), 1):
        if not text.strip():
            continue
        try:
            content = STRICT_JSON.decode(text)
        except (ValueError, RecursionError):
            content = None
        yield line, content if isinstance(content, dict) else "row that is no JSON object"


def _excel(path: Path, shown: str, sheet: str | None) -> Parsed:
    try:
        yield from _excel_rows(path, shown, sheet)
    except SourceError:
        raise
    except Exception as error:  # whatever openpyxl makes of a damaged file, also at a later row
        why = f"{type(error).__name__}: {error}"
        raise SourceError(f"{shown} is no Excel file, or damaged ({why}).") from error


def _excel_rows(path: Path, shown: str, sheet: str | None) -> Parsed:
    import zipfile

    import openpyxl

    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # Python unpacks bzip2 and LZMA without a bound, and Excel writes neither.
        packed = {info.compress_type for info in members}
        if packed - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise SourceError(f"{shown} is packed as no Excel file is; save it anew.")
        if sum(info.file_size for info in members) > MAX_SHEETS:
            problem = f"unpacks to more than {MAX_SHEETS} bytes"
            raise SourceError(f"{shown} {problem}; save it as CSV.")
    with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
        if sheet is not None and sheet not in book.sheetnames:
            there = listed(book.sheetnames)
            raise SourceError(f"{shown} has no sheet {sheet!r}; there are {there}.")
        width = None
        rows = book[sheet or book.sheetnames[0]].iter_rows(values_only=True)
        for number, cells in enumerate(rows, 1):
            width = width or len(cells)
            if any(cell is not None for cell in cells):
                yield number, [*cells, *[None] * (width - len(cells))]


def _lines(path: Path, shown: str, encoding: str) -> Iterator[str]:
    try:
        codec = codecs.lookup(encoding).name.removesuffix("-sig")
        file = path.open("rb")
    except LookupError as error:
        raise SourceError(f"{shown}: {encoding!r} is no encoding that Python knows.") from error
    except OSError as error:
        raise SourceError(f"{shown} can't be read: {error.strerror}.") from error
    with file:
        if codec.startswith(("utf-16", "utf-32")):
            try:
                if path.stat().st_size > MAX_WIDE:
                    problem = f"{codec} of more than {MAX_WIDE} bytes"
                    raise SourceError(f"{shown}: {problem}; save it as UTF-8.")
                with codecs.getreader(encoding)(file) as text:
                    yield from text
            except UnicodeError as error:
                problem = f"is not {encoding} ({error})"
                raise SourceError(f"{shown} {problem}. Correct `encoding`.") from error
            return
        begin = number = 0
        while data := file.readline(MAX_LINE + 1):
            number += 1
            if len(data) > MAX_LINE:
                raise SourceError(f"{shown} line {number} is longer than {MAX_LINE} bytes.")
            try:
                line = data.decode(codec)
            except UnicodeDecodeError as error:
                byte = f"byte {begin + error.start} (0x{data[error.start]:02x}) is not {codec}"
                advice = "Name the table's `encoding`, such as `cp1252`, or save it as UTF-8."
                raise SourceError(f"{shown} line {number}: {byte}. {advice}") from error
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
    rows: Iterable[Row], *, key: Callable[[Row], str], wanted: Callable[[Row], bool]
) -> Iterator[list[Row]]:
    """Yield the rows of each ``key`` together, keys in the order in which they come first.

    The very first list, which may be empty, are the rows of which nobody knows the key: they have "", or a
    problem and a key that no good row has. A row without a problem is taken if it is ``wanted``.
    """
    taken = (
        (key(row).encode("utf-8", "surrogatepass"), bool(row.problem), pickle.dumps(row))
        for row in rows
        if row.problem or wanted(row)
    )
    with closing(sqlite3.connect("")) as store:  # a file of its own, which goes with the connection
        store.execute("CREATE TABLE rows (key BLOB, is_bad INTEGER, row BLOB)")
        store.executemany("INSERT INTO rows VALUES (?, ?, ?)", taken)
        store.execute(
            "CREATE TABLE groups AS SELECT key, min(rowid) AS first FROM rows WHERE key != x'' "
            "GROUP BY key HAVING min(is_bad) = 0"
        )
        alone = "SELECT row FROM rows WHERE key NOT IN (SELECT key FROM groups) ORDER BY rowid"
        yield [pickle.loads(body) for (body,) in store.execute(alone)]
        of_keys = "SELECT first, row FROM groups JOIN rows USING (key) ORDER BY first, rows.rowid"
        for _, found in groupby(store.execute(of_keys), key=itemgetter(0)):
            yield [pickle.loads(body) for _, body in found]
