"""Clean the annotations of an image: check boxes, and turn masks into boxes of their components.

Boxes are half-open, ``x2 - x1`` is the width, as `skimage.measure.regionprops` gives them. A mask becomes one
region for each connected component, as SA-Med2D-20M does (arXiv 2311.11969). ``H`` and ``W`` are the image's
height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_tools.preprocess.rules import Rules
from data_tools.records import Annotation, Box, Drops, Label

OUTSIDE = "box outside the image"
NO_SIZE = "box of no size"
SWAPPED = "box with swapped corners"
NOT_FINITE = "box with a coordinate that is no number"
CLIPPED = "box cut at the image's edge"
"""Counted like a drop, but the box stays; only with ``clip_boxes``."""
EMPTY = "empty mask"
OTHER_SIZE = "mask of another size than its image"
BEYOND_LARGEST = "component beyond the largest that are kept"

# Dropped under these, an object isn't one that the image shows and the corpus lacks.
_NOTHING_LOST = (CLIPPED, EMPTY)


def regions(
    annotations: Sequence[Annotation],
    *,
    size: tuple[int, int],
    rules: Rules,
    drops: Drops,
    where: str,
) -> list[Label]:
    """Check boxes and turn masks into boxes.

    An annotation with both box and mask is one object: its box is checked, its mask gives the area and is
    not split.

    Args:
        annotations: of one image.
        size: its width and height, pixels.
        rules: what is kept.
        drops: takes what is left out, of stage ``clean``.
        where: the image, for the drops.

    Returns:
        The regions in the order of their annotations, components of a mask from top to bottom.
    """
    kept: list[Label] = []
    for annotation in annotations:
        cleaning = _Cleaning(annotation, size, rules, drops, where)
        if annotation.mask is not None and annotation.mask.shape != size[::-1]:
            height, width = annotation.mask.shape[:2]
            cleaning.drop(OTHER_SIZE, f": {width} x {height}, the image {size[0]} x {size[1]}")
        elif annotation.box is not None:
            kept += cleaning.box(annotation.box)
        elif annotation.mask is not None:
            kept += cleaning.components(annotation.mask)
        else:
            kept.append(Label(annotation.label, attributes=dict(annotation.attributes)))
    return kept


@dataclass(frozen=True, slots=True)
class _Cleaning:
    """One annotation with what it is held against."""

    annotation: Annotation
    size: tuple[int, int]
    rules: Rules
    drops: Drops
    where: str

    def drop(self, reason: str, detail: str = "") -> list[Label]:
        """Count a drop; return no region."""
        label = self.annotation.label
        lost = () if reason in _NOTHING_LOST else (label,)
        self.drops.add(reason, self.where, label + detail, lost=lost, stage="clean")
        return []

    def kept(self, box: Box, area: int | None) -> Label:
        return Label(self.annotation.label, box, area, dict(self.annotation.attributes))

    def box(self, box: tuple[float, float, float, float]) -> list[Label]:
        shown = f" {tuple(box)} in {self.size[0]} x {self.size[1]}"
        if not all(math.isfinite(value) for value in box):
            return self.drop(NOT_FINITE, shown)
        x1, y1, x2, y2 = (math.floor(value + 0.5) for value in box)
        if x2 < x1 or y2 < y1:
            return self.drop(SWAPPED, shown)
        if x2 == x1 or y2 == y1:
            return self.drop(NO_SIZE, shown)
        inside = (max(x1, 0), max(y1, 0), min(x2, self.size[0]), min(y2, self.size[1]))
        if inside != (x1, y1, x2, y2):
            wholly_outside = inside[2] <= inside[0] or inside[3] <= inside[1]
            if wholly_outside or not self.rules.clip_boxes:
                return self.drop(OUTSIDE, shown)
            self.drop(CLIPPED, shown)
        area = None
        if self.annotation.mask is not None:
            area = int(np.count_nonzero(self.annotation.mask))
            if area == 0:
                return self.drop(EMPTY)
            if reason := self.too_small(area):
                return self.drop(reason, f": {area} pixels")
        return [self.kept(inside, area)]

    def components(self, mask: np.ndarray) -> list[Label]:
        rules, pixels = self.rules, self.size[0] * self.size[1]
        found = components(mask, connectivity=rules.connectivity) if rules.split else whole(mask)
        if not found:
            return self.drop(EMPTY)
        large = []
        for box, area in found:
            if reason := self.too_small(area):
                self.drop(reason, f": {area} of {pixels} pixels")
            else:
                large.append((box, area))
        by_area = sorted(range(len(large)), key=lambda index: (-large[index][1], index))
        beyond = set() if rules.keep_largest is None else set(by_area[rules.keep_largest :])
        for index in sorted(beyond):
            self.drop(BEYOND_LARGEST, f": {large[index][1]} pixels")
        return [self.kept(*part) for index, part in enumerate(large) if index not in beyond]

    def too_small(self, area: int) -> str | None:
        rules = self.rules
        if area < rules.min_area_share * self.size[0] * self.size[1]:
            share = f"{rules.min_area_share:.3%}".replace("%", " %")
            return f"mask smaller than {share} of the image"
        if area < rules.min_area_pixels:
            return f"mask smaller than {rules.min_area_pixels} pixels"
        return None


def components(mask: np.ndarray, *, connectivity: Literal[4, 8] = 8) -> list[tuple[Box, int]]:
    """Return half-open box and number of pixels of each connected component, from top to bottom, then left.

    Args:
        mask: bool ``[H, W]``.
        connectivity: 8 or 4.
    """
    import cv2

    if not mask.any():
        return []
    (y1, y2), (x1, x2) = _extent(mask, axis=1), _extent(mask, axis=0)
    # Only the part of the image in which something is: masks are mostly background.
    part = np.ascontiguousarray(mask[y1:y2, x1:x2]).view(np.uint8)
    _, _, statistics, _ = cv2.connectedComponentsWithStats(part, connectivity=connectivity)
    found: list[tuple[Box, int]] = []
    for left, top, width, height, area in statistics[1:].tolist():  # the first is the background
        box = (x1 + left, y1 + top, x1 + left + width, y1 + top + height)
        found.append((box, area))
    return sorted(found, key=lambda part: (part[0][1], part[0][0], part[0][3], part[0][2], part[1]))


def whole(mask: np.ndarray) -> list[tuple[Box, int]]:
    """Return half-open box and number of pixels of the mask as a whole; nothing for an empty mask."""
    if not mask.any():
        return []
    (y1, y2), (x1, x2) = _extent(mask, axis=1), _extent(mask, axis=0)
    return [((x1, y1, x2, y2), int(np.count_nonzero(mask)))]


def _extent(mask: np.ndarray, *, axis: int) -> tuple[int, int]:
    present = np.asarray(mask.any(axis=axis))
    first = int(present.argmax())
    return first, int(len(present) - present[::-1].argmax())
