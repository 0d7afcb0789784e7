# SPDX-License-Identifier: Apache-2.0

"""Slices of a volume in RAS+, turned the way radiologists look at them.

=====  =========  ==========================  ===========================
axis   plane      top of the image            left of the image
=====  =========  ==========================  ===========================
``x``  sagittal   superior                    anterior
``y``  coronal    superior                    the patient's right
``z``  axial      anterior                    the patient's right
=====  =========  ==========================  ===========================

So an axial image is what a DICOM viewer shows of an axial series. An index counts voxels along the RAS+ axis
from its low end: ``z`` 0 is the slice nearest the feet.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Axis = Literal["x", "y", "z"]
AXES: tuple[Axis, ...] = ("x", "y", "z")
PLANES: dict[Axis, str] = {"x": "sagittal", "y": "coronal", "z": "axial"}


def plane(array: np.ndarray, axis: Axis, index: int) -> np.ndarray:
    """Return ``[H, W]``, a view: one slice of ``[X, Y, Z]``, turned as the module's table says."""
    if axis == "x":
        return array[index, ::-1, ::-1].T
    if axis == "y":
        return array[::-1, index, ::-1].T
    return array[::-1, ::-1, index].T


def pixel_spacing(spacing: tuple[float, float, float], axis: Axis) -> tuple[float, float]:
    """Return millimetres from row to row and from column to column of an axis' slices."""
    x, y, z = spacing
    return {"x": (z, y), "y": (z, x), "z": (y, x)}[axis]


def square_size(shape: tuple[int, ...], spacing: tuple[float, float]) -> tuple[float, float] | None:
    """Return width and height with square pixels of the finer spacing, not yet rounded.

    Args:
        shape: ``(H, W)``.
        spacing: see `pixel_spacing`.

    Returns:
        None if the pixels are square within 1 %.
    """
    fine = min(spacing)
    if max(spacing) <= fine * 1.01:
        return None
    return shape[1] * spacing[1] / fine, shape[0] * spacing[0] / fine
