"""What was drawn into a DICOM series: segmentation objects (SEG) and contours (RTSTRUCT) as label maps.

SEG is read by highdicom, which also brings it to the series' grid without resampling. For contours there are
rt-utils, which reads the whole series anew for each structure, and platipy, which brings a hundred packages;
filling polygons is one call of OpenCV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_tools.readers.dicom_headers import SEGMENTATION, harmless, identity, open_dataset, quiet
from data_tools.readers.volume_samples import BadVolume

BAD_SEGMENTATION = "segmentation that can't be read"
OTHER_GRID = "segmentation on another grid than its series"
# How far a contour may lie from the slice that it is drawn in, as a share of the slices' distance.
OFF_SLICE = 0.25

Mask = tuple[str, np.ndarray, dict[str, str]]


def masks_of(
    path: Path,
    name: str,
    *,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    instances: Sequence[str],
) -> list[Mask]:
    """Label, bool ``[slice, row, column]`` and attributes of each structure in a file.

    Args:
        path: of a SEG or RTSTRUCT file.
        name: of it, for texts.
        affine: from (slice, row, column) to LPS millimetres.
        shape: of the series.
        instances: SOPInstanceUIDs of its slices, in order.

    Raises:
        BadVolume: it can't be read, or lies on another grid.
    """
    try:
        data = open_dataset(path)
    except (OSError, ValueError) as error:
        raise BadVolume(BAD_SEGMENTATION, f"{name}: {type(error).__name__}") from error
    names = identity(data)
    find = _segments if str(data.SOPClassUID) == SEGMENTATION else _contours
    try:
        with quiet():
            found = list(find(data, affine, shape, instances))
    except BadVolume:
        raise
    except Exception as error:  # damaged objects make the libraries stumble over anything
        raise BadVolume(BAD_SEGMENTATION, f"{name}: {type(error).__name__}") from error
    for label, _, _ in found:
        if not harmless(label, names):
            raise BadVolume("label that names somebody", name)
    return found


def _segments(
    data: Any, affine: np.ndarray, shape: tuple[int, int, int], instances: Sequence[str]
) -> Iterator[Mask]:
    import highdicom

    segmentation = highdicom.seg.Segmentation.from_dataset(data)
    for number in segmentation.segment_numbers:
        described = segmentation.get_segment_description(number)
        label = str(described.segment_label).strip()
        if not label:
            label = str(described.segmented_property_type.meaning)
        yield label, _segment(segmentation, number, affine, shape, instances), {}


def _segment(
    segmentation: Any,
    number: int,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    instances: Sequence[str],
) -> np.ndarray:
    """By the slices that its frames refer to; if they refer to none, by their places."""
    import highdicom

    try:
        pixels = segmentation.get_pixels_by_source_instance(
            list(instances),
            segment_numbers=[number],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
        )
    except (KeyError, RuntimeError, ValueError):
        pixels = None
    if pixels is not None and pixels.shape == shape:
        return np.asarray(pixels) > 0
    volume = segmentation.get_volume(segment_numbers=[number], combine_segments=True)
    grid = highdicom.VolumeGeometry(affine, shape, "PATIENT")
    try:
        return np.asarray(volume.match_geometry(grid, tol=1e-2).array) > 0
    except (RuntimeError, ValueError) as error:
        raise BadVolume(OTHER_GRID, f"segment {number}") from error


def _contours(
    data: Any, affine: np.ndarray, shape: tuple[int, int, int], instances: Sequence[str]
) -> Iterator[Mask]:
    labels = {
        int(item.ROINumber): str(item.get("ROIName", "")).strip()
        for item in data.get("StructureSetROISequence") or []
    }
    inverse = np.linalg.inv(affine)
    for item in data.get("ROIContourSequence") or []:
        label = labels.get(int(item.ReferencedROINumber), "")
        contours = [
            np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            for contour in item.get("ContourSequence") or []
            if str(contour.ContourGeometricType) == "CLOSED_PLANAR"
        ]
        if not label or not contours:
            continue
        mask = np.zeros(shape, dtype=np.uint8)
        for points in contours:
            _fill(mask, points, inverse)
        yield label, mask.astype(bool), {}


def _fill(mask: np.ndarray, points: np.ndarray, inverse: np.ndarray) -> None:
    """One closed contour; inside another one it is a hole, as exclusive or."""
    indices = (np.c_[points, np.ones(len(points))] @ inverse.T)[:, :3]
    place = float(indices[:, 0].mean())
    index = round(place)
    if np.abs(indices[:, 0] - index).max() > OFF_SLICE or not 0 <= index < len(mask):
        raise BadVolume(OTHER_GRID, f"a contour at slice {place:.2f}")
    corners = np.rint(indices[:, [2, 1]]).astype(np.int32)
    inside = np.zeros(mask.shape[1:], dtype=np.uint8)
    cv2.fillPoly(inside, [corners], 1)
    mask[index] ^= inside
