# SPDX-License-Identifier: Apache-2.0

"""Results -> tables: in short, and by each group; as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.core.files import replace_text
from gmai_xtuner.evaluate.results import Cell, Measure, Result

NONE = "–"
QUOTED = "quoted"
_LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
    }
)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table.

    Args:
        cells: all but the first, as shown.
        kind: ``quoted`` from a paper, ``score`` of ours, ``group`` for one of many, or what stands below a
            score: ``interval``, ``n``, ``unparsed``.
    """

    label: str
    cells: tuple[str, ...]
    kind: str = "score"


@dataclass(frozen=True, slots=True)
class Table:
    """A table for any output: a key unique in a report, headings with that of the labels, notes below it."""

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def summary_table(results: Sequence[Result]) -> Table:
    """Return a table with one line a result."""
    rows = []
    for result in results:
        (average, cell), *more = result.averages.items()
        others = [f"{name} {percent(one.value)}" for name, one in more if one.value is not None]
        cells = (
            *(f"{result.protocol}/{result.version}", result.scorer, average),
            *(percent(cell.value), interval(cell), ", ".join(others) or NONE),
            *(_n(result), percent(cell.unparsed)),
        )
        rows.append(Row(f"{result.benchmark} {result.variant}", cells))
    notes = [
        f"{result.benchmark} {result.variant}, {result.protocol}: {problem}."
        for result in results
        for problem in result.problems
    ]
    head = (
        *("benchmark", "protocol", "scorer", "average", "score %", "95 % interval"),
        *("other averages", "n", "unparsed %"),
    )
    return Table("summary", "Results", head, tuple(rows), tuple(dict.fromkeys(notes)))


def group_tables(result: Result) -> list[Table]:
    """Return a table for each group that the protocol names."""
    title = f"{result.protocol}/{result.version}, {result.scorer}"
    notes = tuple(f"{problem}." for problem in result.problems)
    tables = []
    for key, cells in result.groups.items():
        rows = [_long_row(name or "(none given)", cell, "group") for name, cell in cells.items()]
        rows += [_long_row(name, cell) for name, cell in result.averages.items()]
        head = (key, "n", "score %", "95 % interval", "unparsed %")
        about = f"{result.benchmark} {result.variant} by {key}: {title}"
        tables.append(Table(_key(key), about, head, tuple(rows), notes))
    return tables


def controls_tables(results: Sequence[Result]) -> list[Table]:
    """Return a table of what the controls found; none without them."""
    rows = []
    for result in results:
        about = f"{result.benchmark} {result.variant} {result.protocol}"
        for one in result.controls:
            p_value = NONE if one.p_value is None else f"{one.p_value:.2g}"
            cells = (str(one.n), percent(one.value), interval(one), p_value)
            rows.append(Row(f"{about}: {one.name}", cells))
    flags = [
        f"{result.benchmark} {result.variant}, {result.protocol}: {flag}."
        for result in results
        for flag in result.flags
    ]
    head = ("control", "n", "%", "95 % interval", "p")
    return [Table("controls", "Controls", head, tuple(rows), tuple(flags))] if rows else []


def _long_row(name: str, cell: Cell, kind: str = "score") -> Row:
    cells = (str(cell.n), percent(cell.value), interval(cell), percent(cell.unparsed))
    return Row(name, cells, kind)


def percent(value: float | None, decimals: int = 2) -> str:
    return NONE if value is None else f"{100 * value:.{decimals}f}"


def interval(cell: Cell | Measure, decimals: int = 2) -> str:
    ends = cell.interval
    if ends is None:
        return NONE
    return f"{100 * ends.low:.{decimals}f} to {100 * ends.high:.{decimals}f}"


def _n(result: Result) -> str:
    wanted = result.expected if result.expected is not None else result.selected
    return str(result.n) if result.n == wanted else f"{result.n} of {wanted}"


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name).strip("_").lower()


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Write ``tables.md``, ``tables.csv`` and ``tables.tex``."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
        replace_text(folder / f"tables.{suffix}", text(tables))


def to_markdown(tables: Iterable[Table]) -> str:
    """Return tables one below the other."""
    parts = []
    for table in tables:
        lines = [f"## {table.title}", "", _line(table.head)]
        lines.append(_line([":---", *["---:"] * (len(table.head) - 1)]))
        for row in table.rows:
            label = f"*{row.label}*" if row.kind == QUOTED else row.label
            if row.kind == "score":
                label = f"**{label}**"
            lines.append(_line([label, *row.cells]))
        lines += ["", *(f"- {note}" for note in table.notes)]
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def to_csv(tables: Iterable[Table]) -> str:
    """Return all tables in one file; the first two columns say which table and which kind of line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for table in tables:
        writer.writerow(["table", "kind", *table.head])
        for row in table.rows:
            writer.writerow([table.key, row.kind, row.label, *row.cells])
    return out.getvalue()


def to_latex(tables: Iterable[Table]) -> str:
    """Return ``tabular`` environments for ``\\input``; they need the package booktabs."""
    parts = ["% Needs \\usepackage{booktabs}.\n"]
    for table in tables:
        lines = [
            r"\begin{table}",
            rf"\caption{{{latex(table.title)}}}",
            rf"\label{{tab:{table.key}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"\toprule",
            _latex_line(table.head),
            r"\midrule",
        ]
        quoted = True
        for row in table.rows:
            if quoted and row.kind != QUOTED and row is not table.rows[0]:
                lines.append(r"\midrule")
            quoted = row.kind == QUOTED
            lines.append(_latex_line([row.label, *row.cells], italic=quoted))
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        lines += [f"% {' '.join(note.split())}" for note in table.notes]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _latex_line(cells: Sequence[str], *, italic: bool = False) -> str:
    first, *others = (latex(cell) for cell in cells)
    first = rf"\textit{{{first}}}" if italic else first
    return " & ".join([first, *others]) + r" \\"


def latex(text: str) -> str:
    """Escape LaTeX's own characters."""
    return " ".join(text.split()).translate(_LATEX)
