"""Annotations of a picture -> regions with checked boxes.

Boxes are half-open, ``x2 - x1`` is the width, as `skimage.measure.regionprops` gives them. A mask becomes one
region for each connected component, as SA-Med2D-20M does (arXiv 2311.11969), a box is taken as the source has
it if it is one. ``H`` and ``W`` are the picture's height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data_tools.preprocess.rules import Rules
from data_tools.records import Box
from data_tools.samples import Annotation

OUTSIDE = "box outside the image"
NO_SIZE = "box of no size"
SWAPPED = "box with swapped corners"
NOT_FINITE = "box with a coordinate that is no number"
CLIPPED = "box cut at the image's edge"
"""Counted like a drop, but the box stays; only with ``clip_boxes``."""
EMPTY = "empty mask"
OTHER_SIZE = "mask of another size than its image"
BEYOND_LARGEST = "component beyond the largest that are kept"


@dataclass(frozen=True, slots=True)
class Region:
    """An annotation whose geometry was checked.

    Args:
        label: as in the annotation.
        box: ``(x1, y1, x2, y2)`` in pixels, half-open, inside the picture; None: the picture as a whole.
        area: pixels of the region's mask; None without a mask.
        attributes: as in the annotation.
    """

    label: str
    box: Box | None = None
    area: int | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


# Dropped under these, an object isn't one that the picture shows and the corpus lacks.
_NOTHING_LOST = (CLIPPED, EMPTY)


def regions(
    annotations: Sequence[Annotation], *, size: tuple[int, int], rules: Rules
) -> tuple[list[Region], list[tuple[str, str]], set[str]]:
    """Check boxes and turn masks into boxes.

    An annotation with both box and mask is one object: its box is checked, its mask gives the area and is
    not split.

    Args:
        annotations: of one picture.
        size: its width and height, pixels.
        rules: what is kept.

    Returns:
        The regions in the order of their annotations, components of a mask from top to bottom; what was
        dropped, as reason and detail; and the labels of which something was.
    """
    kept: list[Region] = []
    drops: list[tuple[str, str]] = []
    incomplete: set[str] = set()
    for annotation in annotations:
        before = len(drops)
        if annotation.mask is not None and annotation.mask.shape != size[::-1]:
            height, width = annotation.mask.shape[:2]
            drops.append(
                (
                    OTHER_SIZE,
                    f"{annotation.label}: {width} x {height}, the image {size[0]} x {size[1]}",
                )
            )
        elif annotation.box is not None:
            kept += _of_box(annotation, annotation.box, size, rules, drops)
        elif annotation.mask is not None:
            kept += _of_mask(annotation, annotation.mask, size, rules, drops)
        else:
            kept.append(Region(annotation.label, attributes=annotation.attributes))
        if any(reason not in _NOTHING_LOST for reason, _ in drops[before:]):
            incomplete.add(annotation.label)
    return kept, drops, incomplete


def _of_box(
    annotation: Annotation,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    rules: Rules,
    drops: list[tuple[str, str]],
) -> Iterator[Region]:
    shown = f"{annotation.label} {tuple(box)} in {size[0]} x {size[1]}"
    if not all(math.isfinite(value) for value in box):
        drops.append((NOT_FINITE, shown))
        return
    x1, y1, x2, y2 = (math.floor(value + 0.5) for value in box)
    if x2 < x1 or y2 < y1:
        drops.append((SWAPPED, shown))
        return
    if x2 == x1 or y2 == y1:
        drops.append((NO_SIZE, shown))
        return
    inside = (max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1]))
    if inside != (x1, y1, x2, y2):
        wholly_outside = inside[2] <= inside[0] or inside[3] <= inside[1]
        drops.append((OUTSIDE if wholly_outside or not rules.clip_boxes else CLIPPED, shown))
        if drops[-1][0] == OUTSIDE:
            return
    area = None
    if annotation.mask is not None:
        area = int(np.count_nonzero(annotation.mask))
        if area == 0:
            drops.append((EMPTY, annotation.label))
            return
        if reason := _too_small(area, size, rules):
            drops.append((reason, f"{annotation.label}: {area} pixels"))
            return
    yield Region(annotation.label, inside, area, annotation.attributes)


def _of_mask(
    annotation: Annotation,
    mask: np.ndarray,
    size: tuple[int, int],
    rules: Rules,
    drops: list[tuple[str, str]],
) -> Iterator[Region]:
    found = components(mask, connectivity=rules.connectivity) if rules.split else whole(mask)
    if not found:
        drops.append((EMPTY, annotation.label))
        return
    large = []
    for box, area in found:
        if reason := _too_small(area, size, rules):
            drops.append((reason, f"{annotation.label}: {area} of {size[0] * size[1]} pixels"))
        else:
            large.append((box, area))
    if rules.keep_largest is not None and len(large) > rules.keep_largest:
        by_area = sorted(range(len(large)), key=lambda number: (-large[number][1], number))
        stay = set(by_area[: rules.keep_largest])
        drops += [
            (BEYOND_LARGEST, f"{annotation.label}: {large[number][1]} pixels")
            for number in sorted(by_area[rules.keep_largest :])
        ]
        large = [part for number, part in enumerate(large) if number in stay]
    for box, area in large:
        yield Region(annotation.label, box, area, annotation.attributes)


def _too_small(area: int, size: tuple[int, int], rules: Rules) -> str | None:
    if area < rules.min_area_share * size[0] * size[1]:
        return f"mask smaller than {rules.min_area_share:.3%} of the image".replace("%", " %")
    if area < rules.min_area_pixels:
        return f"mask smaller than {rules.min_area_pixels} pixels"
    return None


def components(mask: np.ndarray, *, connectivity: Literal[4, 8] = 8) -> list[tuple[Box, int]]:
    """Half-open box and number of pixels of each connected component, from top to bottom, then from the left.

    Args:
        mask: bool ``[H, W]``.
        connectivity: 8 or 4.
    """
    import cv2

    if not mask.any():
        return []
    (y1, y2), (x1, x2) = _extent(mask, axis=1), _extent(mask, axis=0)
    # Only the part of the picture in which something is: masks are mostly background.
    part = np.ascontiguousarray(mask[y1:y2, x1:x2]).view(np.uint8)
    _, _, statistics, _ = cv2.connectedComponentsWithStats(part, connectivity=connectivity)
    found: list[tuple[Box, int]] = []
    for left, top, width, height, area in statistics[1:].tolist():  # the first is the background
        box = (x1 + left, y1 + top, x1 + left + width, y1 + top + height)
        found.append((box, area))
    return sorted(found, key=lambda part: (part[0][1], part[0][0], part[0][3], part[0][2], part[1]))


def whole(mask: np.ndarray) -> list[tuple[Box, int]]:
    """Half-open box and number of pixels of the mask as a whole; empty for an empty mask."""
    if not mask.any():
        return []
    (y1, y2), (x1, x2) = _extent(mask, axis=1), _extent(mask, axis=0)
    return [((x1, y1, x2, y2), int(np.count_nonzero(mask)))]


def _extent(mask: np.ndarray, *, axis: int) -> tuple[int, int]:
    present = np.asarray(mask.any(axis=axis))
    first = int(present.argmax())
    return first, int(len(present) - present[::-1].argmax())
