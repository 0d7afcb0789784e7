"""Results -> tables: in the shape of the paper's, with its rows quoted; by each group; in short."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gmai_xtuner.evaluate.paper_rows import Column, PaperTable, paper_tables
from gmai_xtuner.evaluate.results import Cell, Result

NONE = "–"
QUOTED = "quoted"
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table.

    Args:
        label: its first cell.
        cells: the others, as shown.
        kind: ``quoted`` from a paper, ``score`` of ours, ``group`` for one of many, or what stands below a
            score: ``interval``, ``n``, ``unparsed``.
    """

    label: str
    cells: tuple[str, ...]
    kind: str = "score"


@dataclass(frozen=True, slots=True)
class Table:
    """A table for any output.

    Args:
        key: short name, unique in a report.
        title: what it is.
        head: headings, that of the labels first.
        rows: its lines.
        notes: what stands below it.
    """

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def summary_table(results: Sequence[Result]) -> Table:
    """One line a result."""
    rows = []
    for result in results:
        cell = result.headline
        others = [
            f"{name} {percent(other.value)}"
            for name, other in list(result.averages.items())[1:]
            if other.value is not None
        ]
        rows.append(
            Row(
                f"{result.benchmark} {result.variant}",
                (
                    f"{result.protocol}/{result.version}",
                    result.scorer,
                    next(iter(result.averages)),
                    percent(cell.value),
                    interval(cell),
                    ", ".join(others) or NONE,
                    _n(result),
                    percent(cell.unparsed),
                ),
            )
        )
    notes = [
        f"{result.benchmark} {result.variant}, {result.protocol}: {problem}."
        for result in results
        for problem in result.problems
    ]
    head = (
        "benchmark",
        "protocol",
        "scorer",
        "average",
        "score %",
        "95 % interval",
        "other averages",
        "n",
        "unparsed %",
    )
    return Table("summary", "Results", head, tuple(rows), tuple(dict.fromkeys(notes)))


def group_tables(result: Result) -> list[Table]:
    """One table for each group that the protocol names."""
    tables = []
    for key, cells in result.groups.items():
        rows = [_long_row(name or "(none given)", cell, "group") for name, cell in cells.items()]
        rows += [_long_row(name, cell) for name, cell in result.averages.items()]
        tables.append(
            Table(
                _key(key),
                f"{result.benchmark} {result.variant} by {key}: {result.protocol}/{result.version}, "
                f"{result.scorer}",
                (key, "n", "score %", "95 % interval", "unparsed %"),
                tuple(rows),
                tuple(f"{problem}." for problem in result.problems),
            )
        )
    return tables


def _long_row(name: str, cell: Cell, kind: str = "score") -> Row:
    cells = (str(cell.n), percent(cell.value), interval(cell), percent(cell.unparsed))
    return Row(name, cells, kind)


def tables_like_the_papers(results: Sequence[Result]) -> list[Table]:
    """The paper's tables that the results have something to put in.

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
    cells: list[Cell | None] = []
    for column in paper.columns:
        if column.mean:
            continue
        result = next(
            (
                one
                for one in results
                if (one.benchmark, one.variant) == (column.benchmark, column.variant)
            ),
            None,
        )
        cells.append(result.headline if result else None)
        if result:
            notes.append(
                f"{column.short} of {result.model_name}: {result.protocol}/{result.version}, scorer "
                f"{result.scorer}, {next(iter(result.averages))} average"
                + "".join(f"; {problem}" for problem in result.problems)
                + "."
            )
    values = [cell.value for cell in cells if cell is not None and cell.value is not None]
    mean = sum(values) / len(values) if len(values) == len(cells) else None
    shown = [percent(cell.value, paper.decimals) if cell else NONE for cell in cells]
    rows = _below(results[0].model_name, shown, cells, paper.decimals)
    ends = [percent(mean, paper.decimals), *[NONE] * (len(rows) - 1)]
    return [
        Row(row.label, (*row.cells, end), row.kind) for row, end in zip(rows, ends, strict=True)
    ]


def _rows_over_groups(
    paper: PaperTable, result: Result, notes: list[str], *, several: bool
) -> list[Row]:
    groups = {_same(name): cell for name, cell in result.groups.get(str(paper.group), {}).items()}
    cells = [_cell(column, result, groups) for column in paper.columns]
    known = {_same(column.name) for column in paper.columns if column.name}
    other = [name for name in result.groups.get(str(paper.group), {}) if _same(name) not in known]
    if other:
        notes.append(f"Not among the paper's columns, but in the averages: {', '.join(other)}.")
    notes.append(
        f"{result.model_name}: {result.variant}, protocol {result.protocol}/{result.version}, scorer "
        f"{result.scorer}" + "".join(f"; {problem}" for problem in result.problems) + "."
    )
    shown = [percent(cell.value, paper.decimals) if cell else NONE for cell in cells]
    label = f"{result.model_name}, {result.protocol}"
    if several:
        label += f", {result.scorer}"
    return _below(label, shown, cells, paper.decimals)


def _cell(column: Column, result: Result, groups: dict[str, Cell]) -> Cell | None:
    if column.variant is not None and column.variant != result.variant:
        return None
    if column.name is not None:
        return groups.get(_same(column.name))
    for name, cell in result.averages.items():
        if name.split()[0] == column.average:
            return cell
    return None


def _below(
    label: str, shown: Sequence[str], cells: Sequence[Cell | None], decimals: int
) -> list[Row]:
    """Our score with its interval, n and unparsed share."""
    return [
        Row(label, tuple(shown)),
        Row(
            "95 % interval",
            tuple(interval(cell, decimals) if cell else NONE for cell in cells),
            "interval",
        ),
        Row("n", tuple(str(cell.n) if cell else NONE for cell in cells), "n"),
        Row(
            "unparsed %",
            tuple(percent(cell.unparsed, decimals) if cell else NONE for cell in cells),
            "unparsed",
        ),
    ]


def percent(value: float | None, decimals: int = 2) -> str:
    return NONE if value is None else f"{100 * value:.{decimals}f}"


def interval(cell: Cell, decimals: int = 2) -> str:
    ends = cell.interval
    if ends is None:
        return NONE
    return f"{100 * ends.low:.{decimals}f} to {100 * ends.high:.{decimals}f}"


def _n(result: Result) -> str:
    wanted = result.expected if result.expected is not None else result.selected
    return str(result.n) if result.n == wanted else f"{result.n} of {wanted}"


def _same(name: str | None) -> str:
    """The authors' files and papers write the same name with blanks, underscores or dashes."""
    return re.sub(r"[\W_]+", "", name or "").casefold()


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name).strip("_").lower()


def to_markdown(tables: Iterable[Table]) -> str:
    """Tables one below the other."""
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
    """All tables in one file; the first two columns say which table and which kind of line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for table in tables:
        writer.writerow(["table", "kind", *table.head])
        for row in table.rows:
            writer.writerow([table.key, row.kind, row.label, *row.cells])
    return out.getvalue()


def to_latex(tables: Iterable[Table]) -> str:
    """``tabular`` environments for ``\\input``; they need the package booktabs."""
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
    """Text with LaTeX's own characters escaped."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
