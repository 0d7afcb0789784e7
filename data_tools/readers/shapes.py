# SPDX-License-Identifier: Apache-2.0

"""Numbers of annotation files, never trusted: polygons and COCO's run-length codes -> masks by pycocotools.

pycocotools is C: it allocates what a polygon's coordinates ask for, and takes four numbers for a box.
``H`` and ``W`` are the image's height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_tools.preprocess.rules import Rules, resolve
from gmai_xtuner.core.errors import Unusable


def numbers(texts: Mapping[str, object]) -> dict[str, float]:
    """Return each value as a finite number.

    Raises:
        ValueError: one is none; the text names it.
    """
    found = {}
    for key, value in texts.items():
        try:
            number = float(str(value).strip())
        except ValueError:
            raise ValueError(f"{key} is {value!r}, which is no number") from None
        if not np.isfinite(number):
            raise ValueError(f"{key} is {value!r}, which is no finite number")
        found[key] = number
    return found


Corners = list[tuple[float, float]]


def turned(box: tuple[float, float, float, float], degrees: object) -> Corners:
    """Return the corners of a rectangle that is turned clockwise about its centre, as CVAT stores it.

    Raises:
        Unusable: the angle is no number.
    """
    try:
        angle = math.radians(numbers({"rotation": degrees})["rotation"])
    except ValueError as error:
        raise Unusable("box that can't be read", str(error)) from error
    x1, y1, x2, y2 = box
    x, y, sine, cosine = (x1 + x2) / 2, (y1 + y2) / 2, math.sin(angle), math.cos(angle)
    around = [(x1 - x, y1 - y), (x2 - x, y1 - y), (x2 - x, y2 - y), (x1 - x, y2 - y)]
    return [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in around]


def upright_box(corners: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Return the upright box around points."""
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def polygon_mask(polygons: Sequence[Any], size: tuple[int, int], clean: str | Rules) -> np.ndarray:
    """Return bool ``[H, W]``: the union of polygons.

    Args:
        polygons: each ``[x, y, x, y, ...]`` in pixels.
        size: width and height.
        clean: of the source; says whether a polygon may reach over the edge.

    Raises:
        Unusable: fewer than three corners, no number, or outside the image.
    """
    from pycocotools import mask as codes

    width, height = size
    for polygon in polygons:
        try:
            values = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise Unusable("polygon that can't be read", str(error)) from error
        if values.ndim != 1 or len(values) < 6 or len(values) % 2 or not np.isfinite(values).all():
            raise Unusable(
                "polygon that can't be read",
                f"{values.size} values, where at least three pairs of numbers are expected",
            )
        x, y = values[::2], values[1::2]
        # labelling tools overshoot by a pixel
        room = (width, height) if resolve(clean).clip_boxes else (1, 1)
        if (
            min(x.min() + room[0], y.min() + room[1]) < 0
            or x.max() > width + room[0]
            or y.max() > height + room[1]
        ):
            raise Unusable(
                "polygon outside the image",
                f"x {x.min():g} to {x.max():g}, y {y.min():g} to {y.max():g} in {width} x {height}",
            )
    if not polygons:
        raise Unusable("polygon that can't be read", "no polygon at all")
    plain = [[float(value) for value in polygon] for polygon in polygons]
    return codes.decode(codes.merge(codes.frPyObjects(plain, height, width))).astype(bool)


def run_length_mask(code: Any, size: tuple[int, int]) -> np.ndarray:
    """Return bool ``[H, W]`` of COCO's ``{"size": [H, W], "counts": ...}``, compressed or not.

    Raises:
        Unusable: of another size, or its runs are not as long as the image.
    """
    width, height = size
    stated = code.get("size") if isinstance(code, dict) else code
    if not isinstance(code, dict) or stated not in ([height, width], (height, width)):
        raise Unusable("mask of another size than its image", f"{stated}, not [{height}, {width}]")
    counts = code.get("counts")
    try:
        if isinstance(counts, str | bytes):
            runs = _runs(counts.encode("ascii") if isinstance(counts, str) else counts)
        else:
            runs = [int(run) for run in counts]  # type: ignore[union-attr]
    except (ValueError, TypeError, OverflowError) as error:
        raise Unusable("run-length code that can't be read", str(error)) from error
    if min(runs, default=0) < 0 or sum(runs) != width * height:
        raise Unusable("run-length code of a wrong length", f"{sum(runs)} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(data: bytes) -> list[int]:
    """Return the runs of a compressed code (rleFrString of cocoapi's maskApi.c); -1 for a broken one."""
    runs: list[int] = []
    position = 0
    while position < len(data):
        value, shift, digit = 0, 0, 0x20
        while digit & 0x20:
            if position >= len(data) or not 48 <= data[position] < 112 or shift > 30:
                return [-1]
            digit = data[position] - 48
            value |= (digit & 0x1F) << shift
            position, shift = position + 1, shift + 5
        if digit & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
