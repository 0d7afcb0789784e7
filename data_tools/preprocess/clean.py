# SPDX-License-Identifier: Apache-2.0

"""Apply the rules: in a volume to the components of its label maps, in an image to boxes and masks.

Boxes are half-open, ``x2 - x1`` is the width, as `skimage.measure.regionprops` gives them. A mask becomes one
region for each connected component, as SA-Med2D-20M does (arXiv 2311.11969). Components of a volume are those
of cc3d, all labels of a map at once. ``H`` and ``W`` are an image's height and width in pixels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_tools.lexicon import says_nothing
from data_tools.preprocess import Rules
from data_tools.preprocess.volumes import Structure, Volume
from data_tools.records import NOTHING, Annotation, Box, Drops, Label
from gmai_xtuner.core.errors import Unusable

OUTSIDE = "box outside the image"
NO_SIZE = "box of no size"
SWAPPED = "box with swapped corners"
NOT_FINITE = "box with a coordinate that is no number"
CLIPPED = "box cut at the image's edge"
"""Counted like a drop, but the box stays; only with ``clip_boxes``."""
EMPTY = "empty mask"
IN_FRACTIONS = "box inside of one pixel, as fractions of an image's size are"
OTHER_SIZE = "mask of another size than its image"
BEYOND_LARGEST = "component beyond the largest that are kept"


def clean_annotations(
    annotations: Sequence[Annotation],
    *,
    size: tuple[int, int],
    rules: Rules,
    drops: Drops,
    where: str,
) -> list[Label]:
    """Check boxes and turn masks into boxes, in the order of the annotations and from top to bottom.

    An annotation with both box and mask is one object: its box is checked, its mask gives the area and is
    not split. ``size`` is the image's width and height; drops are of stage ``clean``.
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
    annotation: Annotation
    size: tuple[int, int]
    rules: Rules
    drops: Drops
    where: str

    def drop(self, reason: str, detail: str = "") -> list[Label]:
        label = self.annotation.label
        # The object whose box is cut stays; what has no pixel left was annotated all the same.
        lost = NOTHING if reason == CLIPPED else (label,)
        self.drops.add(reason, self.where, label + detail, lost=lost, stage="clean")
        return []

    def kept(self, box: Box, area: int | None) -> Label:
        return Label(self.annotation.label, box, area, dict(self.annotation.attributes))

    def box(self, box: tuple[float, float, float, float]) -> list[Label]:
        shown = f" {tuple(box)} in {self.size[0]} x {self.size[1]}"
        if not all(math.isfinite(value) for value in box):
            return self.drop(NOT_FINITE, shown)
        if max(map(abs, box)) <= 1 and not says_nothing(self.annotation.label):
            return self.drop(IN_FRACTIONS, shown)
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
        found = components(mask, connectivity=rules.connectivity, split=rules.split)
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


def components(
    mask: np.ndarray, *, connectivity: Literal[4, 8] = 8, split: bool = True
) -> list[tuple[Box, int]]:
    """Return half-open box and pixels of each component of bool ``[H, W]``, or of all, from top to bottom."""
    import cv2

    if not mask.any():
        return []
    (y1, y2), (x1, x2) = _extent(mask, axis=1), _extent(mask, axis=0)
    if not split:
        return [((x1, y1, x2, y2), int(np.count_nonzero(mask)))]
    # Only the part of the image in which something is: masks are mostly background.
    part = np.ascontiguousarray(mask[y1:y2, x1:x2]).view(np.uint8)
    _, _, statistics, _ = cv2.connectedComponentsWithStats(part, connectivity=connectivity)
    found: list[tuple[Box, int]] = [
        ((x1 + left, y1 + top, x1 + left + width, y1 + top + height), area)
        for left, top, width, height, area in statistics[1:].tolist()  # the first is the background
    ]
    return sorted(found, key=lambda part: (part[0][1], part[0][0], part[0][3], part[0][2], part[1]))


def _extent(mask: np.ndarray, *, axis: int | tuple[int, int]) -> tuple[int, int]:
    present = np.asarray(mask.any(axis=axis))
    first = int(present.argmax())
    return first, int(len(present) - present[::-1].argmax())


@dataclass(frozen=True, slots=True)
class _Component:
    """``box``: in voxels of the map's part that holds anything."""

    number: int
    voxels: int
    box: tuple[slice, ...]


def clean_volume(volume: Volume, rules: Rules, *, drops: Drops, where: str) -> Volume:
    """Return the volume with what the rules leave of its structures.

    `min_voxels`, `min_volume_mm3`, `min_side_mm` and `keep_largest` apply to each component; `max_background`
    to the volume, before anything is taken away; `split_left_right` to what is left. `Unusable` if the volume
    is left out as a whole.
    """
    if rules.max_background < 1.0 and volume.structures:
        held = np.zeros(volume.voxels.shape, dtype=bool)
        for number, layer in enumerate(volume.layers):
            values = [item.value for item in volume.structures if item.layer == number]
            held |= np.isin(layer, values)
        share = 1.0 - float(np.count_nonzero(held)) / held.size
        if share > rules.max_background:
            reason = f"volume of more than {100 * rules.max_background:g} % background"
            raise Unusable(reason, f"{100 * share:.3f} %")
    least = rules.min_voxels or rules.min_volume_mm3 or rules.min_side_mm
    if not (least or rules.keep_largest or rules.split_left_right):
        return volume
    layers: list[np.ndarray] = []
    structures: list[Structure] = []
    for number, layer in enumerate(volume.layers):
        own = [item for item in volume.structures if item.layer == number]
        cleaned, left = _clean_layer(layer, own, volume.spacing, rules, drops, where)
        layers.append(cleaned)
        structures += left
    return replace(volume, layers=tuple(layers), structures=tuple(structures))


def _clean_layer(
    layer: np.ndarray,
    structures: list[Structure],
    spacing: tuple[float, float, float],
    rules: Rules,
    drops: Drops,
    where: str,
) -> tuple[np.ndarray, list[Structure]]:
    import cc3d

    if not layer.any():
        return layer, structures
    box = tuple(slice(*_extent(layer, axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    part = np.where(np.isin(layer[box], [item.value for item in structures]), layer[box], 0)
    numbers = cc3d.connected_components(
        np.ascontiguousarray(part), connectivity=rules.connectivity_3d
    )
    statistics = cc3d.statistics(numbers)
    by_value: dict[int, list[_Component]] = defaultdict(list)
    for number in range(1, int(numbers.max()) + 1):
        own, voxels = statistics["bounding_boxes"][number], statistics["voxel_counts"][number]
        value = int(part[own][numbers[own] == number][0])
        by_value[value].append(_Component(number, int(voxels), own))
    names = {item.value: item for item in structures}
    new_value = np.zeros(int(numbers.max()) + 1, dtype=np.uint16)
    left: list[Structure] = []
    middle = (layer.shape[0] - 1) / 2 - box[0].start
    for value, components in sorted(by_value.items()):
        kept: list[_Component] = []
        for component in sorted(components, key=lambda item: (-item.voxels, item.number)):
            if not (reason := _too_small(component, spacing, rules, len(kept))):
                kept.append(component)
                continue
            label = names[value].label
            drops.add(f"component {reason[0]}", where, f"{label}: {reason[1]}", lost=[label])
        sides = _sides(kept, middle) if rules.split_left_right else {}
        for side in ("left", "right") if sides else ("",):
            of_side = [part for part in kept if sides.get(part.number, "") == side]
            if of_side:
                attributes = {**names[value].attributes, **({"side": side} if side else {})}
                left.append(replace(names[value], value=len(left) + 1, attributes=attributes))
                new_value[[part.number for part in of_side]] = len(left)
    cleaned = np.zeros(layer.shape, dtype=np.uint8 if len(left) < 256 else np.uint16)
    cleaned[box] = new_value[numbers]
    return cleaned, left


def _too_small(
    component: _Component, spacing: tuple[float, float, float], rules: Rules, larger: int
) -> tuple[str, str] | None:
    """Return why a component is left out, of which so many larger ones are kept, and what it has."""
    voxels, size = component.voxels, component.voxels * float(np.prod(spacing))
    lengths = [side.stop - side.start for side in component.box]
    shortest = min(count * length for count, length in zip(lengths, spacing, strict=True))
    if voxels < rules.min_voxels:
        return f"smaller than {rules.min_voxels} voxels", f"{voxels} voxels"
    if size < rules.min_volume_mm3:
        return f"smaller than {rules.min_volume_mm3:g} mm3", f"{size:.1f} mm3"
    if shortest < rules.min_side_mm:
        return f"with a side under {rules.min_side_mm:g} mm", f"{shortest:.1f} mm"
    if rules.keep_largest and larger >= rules.keep_largest:
        return f"beyond the {rules.keep_largest} largest", f"{voxels} voxels"
    return None


def _sides(components: list[_Component], middle: float) -> dict[int, str]:
    """Return component -> side, if each lies wholly on one side of the middle and both sides have one.

    ``X`` grows towards the patient's right. A component across the middle means that the structure is not
    a pair, or the volume not centred on the body: then nothing is said.
    """
    sides = {}
    for component in components:
        if component.box[0].start > middle:
            sides[component.number] = "right"
        elif component.box[0].stop - 1 < middle:
            sides[component.number] = "left"
        else:
            return {}
    return sides if len(set(sides.values())) == 2 else {}
