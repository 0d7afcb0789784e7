# SPDX-License-Identifier: Apache-2.0

"""DICOM series and enhanced objects -> voxels and their grey levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.preprocess.volumes import Volume
from data_tools.readers.dicom_headers import modality_of
from data_tools.readers.volume_samples import FileWindow, scale_for
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import Header
from gmai_xtuner.core.imaging.dicom_pixels import GREY, file_scale, intensities, photometric_of
from gmai_xtuner.core.imaging.dicom_stacks import MIXED, Stack, stack_of
from gmai_xtuner.core.imaging.volumes import LPS_TO_RAS, TOO_LARGE, to_ras
from gmai_xtuner.core.imaging.windows import Scale

COLOURED = "series of colour pictures"

ENHANCED = (
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
    "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
)


@dataclass(frozen=True, slots=True)
class Slices:
    """Slices one behind the other, as stored.

    Args:
        array: float32 ``[slice, row, column]``.
        stack: their place.
        scale: how intensities become grey levels.
    """

    array: np.ndarray
    stack: Stack
    scale: Scale

    def volume(self) -> Volume:
        """Return the voxels in RAS+, without label maps."""
        return Volume(*to_ras(self.array, LPS_TO_RAS @ self.stack.affine))


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
    scale = own or scale_for(chosen, values, modality=modality_of(data))
    white_is_low = photometric_of(data) == "MONOCHROME1"
    return scale.inverted("MONOCHROME1 turned round") if white_is_low else scale


def load_slices(
    planes: Sequence[Header],
    data_of: Callable[[Header], Any],
    *,
    window: FileWindow,
    voi: int | str,
    max_voxels: int,
) -> Slices:
    """Read the slices of a series or the frames of an object; the middle one's window is that of all.

    Args:
        planes: their headers.
        data_of: returns the data set of one.
        window, voi, max_voxels: see `dicom.Options`.

    Raises:
        Unusable: they make no stack, a slice can't be read or isn't grey, or there are too many voxels.
    """
    stack = stack_of(planes)
    count, first = len(planes), stack.planes[0]
    if (voxels := count * first.rows * first.columns) > max_voxels:
        raise Unusable(TOO_LARGE, f"{voxels} voxels, {max_voxels} allowed")
    array: np.ndarray | None = None
    for index, plane in enumerate(stack.planes):
        data = data_of(plane)
        if photometric_of(data) not in GREY:
            raise Unusable(COLOURED, f"{count} images")
        values = intensities(data, plane.frame)
        if array is None:
            array = np.empty((count, *values.shape), dtype=np.float32)
        if values.shape != array.shape[1:]:
            raise Unusable(MIXED, f"{count} images")
        array[index] = values
        if index == count // 2:
            middle, frame = data, plane.frame
    assert array is not None
    return Slices(array, stack, scale_of(middle, array, frame=frame, window=window, voi=voi))
