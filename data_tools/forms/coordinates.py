# SPDX-License-Identifier: Apache-2.0

"""How a box is written in a conversation: ``[x1, y1, x2, y2]`` in thousandths.

The numbers are whole thousandths of the width and height of the stored image itself, 0 to 1000, left and
upper edge first. They are neither pixels nor refer to the square that training pads an image to:
the same text is right for images that are padded and for images that are stretched, at any resolution, and
whoever holds the image can draw the box. A box of the record is half-open: ``x2 = 1000`` is the right edge.

Boxes are rounded outwards: the written box holds the whole region and never has a size of zero. For sides
of up to 1000 pixels the way back gives exactly the same box, for longer ones the smallest difference is a
thousandth.
"""

from __future__ import annotations

import re

from data_tools.records import Box

SCALE = 1000
_BOX = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]")


def write_box(box: Box, *, width: int, height: int) -> str:
    """Return ``(x1, y1, x2, y2)``, pixels of a ``width`` x ``height`` image, as text.

    >>> write_box((0, 10, 320, 480), width=640, height=480)
    '[0, 20, 500, 1000]'
    """
    x1, y1, x2, y2 = box
    return (
        f"[{x1 * SCALE // width}, {y1 * SCALE // height}, "
        f"{-(-x2 * SCALE // width)}, {-(-y2 * SCALE // height)}]"
    )


def thirds(box: Box, width: int, height: int) -> tuple[int, int]:
    """Return in which third across and down the centre of a box lies, 0 to 2."""
    across = (box[0] + box[2]) * 3 // (2 * width)
    down = (box[1] + box[3]) * 3 // (2 * height)
    return min(across, 2), min(down, 2)


_ROWS, _COLUMNS = ("upper", "", "lower"), ("left", "", "right")


def place_of(box: Box, width: int, height: int) -> str:
    """Return where a box lies, as a key of the language files.

    Of small boxes it is the third that the centre is in: ``upper left``, ``right``, ``centre``. A box of
    about half the image has no such place: ``all``, ``half left``, ``half upper left``, ``half centre``, or
    ``across upper`` and ``down left`` for long and narrow ones.
    """
    shares = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    if min(shares) >= 0.8:
        return "all"
    if min(shares) >= 0.4 and max(shares) >= 0.5:
        across = _lopsided(box[0] / width, box[2] / width)
        down = _lopsided(box[1] / height, box[3] / height)
        return f"half {_name(across, down)}"
    across, down = thirds(box, width, height)
    if max(shares) < 0.6:
        return _name(across, down)
    return f"across {_name(1, down)}" if shares[0] > shares[1] else f"down {_name(across, 1)}"


def _name(across: int, down: int) -> str:
    return f"{_ROWS[down]} {_COLUMNS[across]}".strip() or "centre"


def _lopsided(first: float, last: float) -> int:
    """Return in which half an interval of 0 to 1 mainly lies: 0, 2, or 1 for neither."""
    more = min(last, 0.5) - min(first, 0.5) - max(last, 0.5) + max(first, 0.5)
    return 0 if more >= 0.2 else 2 if more <= -0.2 else 1


def read_boxes(text: str, *, width: int, height: int) -> list[Box]:
    """Return all boxes of a text in their order, in pixels. The inverse of `write_box`.

    A `ValueError` for four numbers in brackets that are no box: beyond 1000, or not in ascending order.
    """
    boxes = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = map(int, match.groups())
        if not (x1 < x2 <= SCALE and y1 < y2 <= SCALE):
            raise ValueError(
                f"{match[0]} is no box: expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2, 0 to {SCALE}"
            )
        left, top = -(-x1 * width // SCALE), -(-y1 * height // SCALE)
        boxes.append((left, top, x2 * width // SCALE, y2 * height // SCALE))
    return boxes
