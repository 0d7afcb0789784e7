"""DICOM series and enhanced objects -> volumes, with what was drawn into them (SEG, RTSTRUCT) as masks.

SEG is read by highdicom, which also brings it to the series' grid without resampling. For contours there are
rt-utils, which reads the whole series anew for each structure, and platipy, which brings a hundred packages;
filling polygons is one call of OpenCV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_tools.preprocess.volumes import Volume
from data_tools.readers.dicom_headers import SEGMENTATION, modality_of
from data_tools.readers.volume_samples import FileWindow, scale_for
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import (
    MIXED,
    Header,
    harmless,
    identity,
    open_dataset,
    quiet,
    stack_affine,
    stack_order,
)
from gmai_xtuner.core.imaging.dicom_pixels import GREY, file_scale, intensities
from gmai_xtuner.core.imaging.volumes import LPS_TO_RAS, TOO_LARGE, to_ras
from gmai_xtuner.core.imaging.windows import Scale

BAD_SEGMENTATION = "segmentation that can't be read"
OTHER_GRID = "segmentation on another grid than its series"
COLOURED = "series of colour pictures"
# How far a contour may lie from the slice that it is drawn in, as a share of the slices' distance.
OFF_SLICE = 0.25

ENHANCED = (
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
    "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
)

Mask = tuple[str, np.ndarray, dict[str, str]]
"""Label, bool ``[slice, row, column]``, attributes."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Slices one behind the other, as stored.

    Args:
        array: float32 ``[slice, row, column]``.
        affine: from (slice, row, column) to LPS millimetres.
        scale: how intensities become grey levels.
        instances: SOPInstanceUIDs of the slices, in order; empty for an enhanced object.
        even: whether all slices are equally far from each other.
    """

    array: np.ndarray
    affine: np.ndarray
    scale: Scale
    instances: tuple[str, ...] = ()
    even: bool = True

    def volume(self) -> Volume:
        """Return the voxels in RAS+, without label maps."""
        return Volume(*to_ras(self.array, LPS_TO_RAS @ self.affine))


def scale_of(
    data: Any, values: np.ndarray, *, frame: int = 0, window: FileWindow, voi: int | str
) -> Scale:
    """Return the scale that a job's ``window`` means for a grey image.

    Args:
        data: whose VOI LUT or window is taken for ``file``; without one that means ``auto``.
        values: all intensities that ``auto`` and the like look at.
        frame: whose window is taken.
        window, voi: see `dicom.Options`.

    Raises:
        Unusable: the file has windows, but not the one that is wanted, or a wrong one.
    """
    own = file_scale(data, frame, voi) if window == "file" else None
    chosen = "auto" if window == "file" else window
    return own or scale_for(chosen, values, modality=modality_of(data))


def load_series(
    headers: Sequence[Header], root: Path, *, window: FileWindow, voi: int | str, max_voxels: int
) -> Stack:
    """Read the slices of a series; the middle one's window is that of all.

    Raises:
        Unusable: they make no stack, a slice can't be read or isn't grey, or there are too many voxels.
    """
    order, even = stack_order(headers)
    headers = [headers[at] for at in order]
    count, first = len(headers), headers[0]
    _check_size(count * first.rows * first.columns, max_voxels)
    array: np.ndarray | None = None
    for index, header in enumerate(headers):
        data = open_dataset(root / header.path)
        _check_grey(data, count)
        plane = intensities(data)
        if array is None:
            array = np.empty((count, *plane.shape), dtype=np.float32)
        if plane.shape != array.shape[1:]:
            raise Unusable(MIXED, f"{count} files")
        array[index] = plane
        if index == count // 2:
            middle = data
    assert array is not None
    affine = stack_affine(first, headers[-1], count, middle)
    scale = scale_of(middle, array, window=window, voi=voi)
    if str(middle.PhotometricInterpretation) == "MONOCHROME1":
        scale = scale.inverted("turned round")
    return Stack(array, affine, scale, tuple(header.instance for header in headers), even)


def load_enhanced(data: Any, *, window: FileWindow, voi: int | str, max_voxels: int) -> Stack:
    """Read an enhanced multi-frame object, whose frames each have their place; see `load_series`."""
    import highdicom

    count = int(data.NumberOfFrames)
    _check_size(count * int(data.Rows) * int(data.Columns), max_voxels)
    _check_grey(data, count)
    try:
        with quiet():
            # A window of the file is one of the rescaled values, not of a real-world value map's.
            found = highdicom.Image.from_dataset(data).get_volume(
                apply_real_world_transform=False,
                apply_voi_transform=False,
                apply_presentation_lut=False,
            )
    except Exception as error:  # damaged objects make the library stumble over anything
        raise Unusable("frames that make no volume", type(error).__name__) from error
    array = np.asarray(found.array, dtype=np.float32)
    scale = scale_of(data, array, frame=count // 2, window=window, voi=voi)
    if str(data.PhotometricInterpretation) == "MONOCHROME1":
        scale = scale.inverted("turned round")
    return Stack(array, found.affine, scale)


def _check_size(voxels: int, limit: int) -> None:
    if voxels > limit:
        raise Unusable(TOO_LARGE, f"{voxels} voxels, {limit} allowed")


def _check_grey(data: Any, count: int) -> None:
    if str(data.get("PhotometricInterpretation", "")) not in GREY:
        raise Unusable(COLOURED, f"{count} files or frames")


# --- what was drawn -----------------------------------------------------------------------------


def masks_of(path: Path, name: str, stack: Stack) -> list[Mask]:
    """Return the structures of a SEG or RTSTRUCT file on the grid of a stack.

    Args:
        path: of the file.
        name: what errors call it.
        stack: what it was drawn on.

    Raises:
        Unusable: it can't be read, or lies on another grid.
    """
    try:
        data = open_dataset(path)
    except Unusable as error:
        raise Unusable(BAD_SEGMENTATION, f"{name}: {error.reason}") from error
    names = identity(data)
    find = _segments if str(data.SOPClassUID) == SEGMENTATION else _contours
    try:
        with quiet():
            found = list(find(data, stack))
    except Unusable:
        raise
    except Exception as error:  # damaged objects make the libraries stumble over anything
        raise Unusable(BAD_SEGMENTATION, f"{name}: {type(error).__name__}") from error
    for label, _, _ in found:
        if not harmless(label, names):
            raise Unusable("label that names somebody", name)
    return found


def _segments(data: Any, stack: Stack) -> Iterator[Mask]:
    import highdicom

    segmentation = highdicom.seg.Segmentation.from_dataset(data)
    for number in segmentation.segment_numbers:
        described = segmentation.get_segment_description(number)
        label = str(described.segment_label).strip()
        if not label:
            label = str(described.segmented_property_type.meaning)
        yield label, _segment(segmentation, number, stack), {}


def _segment(segmentation: Any, number: int, stack: Stack) -> np.ndarray:
    """Read a segment by the slices that its frames refer to; if they refer to none, by their places."""
    import highdicom

    try:
        pixels = segmentation.get_pixels_by_source_instance(
            list(stack.instances),
            segment_numbers=[number],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
        )
    except (KeyError, RuntimeError, ValueError):
        pixels = None
    if pixels is not None and pixels.shape == stack.array.shape:
        return np.asarray(pixels) > 0
    volume = segmentation.get_volume(segment_numbers=[number], combine_segments=True)
    grid = highdicom.VolumeGeometry(stack.affine, stack.array.shape, "PATIENT")
    try:
        return np.asarray(volume.match_geometry(grid, tol=1e-2).array) > 0
    except (RuntimeError, ValueError) as error:
        raise Unusable(OTHER_GRID, f"segment {number}") from error


def _contours(data: Any, stack: Stack) -> Iterator[Mask]:
    labels = {
        int(item.ROINumber): str(item.get("ROIName", "")).strip()
        for item in data.get("StructureSetROISequence") or []
    }
    inverse = np.linalg.inv(stack.affine)
    for item in data.get("ROIContourSequence") or []:
        label = labels.get(int(item.ReferencedROINumber), "")
        contours = [
            np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            for contour in item.get("ContourSequence") or []
            if str(contour.ContourGeometricType) == "CLOSED_PLANAR"
        ]
        if not label or not contours:
            continue
        mask = np.zeros(stack.array.shape, dtype=np.uint8)
        for points in contours:
            _fill(mask, points, inverse)
        yield label, mask.astype(bool), {}


def _fill(mask: np.ndarray, points: np.ndarray, inverse: np.ndarray) -> None:
    """Fill one closed contour; inside another one it is a hole, as exclusive or."""
    indices = (np.c_[points, np.ones(len(points))] @ inverse.T)[:, :3]
    place = float(indices[:, 0].mean())
    index = round(place)
    if np.abs(indices[:, 0] - index).max() > OFF_SLICE or not 0 <= index < len(mask):
        raise Unusable(OTHER_GRID, f"a contour at slice {place:.2f}")
    corners = np.rint(indices[:, [2, 1]]).astype(np.int32)
    inside = np.zeros(mask.shape[1:], dtype=np.uint8)
    cv2.fillPoly(inside, [corners], 1)
    mask[index] ^= inside
