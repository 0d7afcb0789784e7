"""Files of one DICOM series -> a volume in RAS+, or the reason why they make none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.preprocess.slicing import AXES, Axis
from data_tools.preprocess.volumes import LPS_TO_RAS, Volume, to_ras
from data_tools.preprocess.windows import Scale, Window, scale_for
from data_tools.readers.dicom_headers import Header, modality_of, open_dataset
from data_tools.readers.dicom_pixels import (
    GREY,
    BadPixels,
    FileWindow,
    intensities,
    scale_of,
)
from data_tools.readers.volume_samples import BadVolume

UNEVEN_CUT = "uneven series cut across its slices"
MIXED = "series of differing sizes or directions"
TWICE = "series with two slices at one place"
# How far a slice may lie from where even spacing puts it, as a share of the spacing.
UNEVEN = 0.1


def is_stack(headers: Sequence[Header]) -> bool:
    """Whether the files of a series are slices: single frames with a place each, at two places or more."""
    places = {header.position for header in headers}
    return (
        len(headers) > 1
        and all(header.frames == 1 and header.orientation and header.position for header in headers)
        and len(places) > 1
    )


def in_order(headers: Sequence[Header]) -> tuple[list[Header], bool]:
    """Slices along their normal, and whether they lie evenly.

    Raises:
        BadVolume: they differ in size or direction, or two lie at one place.
    """
    first = headers[0]
    axes = np.array(first.orientation, dtype=float)
    for header in headers:
        same = np.allclose(header.orientation or (), axes, atol=1e-3)
        if (header.rows, header.columns) != (first.rows, first.columns) or not same:
            raise BadVolume(MIXED, f"{len(headers)} files")
    normal = np.cross(axes[:3], axes[3:])
    placed = sorted(
        (float(np.dot(normal, header.position or (0, 0, 0))), header.number, header.path, header)
        for header in headers
    )
    distances = np.diff([place for place, *_ in placed])
    spacing = float(np.median(distances))
    if distances.min() < 1e-3 * max(spacing, 1e-6) or spacing <= 0:
        raise BadVolume(TWICE, f"{len(headers)} files; name one echo or time point per series")
    even = bool(np.abs(distances - spacing).max() <= UNEVEN * spacing)
    return [header for *_, header in placed], even


def own_axis(affine: np.ndarray) -> Axis:
    """The axis of the body along which the slices of a series lie one behind the other."""
    return AXES[int(np.abs(affine[:3, 0]).argmax())]


def stack(
    headers: Sequence[Header], root: Path, *, window: FileWindow, voi: int | str, max_voxels: int
) -> tuple[Volume, np.ndarray, tuple[int, int, int], Scale]:
    """The volume of slices `in_order`, without label maps.

    Returns:
        The volume; its affine as stored, from (slice, row, column) to LPS millimetres, with its shape, which
        segmentations are brought to; and how intensities become grey levels.

    Raises:
        BadVolume: a slice can't be read, isn't grey, or there are too many voxels.
    """
    first = headers[0]
    voxels = len(headers) * first.rows * first.columns
    if voxels > max_voxels:
        raise BadVolume("volume is too large", f"{voxels} voxels, {max_voxels} allowed")
    array: np.ndarray | None = None
    for index, header in enumerate(headers):
        path = root / header.path
        try:
            data = open_dataset(path)
            if str(data.get("PhotometricInterpretation", "")) not in GREY:
                raise BadVolume("series of colour pictures", f"{len(headers)} files")
            plane = intensities(data, path)
        except BadPixels as bad:
            raise BadVolume(bad.reason, bad.detail) from bad
        except (OSError, ValueError) as error:
            if isinstance(error, BadVolume):
                raise
            raise BadVolume("file can't be read", type(error).__name__) from error
        if array is None:
            array = np.empty((len(headers), *plane.shape), dtype=np.float32)
        if plane.shape != array.shape[1:]:
            raise BadVolume(MIXED, f"{len(headers)} files")
        array[index] = plane
        if index == len(headers) // 2:
            middle = data
    assert array is not None
    affine = affine_of(headers, middle)
    try:
        scale = _scale(middle, array, window=window, voi=voi)
    except BadPixels as bad:
        raise BadVolume(bad.reason, bad.detail) from bad
    if str(middle.PhotometricInterpretation) == "MONOCHROME1":
        straight = scale
        scale = Scale(lambda values: 255 - straight.apply(values), f"{scale.text}, turned round")
    turned, ras = to_ras(array, LPS_TO_RAS @ affine)
    shape = (array.shape[0], array.shape[1], array.shape[2])
    return Volume(turned, ras), affine, shape, scale


def affine_of(headers: Sequence[Header], data: object) -> np.ndarray:
    """From (slice, row, column) to LPS millimetres (PS3.3 C.7.6.2.1.1)."""
    spacing = getattr(data, "PixelSpacing", None)
    if spacing is None or len(spacing) != 2:
        raise BadVolume("series without a pixel spacing")
    axes = np.array(headers[0].orientation, dtype=float)
    first, last = (np.array(headers[at].position, dtype=float) for at in (0, -1))
    affine = np.eye(4)
    affine[:3, 0] = (last - first) / (len(headers) - 1)
    affine[:3, 1] = axes[3:] * float(spacing[0])
    affine[:3, 2] = axes[:3] * float(spacing[1])
    affine[:3, 3] = first
    return affine


def _scale(data: object, array: np.ndarray, *, window: FileWindow, voi: int | str) -> Scale:
    modality = modality_of(str(getattr(data, "Modality", "")))
    if window == "file":
        return scale_of(data, array, window="file", voi=voi)
    chosen: Window = window
    return scale_for(chosen, array, modality=modality)
