"""Tables whose rows name a video or a slide: CSV, TSV, JSON lines or Excel."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydantic import Field

from data_tools.options import Options
from data_tools.records import Unit
from gmai_xtuner.core.errors import SourceError


class CornerColumns(Options):
    """Columns of a box's left, upper, right and lower edge, in pixels, half-open."""

    x1: str
    y1: str
    x2: str
    y2: str

    @property
    def used(self) -> list[str]:
        """x1, y1, x2, y2."""
        return [self.x1, self.y1, self.x2, self.y2]


class RowColumns(Options):
    """Which column holds what.

    Args:
        file: path below the source's root, file name, or file name without its suffix.
        label: the label; an empty cell: nothing is known.
        box: ``{x1: ..., y1: ..., x2: ..., y2: ...}``; without it, or where the four cells are empty, a label
            is of the whole.
        attributes: column -> name of the attribute that its cells are.
    """

    file: str = "file"
    label: str = "label"
    box: CornerColumns | None = None
    attributes: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Args:
        line: of the table, from 1, the header included; of an Excel sheet its row.
        label: "" if the cell is empty.
        box: None without box columns, or with all four cells empty.
        attributes: those with a text in their cell.
        cells: of the further columns that the reader asked for.
        problem: why the row can't be used, or "".
    """

    line: int
    label: str
    box: tuple[float, float, float, float] | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def read_rows(
    source: str, table: Path, columns: RowColumns, *, extra: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """File name as the table has it -> its rows, in the table's order.

    Args:
        source: name in the job, for the errors' text.
        extra: further columns that must be there; kept as text in `Row.cells`.

    Raises:
        SourceError: the table can't be read or lacks a column.
    """
    box_columns = columns.box.used if columns.box else []
    wanted = [columns.file, columns.label, *box_columns, *columns.attributes, *extra]
    found: dict[str, list[Row]] = defaultdict(list)
    for line, cells in _cells(source, table):
        missing = [name for name in wanted if name not in cells]
        if missing:
            raise SourceError(
                f"source {source!r}: {table}, line {line} has no column {', '.join(map(repr, missing))}; "
                f"its columns are {', '.join(map(repr, cells))}; name the right ones in 'columns'"
            )
        name = cells[columns.file]
        if not name:
            raise SourceError(
                f"source {source!r}: {table}, line {line}: the cell of {columns.file!r} is empty; every "
                "row names its file"
            )
        box, problem = _box([cells[name] for name in box_columns])
        attributes = {new: cells[old] for old, new in columns.attributes.items() if cells[old]}
        found[name].append(
            Row(
                line,
                sys.intern(cells[columns.label]),
                box,
                attributes,
                {name: cells[name] for name in extra},
                problem,
            )
        )
    if not found:
        raise SourceError(f"source {source!r}: {table} has no rows")
    return dict(found)


def match_files(rows: Mapping[str, Iterable[Row]], files: Sequence[str]) -> Iterator[Unit]:
    """A unit a file with its rows, then a unit for each name in the table that has no file.

    A name fits a file by its path, else by its file name, else by its file name without suffix; a short
    name that several files have fits none of them.

    Args:
        files: paths below the root, sorted.
    """
    by_path = set(files)
    short: dict[str, set[str]] = defaultdict(set)
    for path in files:
        name = PurePosixPath(path).name
        for alias in {name, name.split(".")[0], PurePosixPath(name).stem}:
            short[alias].add(path)
    of_file: dict[str, list[Row]] = defaultdict(list)
    unknown = []
    for name, of_name in rows.items():
        path = name.replace("\\", "/")
        fitting = {path} if path in by_path else short.get(path, set())
        if len(fitting) == 1:
            of_file[next(iter(fitting))].extend(of_name)
        else:
            unknown.append(name)
    for path in files:
        yield Unit(path, tuple(of_file.get(path, ())))
    for name in sorted(unknown):
        yield Unit(name)


def folder_of(path: str) -> str | None:
    """Name of the folder that a file lies in directly; None for one in the source's root itself."""
    return PurePosixPath(path).parent.name or None


def beside(path: str, pattern: str) -> str:
    """Path below the root of the file that belongs to another, such as a slide's mask."""
    own = PurePosixPath(path)
    return (own.parent / pattern.replace("{stem}", own.stem)).as_posix()


def _box(cells: Sequence[str]) -> tuple[tuple[float, float, float, float] | None, str]:
    """The box, and what is wrong with it."""
    if not any(cells):
        return None, ""
    try:
        x1, y1, x2, y2 = (float(cell) for cell in cells)
    except ValueError:
        return None, f"x1, y1, x2, y2 are {', '.join(map(repr, cells))}, not four numbers"
    return (x1, y1, x2, y2), ""


def _cells(source: str, table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and cells of every row; a cell that is missing or null is an empty text."""
    try:
        if table.suffix.lower() in (".xlsx", ".xlsm"):
            yield from _excel(table)
        elif table.suffix.lower() in (".jsonl", ".ndjson"):
            with table.open(encoding="utf-8") as lines:
                for number, text in enumerate(lines, 1):
                    if text.strip():
                        yield number, {key: _text(value) for key, value in json.loads(text).items()}
        else:
            delimiter = "\t" if table.suffix.lower() in (".tsv", ".tab") else ","
            with table.open(encoding="utf-8-sig", newline="") as lines:
                reader = csv.DictReader(lines, delimiter=delimiter)
                for cells in reader:
                    yield (
                        reader.line_num,
                        {key: _text(cells[key]) for key in reader.fieldnames or ()},
                    )
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, AttributeError) as error:
        raise SourceError(
            f"source {source!r}: can't read the table {table}: {error}; expected CSV, TSV (.tsv), "
            "JSON lines (.jsonl) in UTF-8, or Excel (.xlsx)"
        ) from error


def _excel(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    from zipfile import BadZipFile

    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(table, read_only=True, data_only=True)
    except (BadZipFile, InvalidFileException, KeyError) as error:
        raise OSError(f"not an Excel file: {error}") from error
    rows = book.worksheets[0].iter_rows(values_only=True)
    header = [_text(value) for value in next(rows, ())]
    for number, values in enumerate(rows, 2):
        if any(value is not None for value in values):
            yield number, dict(zip(header, map(_text, values), strict=False))
    book.close()


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()
