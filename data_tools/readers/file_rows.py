# SPDX-License-Identifier: Apache-2.0

"""Tables whose rows name a video, a slide or a series, held as a whole: CSV, TSV, JSONL or Excel."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from data_tools.options import Options
from data_tools.readers.files import wrong
from data_tools.readers.rows import FORMATS, cell_text, read_table, words_of
from data_tools.records import Unit
from gmai_xtuner.core.errors import SourceError


class CornerColumns(Options):
    """Columns of a box's left, upper, right and lower edge, in pixels, half-open."""

    x1: str
    y1: str
    x2: str
    y2: str


class RowColumns(Options):
    """The columns of a table.

    ``file`` holds a path below the source's root, a file name, or one without suffix. An empty cell of
    ``label``: nothing is known. Without ``box``, or where its four cells are empty, a label is of the whole.
    ``attributes``: column -> name of the attribute that its cells are.
    """

    file: str = "file"
    label: str = "label"
    box: CornerColumns | None = None
    attributes: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row that names a video, a slide or a series.

    ``line`` counts from 1, the header included; of an Excel sheet it is the row. ``label`` is "" for an empty
    cell, ``box`` None without one. ``attributes`` have a text in their cell; ``cells`` are further columns
    that the reader asked for. ``problem`` says why the row can't be used. ``words`` are labels of other rows
    that stand in cells of the box, see `rows.words_of`.
    """

    line: int
    label: str
    box: tuple[float, float, float, float] | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    words: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[str, ...]:
        """The labels that fall with the row."""
        return (self.label, *self.words)


def read_rows(
    source: str, table: Path, columns: RowColumns, *, extra: Sequence[str] = ()
) -> dict[str, list[FileRow]]:
    """Return for each file name, as the table has it, its rows in the table's order.

    The table is tab-separated, JSONL or Excel by its suffix, else CSV; ``extra`` columns are kept as text. A
    SourceError if it or one of its rows can't be read, or a column is missing.
    """
    corners = list(columns.box.model_dump().values()) if columns.box else []
    named = [columns.file, columns.label, *corners, *columns.attributes, *extra]
    found: dict[str, list[FileRow]] = defaultdict(list)
    suffix = table.suffix.lower()
    form = "csv" if suffix == ".txt" else FORMATS.get(suffix, "csv")
    named = list(dict.fromkeys(named))
    for row in read_table(table, named, source=source, form=form, strict=True):
        shown = f"Source {source}: {table} line {row.line}"
        if row.problem:
            raise SourceError(f"{shown}: {row.problem}. Correct the row.")
        cells = {name: cell_text(cell) for name, cell in row.cells.items()}
        name = cells[columns.file]
        if not name:
            problem = f"the cell of {columns.file!r} is empty"
            raise SourceError(f"{shown}: {problem}; every row names its file.")
        texts = [cells[name] for name in corners]
        box, problem = _box(texts)
        made = FileRow(
            row.line,
            sys.intern(cells[columns.label]),
            box,
            {new: cells[old] for old, new in columns.attributes.items() if cells[old]},
            {name: cells[name] for name in extra},
            problem,
            tuple(words_of(texts)),
        )
        found[name].append(made)
    # Other words may be anything, such as a name.
    labels = {kept.label for rows in found.values() for kept in rows}
    for rows in found.values():
        rows[:] = (replace(kept, words=tuple(labels.intersection(kept.words))) for kept in rows)
    return found


def units_of(
    options: Any,
    suffixes: Sequence[str],
    what: str,
    *,
    extra: Sequence[str],
    chosen: Callable[[Path, list[str]], list[str]] = lambda _, names: names,
) -> Iterator[Unit]:
    """Yield a unit for each file that fits ``options.files``, with its rows of ``options.table``, if any.

    ``chosen`` returns which of the files below the root are units of their own; ``what`` names them in
    errors.
    """
    root: Path = options.root
    fitting = (path for path in root.glob(options.files) if path.suffix.lower() in suffixes)
    names = sorted(path.relative_to(root).as_posix() for path in fitting if path.is_file())
    found = chosen(root, names)
    if not found:
        problem = f"no {what} below {root} fits {options.files!r}"
        raise wrong(options, f"{problem}; looked for {', '.join(suffixes)}")
    if options.table is None:
        yield from map(Unit, found)
    else:
        rows = read_rows(options.name, root / options.table, options.columns, extra=extra)
        yield from match_files(rows, found)


def match_files(rows: Mapping[str, Iterable[FileRow]], files: Sequence[str]) -> Iterator[Unit]:
    """Yield a unit for each file with its rows, then one for each name of the table that has no file.

    A name fits a file by its path, else by its file name, else by its file name without suffix; a short
    name that several files have fits none of them: to each its rows are rows that can't be used.
    """
    by_path = set(files)
    short: dict[str, set[str]] = defaultdict(set)
    for path in files:
        name = PurePosixPath(path)
        for alias in (name.name, name.name.split(".")[0], name.stem):
            short[alias].add(path)
    of_file: dict[str, list[FileRow]] = defaultdict(list)
    unknown = []
    for shown, of_name in rows.items():
        path = shown.replace("\\", "/")
        fitting = {path} if path in by_path else short.get(path, set())
        if len(fitting) == 1:
            of_file[next(iter(fitting))].extend(of_name)
        else:
            unknown.append(shown)
            bad = [replace(row, problem=f"{shown!r} fits several") for row in of_name]
            for path in fitting:
                of_file[path] += bad
    for path in files:
        yield Unit(path, tuple(of_file.get(path, ())))
    yield from (Unit(shown) for shown in sorted(unknown))


def beside(path: str, pattern: str) -> str:
    """Return the path below the root of the file that belongs to another, such as a slide's mask."""
    own = PurePosixPath(path)
    return (own.parent / pattern.replace("{stem}", own.stem)).as_posix()


def _box(cells: Sequence[str]) -> tuple[tuple[float, float, float, float] | None, str]:
    if not any(cells):
        return None, ""
    try:
        x1, y1, x2, y2 = (float(cell) for cell in cells)
    except ValueError:
        return None, f"x1, y1, x2, y2 are {', '.join(map(repr, cells))}, not four numbers"
    return (x1, y1, x2, y2), ""
