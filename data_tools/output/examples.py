"""Which conversations the report shows: a few of every source and form, chosen by the job's seed.

Memory is bounded by the number of sources times the number of forms (of reasons, for rejected ones).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from data_tools.items import TEXT_FORMS
from data_tools.records import Record
from gmai_xtuner.core.errors import CorpusError

if TYPE_CHECKING:
    from data_tools.store import Kept

THUMBNAIL_SIDE = 360  # pixels
_MOST_BOXES = 40
_MOST_TEXT = 1_500  # characters of a turn or an answer
_MOST_TURNS = 12
_SPREAD = 0x9E3779B97F4A7C15  # makes another order of an item's seed than the writers have used


class Chosen:
    """Takes every conversation in turn, keeps few.

    Args:
        each: how many of one source and form.
    """

    def __init__(self, *, each: int = 2) -> None:
        self._each = each
        self._kept: dict[Hashable, list[tuple[int, str, Kept]]] = {}
        self._worst: dict[Hashable, int] = {}

    def add(self, kept: Kept, key: Hashable) -> None:
        """One conversation; of each ``key`` a few are kept."""
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
        """At most so many, the first of each key before the second of any; sorted by key within a round."""
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
    focus`` in pixels of the stored picture.
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
    """The stored picture, reduced, as a ``data:`` address of at most about 60 KB."""
    try:
        with Image.open(folder / record.image) as image:
            image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            small = image.convert("RGB")
    except OSError as error:
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
