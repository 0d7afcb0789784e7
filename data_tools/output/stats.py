"""``--stats``: a corpus in a terminal's width."""

from __future__ import annotations

from typing import Any

_WIDTH = 100
_NAME = 34
_BAR = 30


def lines(summary: dict[str, Any]) -> list[str]:
    """The values of ``summary.json`` as text, at most 100 characters a line but for warnings."""
    records, conversations, usage = summary["records"], summary["conversations"], summary["usage"]
    found = [
        _printable(summary["title"]),
        f"  {records['count']:,} records of {records['pictures']:,} pictures, "
        f"{records['held_out']:,} records held out",
        f"  {conversations['count']:,} conversations, {conversations['held_out']:,} held out; "
        f"{conversations['rejected']:,} rejected ({_share(conversations['acceptance'])} accepted)",
        "  " + writer(summary),
        f"  {usage['requests']:,} requests, {usage['cached']:,} answered from the cache, "
        f"${usage['dollars']:,.2f}, {duration(usage['seconds'])}",
        "",
        f"{'source':<{_NAME}}{'records':>10}{'conversations':>15}{'rejected':>10}{'accepted':>10}",
    ]
    for name, source in summary["sources"].items():
        found.append(
            f"{_cut(name):<{_NAME}}{source['records']:>10,}{source['conversations']:>15,}"
            f"{source['rejected']:>10,}{_share(source['acceptance']):>10}"
        )
        found += [
            f"  {_cut(row['stage'] + ': ' + row['reason'], 62):<62}{row['count']:>12,}"
            for row in source["funnel"]
            if row["reason"]
        ]
        if name in summary["left_out"]:
            found.append(f"  left out: {_printable(summary['left_out'][name]['reason'])}")
    for title, counts in (
        ("form", conversations["form"]),
        ("language", conversations["language"]),
        ("modality", records["modality"]),
        ("original task", records["source_task"]),
        ("department", records["department"]),
        ("clinical task", records["clinical_task"]),
    ):
        found += ["", title, *_bars(counts)]
    if summary["warnings"]:
        found += ["", "to look at", *(f"  - {_printable(text)}" for text in summary["warnings"])]
    return found


def writer(summary: dict[str, Any]) -> str:
    """Who wrote the conversations, such as ``"written by openai (some-model)"``."""
    model = summary["writer"].get("model")
    return f"written by {summary['writer']['name']}" + (f" ({_printable(model)})" if model else "")


def duration(seconds: float) -> str:
    """``"3 s"``, ``"4 min 10 s"``, ``"2 h 5 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bars(counts: dict[str, int]) -> list[str]:
    total, largest = sum(counts.values()), max(counts.values(), default=1)
    return [
        f"  {_cut(name):<{_NAME}}{count:>10,}{count / total:>8.1%}  {'#' * round(_BAR * count / largest)}"
        for name, count in counts.items()
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _cut(text: str, width: int = _NAME - 2) -> str:
    text = _printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _printable(text: str) -> str:
    """Without control characters, which could move the terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)
