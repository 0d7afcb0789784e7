# SPDX-License-Identifier: Apache-2.0

"""Results in the shape of the paper's tables, with its rows quoted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import yaml

from gmai_xtuner.evaluate.results import Cell, Result
from gmai_xtuner.evaluate.tables import NONE, QUOTED, Row, Table, interval, percent

FILE = Path(__file__).with_name("paper_rows.yaml")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a paper's table.

    Args:
        short: its heading.
        name: value of the table's group that it is about; None for an average.
        average: ``micro``, ``macro``, or ``printed`` for a number of the paper that can't be made again.
        mean: the mean of the columns before it.
        benchmark, variant: what it is about, where not the whole table is.
    """

    short: str
    name: str | None = None
    average: str | None = None
    mean: bool = False
    benchmark: str | None = None
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table of the paper.

    Args:
        printed_as: its numbers in the paper's versions.
        columns: in the paper's order, those that we add at the end.
        rows: model -> cells as printed; None where the paper has no such cell.
        notes: what a reader must know to compare.
        decimals: of its percentages.
        benchmark, variant, group: what the columns are groups of; None for a table over benchmarks.
    """

    key: str
    title: str
    printed_as: str
    source: str
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[str | None, ...]]
    notes: tuple[str, ...]
    decimals: int
    benchmark: str | None = None
    variant: str | None = None
    group: str | None = None


@cache
def paper_tables() -> Mapping[str, PaperTable]:
    """Return the paper's tables by their keys."""
    content: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    source = content.pop("source")
    return {key: _table(key, source, value) for key, value in content.items()}


def _table(key: str, source: str, value: dict[str, Any]) -> PaperTable:
    notes = [" ".join(note.split()) for note in value["notes"]]
    table = msgspec.convert({**value, "notes": notes, "key": key, "source": source}, PaperTable)
    wrong = [name for name, cells in table.rows.items() if len(cells) != len(table.columns)]
    if wrong:
        raise ValueError(f"{FILE.name}, {key}: {wrong} have other numbers of cells than columns")
    return table


def tables_like_the_papers(results: Sequence[Result]) -> list[Table]:
    """Return the paper's tables that the results have something to put in.

    Args:
        results: of one model; of several protocols of a benchmark that fit a table each gives its own rows,
            in the table over benchmarks the first counts.
    """
    tables = []
    for paper in paper_tables().values():
        fitting = [result for result in results if _fits(paper, result)]
        if not fitting:
            continue
        rows, notes = _quoted(paper), list(paper.notes)
        if paper.benchmark is None:
            rows += _rows_over_benchmarks(paper, fitting, notes)
        else:
            for result in fitting:
                rows += _rows_over_groups(paper, result, notes, several=len(fitting) > 1)
        tables.append(
            Table(
                f"paper_{paper.key}",
                f"{paper.title}, in the shape of {paper.printed_as} of the GMAI-VL paper",
                ("model", *(column.short for column in paper.columns)),
                tuple(rows),
                (
                    f"Rows marked {QUOTED} are the paper's ({paper.source}), not measured here.",
                    *dict.fromkeys(notes),
                ),
            )
        )
    return tables


def _fits(paper: PaperTable, result: Result) -> bool:
    if paper.benchmark is None:
        return any(
            (column.benchmark, column.variant) == (result.benchmark, result.variant)
            for column in paper.columns
        )
    return paper.benchmark == result.benchmark and paper.variant in (None, result.variant)


def _quoted(paper: PaperTable) -> list[Row]:
    return [
        Row(f"{name} ({QUOTED})", tuple(cell or NONE for cell in cells), QUOTED)
        for name, cells in paper.rows.items()
    ]


def _rows_over_benchmarks(
    paper: PaperTable, results: Sequence[Result], notes: list[str]
) -> list[Row]:
    """Return our row: the first result of each column's benchmark, and the mean if there are all."""
    first = {(one.benchmark, one.variant): one for one in reversed(results)}
    cells: list[Cell | None] = []
    for column in paper.columns:
        if column.mean:
            continue
        result = first.get((str(column.benchmark), str(column.variant)))
        cells.append(result.headline if result else None)
        if result:
            average = next(iter(result.averages))
            notes.append(
                f"{column.short} of {_origin(result)}, {average} average{_problems(result)}."
            )
    values = [cell.value for cell in cells if cell is not None and cell.value is not None]
    mean = sum(values) / len(values) if len(values) == len(cells) else None
    score, *below = _below(results[0].model_name, cells, paper.decimals)
    return [
        Row(score.label, (*score.cells, percent(mean, paper.decimals))),
        *(Row(row.label, (*row.cells, NONE), row.kind) for row in below),
    ]


def _origin(result: Result, variant: str = "") -> str:
    scored = f"{result.protocol}/{result.version}, scorer {result.scorer}"
    return f"{result.model_name}: {variant}{scored}"


def _problems(result: Result) -> str:
    return "".join(f"; {problem}" for problem in result.problems)


def _rows_over_groups(
    paper: PaperTable, result: Result, notes: list[str], *, several: bool
) -> list[Row]:
    """Return our row: a cell for each group that the paper has a column of."""
    found = result.groups.get(str(paper.group), {})
    groups = {_same(name): cell for name, cell in found.items()}
    known = {_same(column.name) for column in paper.columns if column.name}
    if other := [name for name in found if _same(name) not in known]:
        notes.append(f"Not among the paper's columns, but in the averages: {', '.join(other)}.")
    notes.append(f"{_origin(result, f'{result.variant}, protocol ')}{_problems(result)}.")
    label = f"{result.model_name}, {result.protocol}" + (f", {result.scorer}" if several else "")
    cells = [_cell(column, result, groups) for column in paper.columns]
    return _below(label, cells, paper.decimals)


def _cell(column: Column, result: Result, groups: dict[str, Cell]) -> Cell | None:
    if column.variant is not None and column.variant != result.variant:
        return None
    if column.name is not None:
        return groups.get(_same(column.name))
    for name, cell in result.averages.items():
        if name.split()[0] == column.average:
            return cell
    return None


def _below(label: str, cells: Sequence[Cell | None], decimals: int) -> list[Row]:
    """Return our score, and below it its interval, n and unparsed share."""

    def row(label: str, shown: Callable[[Cell], str], kind: str = "score") -> Row:
        return Row(label, tuple(shown(cell) if cell else NONE for cell in cells), kind)

    return [
        row(label, lambda cell: percent(cell.value, decimals)),
        row("95 % interval", lambda cell: interval(cell, decimals), "interval"),
        row("n", lambda cell: str(cell.n), "n"),
        row("unparsed %", lambda cell: percent(cell.unparsed, decimals), "unparsed"),
    ]


def _same(name: str | None) -> str:
    """Compare names: the authors' files and papers write the same name with blanks, underscores or dashes."""
    return re.sub(r"[\W_]+", "", name or "").casefold()
