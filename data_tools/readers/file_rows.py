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
from data_tools.readers.rows import FORMATS, cell_text, open_table, words_of
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
    """The columns of a table.

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
class FileRow:
    """A row that names a video, a slide or a series.

    Args:
        line: of the table, from 1, the header included; of an Excel sheet its row.
        label: "" if the cell is empty.
        box: None without box columns, or with all four cells empty.
        attributes: those with a text in their cell.
        cells: of the further columns that the reader asked for.
        problem: why the row can't be used, or "".
        words: labels of other rows that stand in cells of the box, see `rows.words_of`.
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

    Args:
        source: name in the job, for the errors' text.
        table: tab-separated, JSONL or Excel by its suffix, else CSV.
        columns: of the table.
        extra: further columns that must be there; kept as text in `FileRow.cells`.

    Raises:
        SourceError: the table or one of its rows can't be read, or a column is missing.
    """
    corners = columns.box.used if columns.box else []
    named = [columns.file, columns.label, *corners, *columns.attributes, *extra]
    used = list(dict.fromkeys(named))
    found: dict[str, list[FileRow]] = defaultdict(list)
    suffix = table.suffix.lower()
    form = "csv" if suffix == ".txt" else FORMATS.get(suffix, "csv")
    with open_table(table, source=source, form=form) as opened:
        for row in opened.rows(used, strict=True):
            shown = f"{opened.shown} line {row.line}"
            if row.problem:
                raise SourceError(f"{shown}: {row.problem}. Correct the row.")
            cells = {name: cell_text(cell) for name, cell in row.cells.items()}
            name = cells[columns.file]
            if not name:
                raise SourceError(
                    f"{shown}: the cell of {columns.file!r} is empty; every row names its file."
                )
            texts = [cells[name] for name in corners]
            box, problem = _box(texts)
            attributes = {new: cells[old] for old, new in columns.attributes.items() if cells[old]}
            others = {name: cells[name] for name in extra}
            label = sys.intern(cells[columns.label])
            found[name].append(
                FileRow(row.line, label, box, attributes, others, problem, tuple(words_of(texts)))
            )
    # Other words may be anything, such as a name.
    labels = {kept.label for rows in found.values() for kept in rows}
    return {
        name: [replace(kept, words=tuple(labels.intersection(kept.words))) for kept in rows]
        for name, rows in found.items()
    }


def units_of(
    options: Any,
    suffixes: Sequence[str],
    what: str,
    *,
    mask: str | None = None,
    extra: Sequence[str],
    chosen: Callable[[Path, list[str]], list[str]] = lambda _, names: names,
) -> Iterator[Unit]:
    """Yield a unit for each file that fits ``options.files``, with its rows of ``options.table``, if any.

    Args:
        options: of the reader.
        suffixes: of its files.
        what: name of such a file in errors.
        mask: pattern of files that belong to others, see `beside`; they are no units of their own.
        extra: further columns of the table.
        chosen: returns which of the files below the root stand for themselves.

    Raises:
        SourceError: there is no such file, or the table can't be read.
    """
    root: Path = options.root
    fitting = (path for path in root.glob(options.files) if path.suffix.lower() in suffixes)
    found = chosen(
        root, sorted(path.relative_to(root).as_posix() for path in fitting if path.is_file())
    )
    if mask is not None:
        masks = {beside(name, mask) for name in found}
        found = [name for name in found if name not in masks]
    if not found:
        raise SourceError(
            f"Source {options.name}: no {what} below {root} fits {options.files!r}; looked for "
            f"{', '.join(suffixes)}"
        )
    if options.table is None:
        yield from (Unit(name) for name in found)
    else:
        table = root / options.table
        rows = read_rows(options.name, table, options.columns, extra=extra)
        yield from match_files(rows, found)


def match_files(rows: Mapping[str, Iterable[FileRow]], files: Sequence[str]) -> Iterator[Unit]:
    """Yield a unit for each file with its rows, then one for each name of the table that has no file.

    A name fits a file by its path, else by its file name, else by its file name without suffix; a short
    name that several files have fits none of them: to each its rows are rows that can't be used.

    Args:
        files: paths below the root, sorted.
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
            for path in fitting:
                of_file[path] += [
                    replace(row, problem=f"{shown!r} fits several") for row in of_name
                ]
    for path in files:
        yield Unit(path, tuple(of_file.get(path, ())))
    yield from (Unit(shown) for shown in sorted(unknown))


def folder_name(path: str) -> str | None:
    """Return the name of the folder that a file lies in; None for one in the source's root itself."""
    return PurePosixPath(path).parent.name or None


def beside(path: str, pattern: str) -> str:
    """Return the path below the root of the file that belongs to another, such as a slide's mask."""
    own = PurePosixPath(path)
    return (own.parent / pattern.replace("{stem}", own.stem)).as_posix()


def _box(cells: Sequence[str]) -> tuple[tuple[float, float, float, float] | None, str]:
    """Return the box, and what is wrong with it."""
    if not any(cells):
        return None, ""
    try:
        x1, y1, x2, y2 = (float(cell) for cell in cells)
    except ValueError:
        return None, f"x1, y1, x2, y2 are {', '.join(map(repr, cells))}, not four numbers"
    return (x1, y1, x2, y2), ""
