# SPDX-License-Identifier: Apache-2.0

"""``report.html``: one file to look at, without scripts and without anything loaded from elsewhere.

Labels, answers and addresses come from files and models that nobody here has written. Jinja2 escapes them
all, and the page's content policy forbids scripts and requests, should something slip through.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from data_tools.items import TEXT_FORMS
from data_tools.output import licences
from data_tools.output.card import FIGURES
from data_tools.output.summary import duration, writer
from data_tools.records import Record
from gmai_xtuner.core.errors import CorpusError, ImageError
from gmai_xtuner.core.imaging.images import opened
from gmai_xtuner.core.templates import environment

if TYPE_CHECKING:
    from data_tools.store import Kept

# Control characters show as their symbols; NUL may not occur in a page at all. Marks that turn the
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
        summary: as `summary.Tally` returns it.
        accepted, rejected: conversations to show, in this order.
        job: name of the job file.
    """
    page = (
        page_templates()
        .get_template("output/report.html.j2")
        .render(
            summary=summary,
            accepted=accepted,
            rejected=rejected,
            job=job,
            writer=writer(summary),
            funnels={name: funnel(source["funnel"]) for name, source in summary["sources"].items()},
            distributions=distributions(summary),
            demands=licences.DEMANDS,
        )
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def page_templates() -> Environment:
    """Return the environment for pages of this package: all is escaped, nothing of a text is invisible."""
    made = environment(
        "data_tools",
        html=True,
        finalize=lambda value: value.translate(_VISIBLE) if type(value) is str else value,
    )
    made.filters |= {
        "number": "{:,}".format,
        "share": lambda value: "–" if value is None else f"{value:.1%}",
        "duration": duration,
        "size": size,
        "web": lambda url: url if re.match(r"https?://", url) else "",
    }
    return made


def all_of(stage: Mapping[str, Any]) -> int:
    """Count what came to a stage."""
    return int(stage["count"] + stage["dropped"])


def funnel(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the stages of a source: ``stage``, ``title``, ``count`` that came through, ``drops``.

    ``width`` and ``lost`` are per cent of what came to the stage. Stages count different things (images,
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
    """Return bars of the page: ``title``, ``unit``, ``rows`` of ``name, count, share, width`` (per cent)."""
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
    """Return bytes for people: ``"812 B"``, ``"3.4 MB"``."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


THUMBNAIL_SIDE = 360  # pixels
_MOST_BOXES = 40
_MOST_TEXT = 1_500  # characters of a turn or an answer
_MOST_TURNS = 12
_SPREAD = 0x9E3779B97F4A7C15  # makes another order of an item's seed than the writers have used


class Chosen:
    """Takes every conversation in turn and keeps few, chosen by the job's seed.

    Memory is bounded by the number of keys, of sources times forms or reasons.

    Args:
        each: how many of one source and form.
    """

    def __init__(self, *, each: int = 2) -> None:
        self._each = each
        self._kept: dict[Hashable, list[tuple[int, str, Kept]]] = {}
        self._worst: dict[Hashable, int] = {}

    def add(self, kept: Kept, key: Hashable) -> None:
        """Take one conversation; of each ``key`` a few are kept."""
        rank = (kept.item.seed * _SPREAD) & 0xFFFFFFFFFFFFFFFF
        if rank >= self._worst.get(key, 1 << 64):
            return
        best = self._kept.setdefault(key, [])
        best.append((rank, kept.item.id, kept))
        best.sort(key=lambda entry: entry[:2])
        del best[self._each :]
        if len(best) == self._each:
            self._worst[key] = best[-1][0]

    def spread(self, at_most: int) -> list[Kept]:
        """Return at most so many, the first of each key before the second of any."""
        found: list[Kept] = []
        for number in range(self._each):
            for key in sorted(self._kept, key=lambda key: (self._kept[key][0][:2], str(key))):
                if number < len(self._kept[key]) and len(found) < at_most:
                    found.append(self._kept[key][number][2])
        return found


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as the report shows it.

    ``picture`` is a data address or "" for text alone; ``boxes`` are dicts of ``x, y, width, height, label,
    focus`` in pixels of the stored image.
    """

    kept: Kept
    picture: str
    boxes: list[dict[str, Any]]
    more_boxes: int
    turns: list[tuple[str, str]]
    answer: str


def example(kept: Kept, folder: Path) -> Example:
    """Make a conversation ready for the report.

    Args:
        folder: of the corpus, where ``images/`` is.
    """
    record, item = kept.record, kept.item
    with_picture = item.form not in TEXT_FORMS
    boxes = [
        {
            "x": label.box[0],
            "y": label.box[1],
            "width": label.box[2] - label.box[0],
            "height": label.box[3] - label.box[1],
            "label": label.name,
            "focus": number == item.focus,
        }
        for number, label in enumerate(record.labels)
        if label.box
    ]
    boxes.sort(key=lambda box: not box["focus"])
    turns = [(turn.speaker, clipped(turn.text)) for turn in (kept.conversation or ())[:_MOST_TURNS]]
    return Example(
        kept=kept,
        picture=thumbnail(folder, record) if with_picture else "",
        boxes=boxes[:_MOST_BOXES] if with_picture else [],
        more_boxes=max(0, len(boxes) - _MOST_BOXES) if with_picture else 0,
        turns=turns,
        answer=clipped(kept.answer),
    )


def thumbnail(folder: Path, record: Record) -> str:
    """Return the stored image, reduced, as a ``data:`` address of at most about 60 KB."""
    try:
        with opened(folder / record.image) as image:
            image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            small = image.convert("RGB")
    except ImageError as error:
        raise CorpusError(
            f"{folder / record.image}: the stored picture of {record.id!r} can't be read ({error}). "
            f"Pictures of a corpus must not be changed by hand; remove {folder / '.work'} and run the job "
            "again."
        ) from error
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def clipped(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} … ({len(text):,} characters)"
