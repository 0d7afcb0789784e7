"""Is the body side contradicted? "The upper left of the image" is a position and says nothing of the body."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_tools.checks.said import Said
from data_tools.items import Item, Problem
from data_tools.records import Record

KEYS = ("side", "laterality")
_SIDES = {
    "left": "left", "l": "left", "左": "left", "左侧": "left",
    "right": "right", "r": "right", "右": "right", "右侧": "right",
}  # fmt: skip
_POSITION_BEFORE = frozenset(
    (
        "upper",
        "lower",
        "top",
        "bottom",
        "center",
        "centre",
        "middle",
        "far",
        "viewer",
        "reader",
        "mid",
        "to",
    )
)
_PICTURE = frozenset(
    (
        "image", "picture", "frame", "photograph", "photo", "field", "view", "figure", "tile", "crop",
        "slide", "corner", "edge", "border", "margin", "half", "third", "quadrant", "part", "portion",
        "region", "area",
    )
)  # fmt: skip
_POSITION_ZH = re.compile(
    r"(?:图像|图片|画面|影像|视野|图中|图)的?[中最偏]?[上下]?[左右][上下]?[侧边方半部角]*|[左右][上下](?:[方角部]|象限)?|[上下中][左右]"
)


def side(what: Said, item: Item, record: Record) -> Iterator[Problem]:
    """A side that isn't the annotation's, in an answer about a record with exactly one side."""
    labels = record.labels if item.focus is None else (record.labels[item.focus],)
    known = {
        _SIDES[value.strip().lower()]
        for attributes in (record.attributes, *(label.attributes for label in labels))
        for key, value in attributes.items()
        if key in KEYS and value.strip().lower() in _SIDES
    }
    if len(known) != 1:
        return
    (right_one,) = known
    wrong = "right" if right_one == "left" else "left"
    words = what.words
    claims = [
        word for at, word in enumerate(words) if word in ("left", "right") and _is_body(words, at)
    ]
    if not what.text.isascii():
        plain = _POSITION_ZH.sub("", what.text)
        claims += ["left"] * plain.count("左") + ["right"] * plain.count("右")
    if wrong in claims and right_one not in claims:
        yield Problem("side contradicted", f"it says {wrong}; it is {right_one}")


def _is_body(words: list[str], at: int) -> bool:
    """Whether the word at a place names a side of the body."""
    if at and (words[at - 1] in _POSITION_BEFORE or words[at - 2 : at] == ["to", "the"]):
        return False
    for offset, word in enumerate(words[at + 1 : at + 6]):
        if word in _PICTURE and (
            offset == 0 or words[at + 1] in ("side", "hand", "of", "most", "half")
        ):
            return False
        if not word.isalnum():
            break
    return True
