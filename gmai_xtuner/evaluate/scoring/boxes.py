# SPDX-License-Identifier: Apache-2.0

"""Box questions: the overlap (IoU) of the boxes that an answer gives with the gold boxes.

A scorer's name declares what the numbers are, since a box does not say it: ``box_pixels``, ``box_1000``
(thousandths of width and height), ``box_unit`` (from 0 to 1), the gold box alike; or, with the gold box in
pixels, ``box_1000_pixels`` and ``box_unit_pixels``, and the image's size in the groups ``width`` and
``height``. Each comes as ``..._acc50`` (1 from an IoU of 0.5 on) and ``..._iou``. Corners are left, top,
right, bottom. A coordinate that can't be of the unit is not understood, nor are several boxes where one is
gold.

Of several gold boxes each is matched with at most one box of the answer so that the sum of IoUs is largest,
as SA-Co does in lmms-eval 0.7.3 (``tasks/saco/utils.py``). ``..._iou`` is twice that sum over the number of
boxes of both, so that a box too many or too few costs; ``..._acc50`` is 1 where each box of both has a
partner with an IoU of 0.5 (GREC's "F1 = 1", arXiv 2308.16182).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

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


def matched(found: Sequence[Box], right: Sequence[Box]) -> list[float]:
    """Return the IoU of each pair, one to one, where the sum of them is largest."""
    if len(found) == len(right) == 1:
        return [iou(found[0], right[0])]
    from scipy.optimize import linear_sum_assignment  # where needed: it takes a fifth of a second

    overlaps = np.array([[iou(one, other) for other in right] for one in found])
    return list(map(float, overlaps[linear_sum_assignment(overlaps, maximize=True)]))


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _scorer(unit: str, scaled: bool, half: bool) -> Scorer:
    largest = _LARGEST[unit]

    def is_of_unit(box: Box) -> bool:
        inside = len(box) == 4 and min(box) >= 0 and max(box) <= largest and _area(box) > 0
        return inside and (unit != "pixels" or max(box) > 1)

    def gold(question: Question) -> list[Box]:
        """Return the gold boxes; none where one of them can't be of the unit."""
        numbers = list(map(float, re.findall(_NUMBER, question.answer or "")))
        if len(numbers) > 4 and re.search("[A-Za-z]", question.answer or ""):
            return []  # "2 nodules: ...": not every number is a coordinate
        sizes = [1.0, 1.0]
        if scaled:
            sides = [question.groups.get(name, "") for name in ("width", "height")]
            if not all(re.fullmatch(r"[1-9]\d*(?:\.0)?", side) for side in sides):
                return []
            sizes = [float(side) / largest for side in sides]
        numbers = [one / sizes[place % 2] for place, one in enumerate(numbers)]
        found = [tuple(numbers[start : start + 4]) for start in range(0, len(numbers), 4)]
        return list(dict.fromkeys(found)) if all(map(is_of_unit, found)) else []

    def score(question: Question, answer: str) -> Score:
        found, right = sorted(boxes(answer)), gold(question)
        if len(right) < 2:
            found = [box for box in found if is_of_unit(box)]
        if not found or not all(map(is_of_unit, found)) or (len(right) < 2 and len(found) != 1):
            return Score(0.0, None)
        pairs = matched(found, right)
        whole = len(pairs) == len(found) == len(right) and min(pairs) >= 0.5
        shared = 2 * sum(pairs) / (len(found) + len(right))
        return Score(float(whole) if half else shared, ", ".join(str(list(box)) for box in found))

    name = f"box_{unit}{'_pixels' if scaled else ''}_{'acc50' if half else 'iou'}"
    measure = "IoU of 0.5 or more" if half else "IoU"
    of = "pixels" if scaled else unit
    about = f"{measure}; the gold answer is a box or several, of four numbers each, unit: {of}"
    return Scorer(name, 2, about, score, lambda one: not one.options and bool(gold(one)))


_KINDS = (("pixels", False), ("1000", False), ("unit", False), ("1000", True), ("unit", True))
BOXES = tuple(_scorer(*kind, half) for kind in _KINDS for half in (True, False))
