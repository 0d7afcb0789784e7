# SPDX-License-Identifier: Apache-2.0

"""Boxes in an answer -> rectangles on a copy of the image.

The corpus builder writes ``[x1, y1, x2, y2]`` in whole thousandths of width and height; that is what whole
numbers mean here, unless one is over 1000 and all lie within the image: those are pixels. Numbers up to 1 are
fractions, other decimals pixels. The unit is found from all boxes of an answer together, or chosen. Read are
``[x1, y1, x2, y2]``, ``(x1, y1, x2, y2)`` and ``(x1, y1), (x2, y2)``, with Chinese punctuation too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

Unit = Literal["thousandths", "pixels", "fractions"]
UNITS: tuple[Unit, ...] = ("thousandths", "pixels", "fractions")
COLOURS = ("#ffd400", "#00e5ff", "#ff5dd1", "#7dff5a", "#ff9a3c", "#b59bff")

MAX_BOXES = 50
"""Drawn on one picture; a model that repeats itself writes hundreds."""

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_FOUR = ",".join([_NUMBER] * 4)
_BOX = re.compile(
    rf"\[{_FOUR}\]|\({_FOUR}\)|[(\[]{_NUMBER},{_NUMBER}[)\]]\s*,?\s*[(\[]{_NUMBER},{_NUMBER}[)\]]"
)
_ASCII = str.maketrans("，、（）【】［］－", ",,()[][]-")


class Box(NamedTuple):
    """A box that can be drawn: x1, y1, x2, y2 in pixels within the image, and what the answer says.

    ``clipped``: a part lay outside the image.
    """

    corners: tuple[float, float, float, float]
    text: str
    clipped: bool


class BadBox(NamedTuple):
    """Four numbers that are no box; the reason is ``box_order``, ``box_outside`` or ``box_too_many``."""

    text: str
    reason: str


class Boxes(NamedTuple):
    """All boxes of an answer, in its order; what the numbers were taken for, None if there are none."""

    drawn: tuple[Box, ...]
    ignored: tuple[BadBox, ...]
    unit: Unit | None


def read_boxes(text: str, *, width: int, height: int, unit: Unit | None = None) -> Boxes:
    """Return the boxes of an answer on an image of this size in pixels; ``unit`` None finds it out."""
    found = []
    for match in _BOX.finditer(text.translate(_ASCII)):
        numbers = [group for group in match.groups() if group is not None]
        found.append((text[match.start() : match.end()], numbers))
    if not found:
        return Boxes((), (), None)
    unit = unit or _unit_of(
        [number for _, numbers in found for number in numbers], longest=max(width, height)
    )
    across, down = {
        "thousandths": (width / 1000, height / 1000),
        "fractions": (float(width), float(height)),
        "pixels": (1.0, 1.0),
    }[unit]
    drawn, ignored = list[Box](), list[BadBox]()
    for written, numbers in found:
        x1, y1, x2, y2 = (float(number) for number in numbers)
        if not (x1 < x2 and y1 < y2):
            ignored.append(BadBox(written, "box_order"))
            continue
        left, top, right, bottom = corners = (x1 * across, y1 * down, x2 * across, y2 * down)
        inside = (
            max(0.0, left),
            max(0.0, top),
            min(float(width), right),
            min(float(height), bottom),
        )
        if not (inside[0] < inside[2] and inside[1] < inside[3]):
            ignored.append(BadBox(written, "box_outside"))
        elif len(drawn) == MAX_BOXES:
            ignored.append(BadBox(written, "box_too_many"))
        else:
            drawn.append(Box(inside, written, inside != corners))
    return Boxes(tuple(drawn), tuple(ignored), unit)


def _unit_of(numbers: Sequence[str], *, longest: int) -> Unit:
    largest = max(abs(float(number)) for number in numbers)
    if largest <= 1:
        return "fractions"
    whole = not any("." in number for number in numbers)
    if whole and (largest <= 1000 or largest > longest):
        return "thousandths"
    return "pixels"


def draw_boxes(image: Image.Image, boxes: Sequence[Box], *, least_side: int = 512) -> Image.Image:
    """Return a copy of an RGB image with numbered boxes.

    An image smaller than ``least_side`` is enlarged by a whole factor, as far as it fits into so many pixels,
    else a line hides what it is drawn around.
    """
    factor = max(1, least_side // max(image.size))
    size = (image.width * factor, image.height * factor)
    copy = image.resize(size, Image.Resampling.NEAREST).convert("RGB")
    pen = ImageDraw.Draw(copy)
    line = max(2, round(max(copy.size) / 256))
    font = ImageFont.load_default(size=max(12, round(max(copy.size) / 36)))
    for number, box in enumerate(boxes):
        colour = COLOURS[number % len(COLOURS)]
        x1, y1, x2, y2 = (value * factor for value in box.corners)
        left, upper = round(x1), round(y1)
        # Corners are the edges of a half-open box: the last pixel inside is one less.
        last = max(left, round(x2) - 1), max(upper, round(y2) - 1)
        pen.rectangle((left, upper, *last), outline=colour, width=line)
        label = str(number + 1)
        x, y, right, bottom = pen.textbbox((0, 0), label, font=font)
        tag_width, tag_height = right - x + 2 * line + 4, bottom - y + 2 * line + 4
        at_x = min(left, copy.width - tag_width)
        at_y = upper - tag_height if upper >= tag_height else upper
        pen.rectangle((at_x, at_y, at_x + tag_width, at_y + tag_height), fill=colour)
        pen.text((at_x + line + 2 - x, at_y + line + 2 - y), label, fill="black", font=font)
    return copy
