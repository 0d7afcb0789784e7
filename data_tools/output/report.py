"""``report.html``: one file to look at, without scripts and without anything loaded from elsewhere.

Labels, answers and addresses come from files and models that nobody here has written. Jinja2 escapes them
all, and the page's content policy forbids scripts and requests, should something slip through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from data_tools.output import licences, stats
from data_tools.output.examples import Example
from data_tools.output.figures import FIGURES

# Control characters show as their pictures; NUL may not occur in a page at all. Marks that turn the
# direction of writing show as a replacement character: they could make an answer read otherwise.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)}
_VISIBLE |= {127: 0x2421, **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
_STAGES = {
    "read": "read",
    "clean": "kept by cleaning",
    "record": "records",
    "write": "texts written",
    "check": "texts accepted",
}


def write(
    folder: Path,
    summary: dict[str, Any],
    *,
    accepted: Sequence[Example],
    rejected: Sequence[Example],
    job: str,
) -> None:
    """Write ``report.html``.

    Args:
        folder: where the corpus is being written.
        summary: of `summary.Tally`.
        accepted, rejected: conversations to show, in this order.
        job: name of the job file.
    """
    page = (
        environment()
        .get_template("output/report.html.j2")
        .render(
            summary=summary,
            accepted=accepted,
            rejected=rejected,
            job=job,
            writer=stats.writer(summary),
            funnels={name: funnel(source["funnel"]) for name, source in summary["sources"].items()},
            distributions=distributions(summary),
            demands=licences.DEMANDS,
        )
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def environment() -> Environment:
    """For pages of this package: everything is escaped, nothing of a text is invisible."""
    made = Environment(
        loader=PackageLoader("data_tools", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.translate(_VISIBLE) if type(value) is str else value,
    )
    made.filters |= {
        "number": "{:,}".format,
        "share": lambda value: "–" if value is None else f"{value:.1%}",
        "duration": stats.duration,
        "size": size,
        "web": lambda url: url if re.match(r"https?://", url) else "",
    }
    return made


def all_of(stage: Mapping[str, Any]) -> int:
    """What came to a stage."""
    return int(stage["count"] + stage["dropped"])


def funnel(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages of a source in their order: ``stage``, ``title``, ``count`` that came through, ``drops``.

    ``width`` and ``lost`` are per cent of what came to the stage. Stages count different things (pictures,
    regions, conversations), so bars of two stages can't be compared.
    """
    stages: dict[str, dict[str, Any]] = {}
    for row in rows:
        stage = stages.setdefault(
            row["stage"],
            {
                "stage": row["stage"],
                "title": _STAGES.get(row["stage"], row["stage"]),
                "count": 0,
                "drops": [],
            },
        )
        if row["reason"]:
            stage["drops"].append(row)
        else:
            stage["count"] += row["count"]
    for stage in stages.values():
        stage["dropped"] = sum(drop["count"] for drop in stage["drops"])
        all_of_it = all_of(stage)
        stage["width"] = 100 * stage["count"] / all_of_it if all_of_it else 0
        stage["lost"] = 100 * stage["dropped"] / all_of_it if all_of_it else 0
    # Sets of classes have no regions: a nought would look like a loss.
    return [stage for stage in stages.values() if stage["stage"] != "clean" or all_of(stage)]


def distributions(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of the page: ``title``, ``unit``, ``rows`` of ``name, count, share, width`` (per cent)."""
    records, conversations = summary["records"], summary["conversations"]
    found = []
    for title, unit, counts in (
        *((title, "records", records[key]) for key, title in FIGURES.items()),
        ("Form", "conversations", conversations["form"]),
        ("Language", "conversations", conversations["language"]),
        ("Kind of perception", "conversations", conversations["kind"]),
    ):
        total, largest = sum(counts.values()), max(counts.values(), default=1)
        rows = [
            {"name": name, "count": n, "share": n / total, "width": 100 * n / largest}
            for name, n in counts.items()
        ]
        if rows:
            found.append({"title": title, "unit": unit, "rows": rows})
    return found


def size(count: int) -> str:
    """Bytes for people: ``"812 B"``, ``"3.4 MB"``."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
