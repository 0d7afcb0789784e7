# SPDX-License-Identifier: Apache-2.0

"""``report.html``: one file to look at, without scripts and without anything loaded from elsewhere.

Labels, answers and addresses come from files and models that nobody here has written. Jinja2 escapes them
all, and the page's content policy forbids scripts and requests, should something slip through.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from data_tools import licences
from data_tools.items import TEXT_FORMS
from data_tools.output import stored_image, templates
from data_tools.output.summary import FIGURES
from data_tools.records import Label
from data_tools.store import StoredConversation

_STAGES = {
    "read": "read",
    "clean": "kept by cleaning",
    "record": "records",
    "write": "texts written",
    "check": "texts accepted",
}
THUMBNAIL_SIDE = 360  # pixels
_MOST_TEXT = 1_500  # characters of a turn or an answer
_SPREAD = 0x9E3779B97F4A7C15  # makes another order of an item's seed than the writers have used


def write(
    folder: Path,
    summary: Mapping[str, Any],
    *,
    images: Path,
    accepted: Sequence[StoredConversation],
    rejected: Sequence[StoredConversation],
    job: str,
) -> None:
    """Write ``report.html`` into ``folder``, with these conversations in this order.

    ``images`` is the corpus folder with the stored images, ``job`` the name of the job file.
    """
    made = templates(html=True)
    made.filters["clip"] = clipped
    page = made.get_template("output/report.html.j2").render(
        summary=summary,
        accepted=accepted,
        rejected=rejected,
        job=job,
        funnel=funnel,
        figures=FIGURES,
        demands=licences.DEMANDS,
        regions=regions,
        thumbnail=lambda kept: thumbnail(images, kept),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def funnel(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the stages of a source: ``title``, ``count`` that came through, ``drops``, ``dropped``.

    ``width`` and ``lost`` are per cent of what came to the stage. Stages count different things (images,
    regions, conversations), so bars of two stages can't be compared.
    """
    stages = []
    for stage, of_stage in groupby(rows, key=lambda row: row["stage"]):
        of = list(of_stage)
        drops = [row for row in of if row["reason"]]
        total, dropped = (sum(row["count"] for row in some) for some in (of, drops))
        # Sets of classes have no regions: a nought would look like a loss.
        if total or stage != "clean":
            stages.append(
                {
                    "title": _STAGES[stage],
                    "count": total - dropped,
                    "drops": drops,
                    "dropped": dropped,
                    "width": 100 * (total - dropped) / max(total, 1),
                    "lost": 100 * dropped / max(total, 1),
                }
            )
    return stages


class Chosen:
    """Takes every conversation in turn and keeps few of a source and form, chosen by the job's seed.

    Memory is bounded by the number of keys, of sources times forms or reasons.
    """

    def __init__(self, *, each: int = 2) -> None:
        self._each = each
        self._kept: defaultdict[Hashable, list[tuple[int, str, StoredConversation]]] = defaultdict(
            list
        )

    def add(self, kept: StoredConversation, key: Hashable) -> None:
        """Take one conversation; of each ``key`` those of lowest rank are kept."""
        rank = (kept.item.seed * _SPREAD) & 0xFFFFFFFFFFFFFFFF
        best = self._kept[key]
        push = heapq.heappush if len(best) < self._each else heapq.heappushpop
        push(best, (-rank, kept.item.id, kept))

    def spread(self, at_most: int) -> list[StoredConversation]:
        """Return at most so many, the first of each key before the second of any."""
        ranked = sorted(
            (sorted(best, reverse=True) for best in self._kept.values()),
            key=lambda best: (-best[0][0], best[0][1]),
        )
        found = [best[at][2] for at in range(self._each) for best in ranked if at < len(best)]
        return found[:at_most]


def regions(kept: StoredConversation) -> list[tuple[Label, bool]]:
    """Return the labels with a box, and whether the text is about them; these first."""
    boxed = [
        (label, at == kept.item.focus) for at, label in enumerate(kept.record.labels) if label.box
    ]
    return [] if kept.item.form in TEXT_FORMS else sorted(boxed, key=lambda pair: not pair[1])


def thumbnail(folder: Path, kept: StoredConversation) -> str:
    """Return the stored image, reduced, as a ``data:`` address of at most about 60 KB; "" for text alone."""
    if kept.item.form in TEXT_FORMS:
        return ""
    data = io.BytesIO()
    with stored_image(folder / kept.record.image) as image:
        image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.convert("RGB").save(data, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def clipped(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} … ({len(text):,} characters)"
