# SPDX-License-Identifier: Apache-2.0

"""Box questions: the overlap (IoU) of the box that an answer gives with the gold box.

A scorer's name declares what the numbers are, since a box does not say it: ``box_pixels``, ``box_1000``
(thousandths of width and height), ``box_unit`` (from 0 to 1), the gold box alike; or, with the gold box in
pixels, ``box_1000_pixels`` and ``box_unit_pixels``, and the image's size in the groups ``width`` and
``height``. Each comes as ``..._acc50`` (1 from an IoU of 0.5 on) and ``..._iou``. Corners are left, top,
right, bottom. Several boxes, or a coordinate that can't be of the unit, are not understood.
"""

from __future__ import annotations

import re

from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.text import plain, without_thoughts

Box = tuple[float, ...]
_NUMBER = r"(-?(?:\d+(?:\.\d*)?|\.\d+))"
_CORNERS = re.compile(  # [x1, y1, x2, y2]; (x1, y1), (x2, y2); within <box> and <|box_start|>
    rf"(?:[\[(]|<box>|<\|box_start\|>)\s*[\[(]*\s*{_NUMBER}[\s,]+{_NUMBER}"
    rf"(?:\s*[)\]]\s*,?\s*[(\[]\s*|[\s,]+){_NUMBER}[\s,]+{_NUMBER}\s*(?:[\])]|</box>|<\|box_end\|>)"
)
_KEYED, _SIZED = (  # JSON
    re.compile(r"\W*?".join(rf"[\"'](?:{key})[\"']\s*:\s*{_NUMBER}" for key in keys.split()))
    for keys in ("x_?1|x_?min y_?1|y_?min x_?2|x_?max y_?2|y_?max", "x y w|width h|height")
)
_LARGEST = {"pixels": float("inf"), "1000": 1000.0, "unit": 1.0}


def boxes(text: str) -> set[Box]:
    """Return the different boxes that a text gives, in whatever unit."""
    text = without_thoughts(plain(text))
    found = {tuple(map(float, one)) for one in _CORNERS.findall(text) + _KEYED.findall(text)}
    sized = (map(float, one) for one in _SIZED.findall(text))
    return found | {(x, y, x + width, y + height) for x, y, width, height in sized}


def iou(one: Box, other: Box) -> float:
    """Return the area that two boxes share over the area that either covers."""
    shared = _area((*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:])))
    return shared / (_area(one) + _area(other) - shared)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _scorer(unit: str, scaled: bool, half: bool) -> Scorer:
    largest = _LARGEST[unit]

    def is_of_unit(box: Box) -> bool:
        inside = len(box) == 4 and min(box) >= 0 and max(box) <= largest and _area(box) > 0
        return inside and (unit != "pixels" or max(box) > 1)

    def gold(question: Question) -> Box:
        box: Box = tuple(map(float, re.findall(_NUMBER, question.answer or "")))
        if scaled:
            sides = [question.groups.get(name, "") for name in ("width", "height")]
            if not all(re.fullmatch(r"[1-9]\d*(?:\.0)?", side) for side in sides):
                return ()
            pairs = zip(box, map(float, sides * 2), strict=False)
            box = tuple(one * largest / side for one, side in pairs)
        return box if is_of_unit(box) else ()

    def score(question: Question, answer: str) -> Score:
        found, right = [box for box in boxes(answer) if is_of_unit(box)], gold(question)
        if len(found) != 1 or not right:
            return Score(0.0, None)
        overlap = iou(found[0], right)
        return Score(float(overlap >= 0.5) if half else overlap, str(list(found[0])))

    name = f"box_{unit}{'_pixels' if scaled else ''}_{'acc50' if half else 'iou'}"
    about = (
        f"{'IoU of 0.5 or more' if half else 'IoU'} of boxes (unit: {unit}), see docs/evaluation.md"
    )
    return Scorer(name, 1, about, score, lambda one: not one.options and bool(gold(one)))


_KINDS = (("pixels", False), ("1000", False), ("unit", False), ("1000", True), ("unit", True))
BOXES = tuple(_scorer(*kind, half) for kind in _KINDS for half in (True, False))
