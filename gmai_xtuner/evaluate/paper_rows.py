"""The rows of the paper's tables, quoted, and the shape of each table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("paper_rows.yaml")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a paper's table.

    Args:
        short: its heading.
        name: value of the table's group that it is about; None for an average.
        average: ``micro``, ``macro``, or ``printed`` for a number of the paper that can't be made again.
        mean: the mean of the columns before it.
        benchmark: what it is about, where the table's columns are of different benchmarks.
        variant: of that benchmark, or the one variant that fills the column.
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
        key: short name.
        title: what it is about.
        printed_as: its numbers in the paper.
        source: where it was read.
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
    """The paper's tables by their keys."""
    content: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    source = content.pop("source")
    return {key: _table(key, source, value) for key, value in content.items()}


def _table(key: str, source: str, value: dict[str, Any]) -> PaperTable:
    columns = tuple(Column(**column) for column in value.pop("columns"))
    rows = {name: tuple(cells) for name, cells in value.pop("rows").items()}
    wrong = [name for name, cells in rows.items() if len(cells) != len(columns)]
    if wrong:
        raise ValueError(f"{FILE.name}, {key}: {wrong} have other numbers of cells than columns")
    notes = tuple(" ".join(note.split()) for note in value.pop("notes"))
    return PaperTable(key=key, source=source, columns=columns, rows=rows, notes=notes, **value)
