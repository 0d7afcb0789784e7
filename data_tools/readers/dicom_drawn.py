# SPDX-License-Identifier: Apache-2.0

"""What was drawn into DICOM images: SEG and RTSTRUCT files -> masks on the images' own pixels.

Nothing is resampled. A frame or contour belongs to the image in whose plane it lies; without a place, to the
one that it refers to; where place and reference contradict each other, to none. highdicom puts frames on a
grid of even slices and refuses the rest; rt-utils and platipy do so with contours, and fill each by exclusive
or alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_tools.readers.dicom_headers import SEGMENTATION
from data_tools.records import ANYTHING, Drops
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging import dicom
from gmai_xtuner.core.imaging.dicom_pixels import decode

BAD_SEGMENTATION = "segmentation that can't be read"
OTHER_GRID = "segmentation on another grid than its images"
FAINT = "segmentation of fractions under one half"
NO_REGION = "contour that bounds no region"
NO_CONTOURS = "structure without contours"
NAMELESS = "structure whose label is missing or names somebody"
OFF_PIXEL = 0.1
"""How far a frame's pixels may lie from the image's, as a share of their distance."""
OFF_SLICE = 0.25
"""How far a contour may lie from the slice that it is drawn in, as a share of the slices' distance."""

# INTERPOLATED_PLANAR is what OsiriX and Horos call closed contours between those that somebody drew.
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "INTERPOLATED_PLANAR")
OPEN = ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR")

Mask = tuple[str, np.ndarray]
"""Label, bool ``[image, row, column]``."""


def open_drawn(path: Path) -> Any:
    """Return the data set of a SEG or RTSTRUCT file; the last ones are kept, for all images of a series."""
    found = path.stat()
    try:
        return _opened(path, found.st_mtime_ns, found.st_size)
    except Unusable as error:
        raise Unusable(BAD_SEGMENTATION, error.reason) from error


@lru_cache(maxsize=2)
def _opened(path: Path, changed: int, size: int) -> Any:
    return dicom.open_dataset(path)


def labels_of(data: Any) -> dict[int, str]:
    """Return labels of segments or structures by number; "" for one that is missing or names somebody."""
    names, found = dicom.identity(data), {}
    with dicom.damage_as(BAD_SEGMENTATION), dicom.quiet():
        if str(data.SOPClassUID) in SEGMENTATION:
            for item in data.SegmentSequence:
                kinds = item.get("SegmentedPropertyTypeCodeSequence")
                meaning = kinds[0].get("CodeMeaning") if kinds else ""
                label = str(item.get("SegmentLabel") or "").strip() or str(meaning or "").strip()
                found[int(item.SegmentNumber)] = label
        else:
            for item in data.get("StructureSetROISequence") or []:
                found[int(item.ROINumber)] = str(item.get("ROIName") or "").strip()
    return {n: label if dicom.harmless(label, names) else "" for n, label in found.items()}


def masks_of(
    data: Any, planes: Sequence[dicom.Header], stack: dicom.Stack | None, drops: Drops, where: str
) -> list[Mask]:
    """Return the structures of a SEG or RTSTRUCT file on the pixels of images, in the order of ``planes``.

    ``stack`` is their place, if they have one. What can't be placed is dropped with its label; `Unusable` if
    nothing of it can be read.
    """
    labels = labels_of(data)
    with dicom.damage_as(BAD_SEGMENTATION), dicom.quiet():
        if str(data.SOPClassUID) in SEGMENTATION:
            masks, problems = _segments(data, planes, stack, labels)
        elif stack is None:
            raise Unusable(OTHER_GRID, "images without a place")
        else:
            masks, problems = _contours(data, stack, labels)
    for number, found in problems.items():
        label = labels.get(number, "")
        for reason, detail in found.items():
            drops.add(reason, where, detail, lost=[label or ANYTHING])
    named = []
    for number, mask in masks.items():
        if labels.get(number):
            named.append((labels[number], mask))
        elif mask.any():
            drops.add(NAMELESS, where, lost=[ANYTHING])
    return named


Sources = set[tuple[str, int | None]]
"""Instance and frame number (None: all frames) of the images that something refers to."""
Found = tuple[dict[int, np.ndarray], dict[int, dict[str, str]]]
"""Masks by the number of their structure, and for each structure the reasons for what is left out of it."""


def _named(
    sources: Sources, planes: Sequence[dicom.Header], stack: dicom.Stack | None
) -> list[int]:
    """Return the indices of the images that are referred to, by instance and perhaps frame.

    `Unusable` for what was drawn on another time point or echo of the same series.
    """
    keys = [{(plane.instance, None), (plane.instance, plane.frame + 1)} for plane in planes]
    found = [at for at, own in enumerate(keys) if sources & own]
    if stack and not found and not stack.siblings.isdisjoint(uid for uid, _ in sources):
        raise Unusable("segmentation of another time point or echo of the series")
    return found


def _sources(items: Any) -> Sources:
    found: Sources = set()
    for item in items or []:
        uid = str(item.get("ReferencedSOPInstanceUID") or "")
        frames = dicom.numbers(item, "ReferencedFrameNumber")
        found |= {(uid, int(frame)) for frame in frames} or {(uid, None)}
    return found


def _no_masks(planes: Sequence[dicom.Header], numbers: Iterable[int] = ()) -> dict[int, np.ndarray]:
    """Return an empty mask for each of the structures; for others it is made when they are asked for."""
    shape = (len(planes), planes[0].rows, planes[0].columns)
    masks: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(shape, dtype=bool))
    return masks | {number: np.zeros(shape, dtype=bool) for number in numbers}


def _segments(
    data: Any, planes: Sequence[dicom.Header], stack: dicom.Stack | None, labels: dict[int, str]
) -> Found:
    kind = str(data.get("SegmentationType") or "")
    top = int((dicom.numbers(data, "MaximumFractionalValue") or [1])[0])
    frames = dicom.frame_headers(data)
    if stack is not None and (distance := _distance(data, frames, stack)):
        return {}, {number: {OTHER_GRID: distance} for number in labels}
    masks, shape = _no_masks(planes, labels), (len(planes), planes[0].rows, planes[0].columns)
    values: dict[int, list[tuple[tuple[np.ndarray, ...], np.ndarray]]] = defaultdict(list)
    problems: dict[int, dict[str, str]] = defaultdict(dict)
    for frame in frames:
        pixels = decode(data, frame.frame)
        rows, columns = np.nonzero(pixels)
        if not len(rows):
            continue
        if kind == "LABELMAP":
            held = pixels[rows, columns]
        else:
            item = dicom.functional_group(data, frame.frame, "SegmentIdentificationSequence")
            if item is None and len(labels) > 1:
                raise Unusable(BAD_SEGMENTATION, "a frame without its segment")
            number = next(iter(labels)) if item is None else int(item.ReferencedSegmentNumber)
            held = np.full(len(rows), number)
        present = [int(number) for number in np.unique(held)]
        try:
            place = _place(frame, _frame_sources(data, frame), planes, stack)
        except Unusable as error:
            for number in present:
                problems[number][error.reason] = error.detail
            continue
        if place is None:
            continue
        at = place[0] + rows[:, None] * place[1] + columns[:, None] * place[2]
        inside = ((at >= 0) & (at < np.array(shape))).all(axis=1)
        for number in present:
            one = inside & (held == number)
            here = tuple(at[one].T)
            if kind == "FRACTIONAL":
                values[number].append((here, pixels[rows[one], columns[one]]))
            else:
                masks[number][here] = True
    for number, parts in values.items():
        # Files that were made from binary masks hold 0 and 1 of 255.
        peak = max(int(part.max(initial=0)) for _, part in parts)
        least = 1 if peak == 1 else top / 2
        faint = np.zeros(len(planes), dtype=bool)
        for here, part in parts:
            masks[number][tuple(axis[part >= least] for axis in here)] = True
            faint[np.unique(here[0])] = True
        faint &= ~masks[number].any(axis=(1, 2))
        if faint.any():
            problems[number][FAINT] = f"alone in {faint.sum()} images, up to {peak} of {top}"
    return masks, problems


def _frame_sources(data: Any, frame: dicom.Header) -> Sources:
    item = dicom.functional_group(data, frame.frame, "DerivationImageSequence")
    if item is not None:
        return _sources(item.get("SourceImageSequence"))
    if len(series := data.get("ReferencedSeriesSequence") or []) == 1:
        found = _sources(series[0].get("ReferencedInstanceSequence"))
        return found if len(found) == 1 else set()
    return set()


def _distance(data: Any, frames: Sequence[dicom.Header], stack: dicom.Stack) -> str:
    """Return a text if the segmentation's slices are farther apart than the images; else an empty one."""
    if len(stack.planes) < 2:
        return ""
    own = dicom.numbers(
        dicom.functional_group(data, 0, "PixelMeasuresSequence") or {}, "SpacingBetweenSlices"
    )
    if not own and not _frame_sources(data, frames[0]):
        first = stack.planes[0]
        normal = np.cross(first.orientation[:3], first.orientation[3:])  # type: ignore[index]
        heights = {round(float(np.dot(f.position, normal)), 2) for f in frames if f.position}
        own = [float(np.diff(sorted(heights)).min())] if len(heights) > 1 else []
    gap = float(np.median(np.diff(stack.heights)))
    apart = f"slices {own[0]:g} mm apart on images {gap:g} mm apart" if own else ""
    return apart if own and own[0] > 1.5 * gap else ""


def _place(
    frame: dicom.Header, sources: Sources, planes: Sequence[dicom.Header], stack: dicom.Stack | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return (image, row, column) of a frame's first pixel, and the steps along its rows and columns.

    None for a frame outside of the images; `Unusable` if its pixels are not those of an image.
    """
    named = _named(sources, planes, stack)
    if stack is None or not (frame.orientation and frame.position and frame.spacing):
        if not sources:
            raise Unusable(OTHER_GRID, "a frame with neither a place nor a reference")
        if not named:
            return None
        if len(named) > 1 or (frame.rows, frame.columns) != (planes[0].rows, planes[0].columns):
            raise Unusable(OTHER_GRID, f"a frame of {frame.rows} x {frame.columns} without a place")
        return np.array([named[0], 0, 0]), np.array([0, 1, 0]), np.array([0, 0, 1])
    spans = np.array([0, max(1, frame.rows - 1), max(1, frame.columns - 1)])
    axes = np.array([*[0] * 3, *frame.orientation[3:], *frame.orientation[:3]]).reshape(3, 3)
    ends = axes * (spans * (0, *frame.spacing))[:, None]
    found = stack.indices(np.array(frame.position) + ends)
    steps = (found[1:] - found[0]) / spans[1:, None]
    if np.ptp(found[:, 0]) < OFF_PIXEL and not -0.5 < found[0, 0] < len(planes) - 0.5:
        return None
    start, down, along = (np.rint(each).astype(int) for each in (found[0], *steps))
    off = np.abs(found - np.rint(found)).max()
    if off > OFF_PIXEL or abs(down).sum() != 1 or abs(along).sum() != 1 or (down @ along):
        raise Unusable(OTHER_GRID, f"a frame at slice {found[0, 0]:.2f}, pixels off by {off:.2f}")
    if named and not (down[0] or along[0]) and start[0] not in named:
        raise Unusable(OTHER_GRID, "a frame that refers to another image than it lies in")
    return start, down, along


def _contours(data: Any, stack: dicom.Stack, labels: dict[int, str]) -> Found:
    masks = _no_masks(stack.planes)
    problems: dict[int, dict[str, str]] = defaultdict(dict)
    seen = set()
    for item in data.get("ROIContourSequence") or []:
        number = int(item.ReferencedROINumber)
        rings: dict[int, list[tuple[np.ndarray, bool]]] = defaultdict(list)
        for contour in item.get("ContourSequence") or []:
            seen.add(number)
            try:
                if (found := _ring(contour, stack)) is not None:
                    rings[found[0]].append(found[1:])
            except Unusable as error:
                problems[number][error.reason] = error.detail
        mask = masks[number]
        for at, of_slice in rings.items():
            mask[at] |= _filled(of_slice, mask.shape[1:])
    for number in labels.keys() - seen:
        problems[number][NO_CONTOURS] = ""
    return masks, problems


def _ring(contour: Any, stack: dicom.Stack) -> tuple[int, np.ndarray, bool] | None:
    """Return a contour's image, its corners ``[N, 2]`` (column, row), and if it is combined by exclusive or.

    None for one outside of the images, or in one that isn't there; `Unusable` if it bounds no region, is
    damaged, or lies in no image's plane.
    """
    kind = str(contour.get("ContourGeometricType") or "")
    if kind not in CLOSED:
        raise Unusable(NO_REGION, kind if kind in OPEN else "an unknown type")
    values = dicom.numbers(contour, "ContourData")
    if len(values) % 3 or not np.isfinite(values).all():
        raise Unusable(BAD_SEGMENTATION, "ContourData")
    if len(values) < 9:
        raise Unusable(NO_REGION, f"{len(values) // 3} points")
    indices = stack.indices(np.array(values).reshape(-1, 3))
    sources = _sources(contour.get("ContourImageSequence"))
    named = _named(sources, stack.planes, stack)
    place = float(indices[:, 0].mean())
    at = round(place)
    if not -0.5 < place < len(stack.planes) - 0.5:
        return None
    if np.abs(indices[:, 0] - at).max() > OFF_SLICE:
        if sources and not named:
            return None
        raise Unusable(OTHER_GRID, f"a contour at slice {place:.2f}")
    if named and at not in named:
        raise Unusable(OTHER_GRID, "a contour that refers to another image than it lies in")
    corners = np.rint(np.clip(indices[:, [2, 1]], -(10**6), 10**6)).astype(np.int32)
    return at, corners, kind == "CLOSEDPLANAR_XOR"


def _filled(rings: list[tuple[np.ndarray, bool]], shape: tuple[int, ...]) -> np.ndarray:
    """Return bool ``[H, W]`` inside of contours: one that lies inside of another is a hole in it."""
    mask = np.zeros(shape, dtype=bool)
    drawn: set[bytes] = set()
    for corners, exclusive in sorted(rings, key=lambda ring: -cv2.contourArea(ring[0])):
        canvas = np.zeros(shape, dtype=np.uint8)
        cv2.fillPoly(canvas, [corners], 1)
        inside = canvas.astype(bool)
        if exclusive:
            mask ^= inside
        elif canvas.tobytes() not in drawn:  # the same one twice is no hole
            drawn.add(canvas.tobytes())
            mask = mask & ~inside if mask[inside].all() else mask | inside
    return mask
