# SPDX-License-Identifier: Apache-2.0

"""Results -> tables: in short, by group, and in the shape of the paper's; as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gmai_xtuner.core.files import replace_text
from gmai_xtuner.core.templates import environment
from gmai_xtuner.evaluate.results import Cell, Measure, Result

NONE = "–"
QUOTED = "quoted"
PAPER = Path(__file__).with_name("paper_rows.yaml")
_LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
    }
)
_LATEX_TAGS = {
    "block_start_string": "<%",
    "block_end_string": "%>",
    "variable_start_string": "<<",
    "variable_end_string": ">>",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: all cells but the first, as shown.

    ``kind`` is ``quoted`` from a paper, ``score`` of ours, ``group`` for one of many, or what stands below a
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


def all_tables(results: Sequence[Result]) -> list[Table]:
    """Return the summary, the tables in the paper's shape, and those of the controls."""
    return [summary_table(results), *tables_like_the_papers(results), *controls_tables(results)]


def summary_table(results: Sequence[Result]) -> Table:
    """Return a table with one line a result."""
    rows = []
    for result in results:
        (average, cell), *more = result.averages.items()
        score, ends, _, unparsed = _shown(cell)
        others = [f"{name} {percent(one.value)}" for name, one in more if one.value is not None]
        wanted = result.selected if result.expected is None else result.expected
        n = str(result.n) if result.n == wanted else f"{result.n} of {wanted}"
        told = (_protocol(result), result.scorer, average, score, ends, ", ".join(others) or NONE)
        rows.append(Row(f"{result.benchmark} {result.variant}", (*told, n, unparsed)))
    notes = [f"{_about(one)}: {problem}." for one in results for problem in one.problems]
    head = (
        *("benchmark", "protocol", "scorer", "average", "score %", "95 % interval"),
        *("other averages", "n", "unparsed %"),
    )
    return Table("summary", "Results", head, tuple(rows), tuple(dict.fromkeys(notes)))


def group_tables(result: Result) -> list[Table]:
    """Return a table for each group that the protocol names."""

    def row(label: str, cell: Cell, kind: str = "score") -> Row:
        score, ends, n, unparsed = _shown(cell)
        return Row(label, (n, score, ends, unparsed), kind)

    tables = []
    for key, cells in result.groups.items():
        rows = [row(name or "(none given)", cell, "group") for name, cell in cells.items()]
        rows += [row(name, cell) for name, cell in result.averages.items()]
        scored = f"{_protocol(result)}, {result.scorer}"
        about = f"{result.benchmark} {result.variant} by {key}: {scored}"
        head = (key, "n", "score %", "95 % interval", "unparsed %")
        name = re.sub(r"[\W_]+", "_", key).strip("_").lower()
        notes = tuple(f"{problem}." for problem in result.problems)
        tables.append(Table(name, about, head, tuple(rows), notes))
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
    flags = tuple(f"{_about(result)}: {flag}." for result in results for flag in result.flags)
    head = ("control", "n", "%", "95 % interval", "p")
    return [Table("controls", "Controls", head, tuple(rows), flags)] if rows else []


def _about(result: Result) -> str:
    return f"{result.benchmark} {result.variant}, {result.protocol}"


def _protocol(result: Result) -> str:
    return f"{result.protocol}/{result.version}"


def percent(value: float | None, decimals: int = 2) -> str:
    return NONE if value is None else f"{100 * value:.{decimals}f}"


def interval(cell: Cell | Measure, decimals: int = 2) -> str:
    ends = cell.interval
    return f"{percent(ends.low, decimals)} to {percent(ends.high, decimals)}" if ends else NONE


def _shown(cell: Cell | None, decimals: int = 2) -> tuple[str, str, str, str]:
    """Return score, interval, n and unparsed share of a cell."""
    if cell is None:
        return NONE, NONE, NONE, NONE
    score, unparsed = percent(cell.value, decimals), percent(cell.unparsed, decimals)
    return score, interval(cell, decimals), str(cell.n), unparsed


# In the shape of the paper's tables


@cache
def paper_tables() -> Mapping[str, Any]:
    """Return the paper's tables by their keys, as ``paper_rows.yaml`` says what they are."""
    content: dict[str, Any] = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    source = content.pop("source")
    return {key: {"source": source, **table} for key, table in content.items()}


def _fits(paper: Mapping[str, Any], result: Result) -> bool:
    about = [paper] if "benchmark" in paper else paper["columns"]
    shown = [(one.get("benchmark"), one.get("variant", result.variant)) for one in about]
    return (result.benchmark, result.variant) in shown


def tables_like_the_papers(results: Sequence[Result]) -> list[Table]:
    """Return the paper's tables that the results of one model have something to put in.

    Of several protocols of a benchmark that fit a table each gives its own rows; in the table over benchmarks
    the first counts.
    """
    tables = []
    for key, paper in paper_tables().items():
        fitting = [result for result in results if _fits(paper, result)]
        if not fitting:
            continue
        quoted = {name: tuple(cell or NONE for cell in row) for name, row in paper["rows"].items()}
        rows = [Row(f"{name} ({QUOTED})", cells, QUOTED) for name, cells in quoted.items()]
        notes = [f"Rows marked {QUOTED} are the paper's ({paper['source']}), not measured here."]
        notes += [" ".join(note.split()) for note in paper["notes"]]
        if "benchmark" not in paper:
            rows += _rows_over_benchmarks(paper, fitting, notes)
        for result in fitting if "benchmark" in paper else ():
            rows += _rows_over_groups(paper, result, notes, several=len(fitting) > 1)
        title = f"{paper['title']}, in the shape of {paper['printed_as']} of the GMAI-VL paper"
        head = ("model", *(column["short"] for column in paper["columns"]))
        tables.append(Table(f"paper_{key}", title, head, tuple(rows), tuple(dict.fromkeys(notes))))
    return tables


def _rows_over_benchmarks(
    paper: Mapping[str, Any], results: Sequence[Result], notes: list[str]
) -> list[Row]:
    """Return our row: the first result of each column's benchmark, and the mean if there are all."""
    first = {(one.benchmark, one.variant): one for one in reversed(results)}
    cells: list[Cell | None] = []
    for column in paper["columns"]:
        if "mean" in column:
            continue
        result = first.get((column["benchmark"], column["variant"]))
        cells.append(result.headline if result else None)
        if result:
            average = f"{next(iter(result.averages))} average"
            notes.append(f"{column['short']} of {_origin(result)}, {average}{_problems(result)}.")
    values = [cell.value for cell in cells if cell is not None and cell.value is not None]
    mean = sum(values) / len(values) if len(values) == len(cells) else None
    last = (percent(mean, paper["decimals"]), NONE, NONE, NONE)
    return _below(results[0].model_name, cells, paper["decimals"], last)


def _origin(result: Result, variant: str = "") -> str:
    return f"{result.model_name}: {variant}{_protocol(result)}, scorer {result.scorer}"


def _problems(result: Result) -> str:
    return "".join(f"; {problem}" for problem in result.problems)


def _rows_over_groups(
    paper: Mapping[str, Any], result: Result, notes: list[str], *, several: bool
) -> list[Row]:
    """Return our row: a cell for each group that the paper has a column of."""
    found = result.groups.get(paper["group"], {})
    groups = {_same(name): cell for name, cell in found.items()}
    known = {_same(column["name"]) for column in paper["columns"] if "name" in column}
    if other := [name for name in found if _same(name) not in known]:
        notes.append(f"Not among the paper's columns, but in the averages: {', '.join(other)}.")
    notes.append(f"{_origin(result, f'{result.variant}, protocol ')}{_problems(result)}.")
    label = f"{result.model_name}, {result.protocol}" + (f", {result.scorer}" if several else "")
    averages = {name.split()[0]: cell for name, cell in [*result.averages.items()][::-1]}
    cells = [
        None
        if one.get("variant", result.variant) != result.variant
        else groups.get(_same(one["name"]))
        if "name" in one
        else averages.get(one["average"])
        for one in paper["columns"]
    ]
    return _below(label, cells, paper["decimals"])


def _below(
    label: str, cells: Sequence[Cell | None], decimals: int, last: Sequence[str] = ()
) -> list[Row]:
    """Return our score, and below it its interval, n and unparsed share, each with a last cell."""
    shown = zip(*(_shown(cell, decimals) for cell in cells), strict=True)
    labels = {label: "score", "95 % interval": "interval", "n": "n", "unparsed %": "unparsed"}
    return [
        Row(name, (*row, *last[place : place + 1]), kind)
        for place, ((name, kind), row) in enumerate(zip(labels.items(), shown, strict=True))
    ]


def _same(name: str) -> str:
    """Compare names: the authors' files and papers write the same name with blanks, underscores or dashes."""
    return re.sub(r"[\W_]+", "", name).casefold()


# Outputs


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Write ``tables.md``, ``tables.csv`` and ``tables.tex``."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
        replace_text(folder / f"tables.{suffix}", text(tables))


def to_markdown(tables: Iterable[Table]) -> str:
    """Return tables one below the other."""
    return _rendered("tables.md.j2", tables, line=_line)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def to_csv(tables: Iterable[Table]) -> str:
    """Return all tables in one file; the first two columns say which table and which kind of line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for table in tables:
        writer.writerow(["table", "kind", *table.head])
        writer.writerows([table.key, row.kind, row.label, *row.cells] for row in table.rows)
    return out.getvalue()


def to_latex(tables: Iterable[Table]) -> str:
    """Return ``tabular`` environments for ``\\input``; they need the package booktabs."""
    return _rendered("tables.tex.j2", tables, latex=latex, **_LATEX_TAGS)


def latex(text: str) -> str:
    """Escape LaTeX's own characters."""
    return " ".join(text.split()).translate(_LATEX)


def _rendered(template: str, tables: Iterable[Table], **options: Any) -> str:
    """Fill a template in; options that are functions are its filters, others Jinja's."""
    filters = {name: one for name, one in options.items() if callable(one)}
    rest = {name: one for name, one in options.items() if name not in filters}
    templates = environment("gmai_xtuner.evaluate", **rest)
    templates.filters |= filters
    return templates.get_template(template).render(tables=list(tables))
