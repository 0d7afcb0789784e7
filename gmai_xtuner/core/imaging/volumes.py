# SPDX-License-Identifier: Apache-2.0

"""Volumes as files -> arrays in RAS+; `volume_headers` knows the formats.

``X``, ``Y`` and ``Z`` are the lengths of the three axes, which run towards the patient's Right, Anterior and
Superior (NIfTI's RAS+) once an array has gone through `to_ras`; ``I``, ``J`` and ``K`` those of the axes as
stored; ``C`` counts channels or time points. An oblique volume is turned to the nearest axes, not resampled.

Slices are turned the way radiologists look at them:

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

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.volume_headers import Segment, VolumeFile, open_volume, size_text

TOO_LARGE = "volume is too large"
NO_ORIENTATION = "volume without a usable orientation"
OTHER_GRID = "mask on another grid than its volume"
OFF_GRID = 0.1  # of the smallest spacing
SHEARED = 0.02  # of the cosine: two pixels in a hundred
ROUNDED = 0.05  # labels may lie so far from whole numbers: the rounding of a stored slope


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn ``[I, J, K(, C)]`` so that its axes run nearest to Right, Anterior, Superior; a view, not a copy.

    This is what `nibabel.as_closest_canonical` does, for arrays of any origin. An affine ``[4, 4]``, from
    indices to RAS+ millimetres, that can't be inverted is `Unusable`.
    """
    from nibabel import orientations

    affine = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise Unusable(NO_ORIENTATION, "the affine can't be inverted")
    turn = orientations.io_orientation(affine)
    if np.isnan(turn).any():
        raise Unusable(NO_ORIENTATION, "the affine leaves an axis without a direction")
    turned = orientations.apply_orientation(array, turn)
    return turned, affine @ orientations.inv_ornt_aff(turn, array.shape[:3])


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Return millimetres from voxel to voxel along each axis."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def on_grid(labels: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Return a label map in RAS+ on a volume's grid: as it is, or laid into it where it was cut out of it.

    `Unusable` if a corner lies off by more than `OFF_GRID` of the smallest spacing, or outside.
    """
    shape, spacing = grid.array.shape[:3], np.array(spacing_of(grid.affine))
    own = size_text(labels.shape)
    corners = np.array([[*at, 1.0] for at in np.ndindex(2, 2, 2)])
    corners[:, :3] *= np.array(labels.shape) - 1
    found = (corners @ (np.linalg.inv(grid.affine) @ affine).T)[:, :3]
    shift = np.rint(found[0]).astype(int)
    distance = np.linalg.norm((found - corners[:, :3] - shift) * spacing, axis=1).max()
    if distance > OFF_GRID * spacing.min():
        difference = f"corners lie up to {distance:.3g} mm apart, voxels are {spacing.min():.3g} mm"
        raise Unusable(OTHER_GRID, f"{own} against {size_text(shape)}; {difference}")
    if (shift < 0).any() or (shift + labels.shape > shape).any():
        raise Unusable(OTHER_GRID, f"{own} voxels from {shift.tolist()} in {size_text(shape)}")
    if labels.shape == shape:
        return labels
    whole = np.zeros(shape, dtype=labels.dtype)
    whole[tuple(slice(at, at + n) for at, n in zip(shift, labels.shape, strict=True))] = labels
    return whole


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


def is_sheared(affine: np.ndarray, axis: Axis) -> bool:
    """Return whether a cut across an axis is distorted: its rows and columns form no right angle."""
    rows, columns = (affine[:3, at] for at in range(3) if AXES[at] != axis)
    cosine = rows @ columns / (np.linalg.norm(rows) * np.linalg.norm(columns))
    return bool(abs(cosine) > SHEARED)


def square_size(shape: tuple[int, ...], spacing: tuple[float, float]) -> tuple[float, float] | None:
    """Return width and height with square pixels of the finer spacing, not yet rounded.

    None if the pixels of ``[H, W]`` are square within 1 %.
    """
    fine = min(spacing)
    if max(spacing) <= fine * 1.01:
        return None
    return shape[1] * spacing[1] / fine, shape[0] * spacing[0] / fine


@dataclass(frozen=True, slots=True)
class Grid:
    """An array ``[X, Y, Z]`` or ``[X, Y, Z, C]`` with its place in the body, ``[4, 4]`` to RAS+ millimetres.

    ``notes`` are kept in ``Sample.preprocessing``; ``channels`` are those of the file; ``flat``: it was
    stored with two axes.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: dict[str, str] = field(default_factory=dict)
    channels: int = 1
    flat: bool = False


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Label maps of one file, unsigned ``[X, Y, Z]`` each; more than one where structures overlap.

    ``segments`` are the names of the values, where the file has them (3D Slicer); the rest as of `Grid`.
    """

    layers: tuple[np.ndarray, ...]
    affine: np.ndarray
    segments: tuple[Segment, ...]
    notes: dict[str, str]


def load(
    path: Path, *, channel: int | None = None, max_voxels: int, within: Sequence[Path] = ()
) -> Grid:
    """Return the finite intensities of a volume, ``[X, Y, Z]``, or raise `Unusable`.

    ``channel`` is the index along a fourth axis. A file that declares more than ``max_voxels`` is refused
    before it is read. A file of voxels, which a header names, may lie ``within`` these folders; default: the
    header's.
    """
    file = _checked(path, max_voxels, within)
    count = file.grid[3]
    if channel is None and count > 1:
        raise Unusable("volume of several channels", f"{count}; say `channel` in the job")
    if channel is not None and not 0 <= channel < count:
        raise Unusable("no such channel", f"{channel}; there are {count}, from 0")
    return intensities(file, channel or 0)


def load_labels(
    path: Path,
    *,
    channel: int | None = None,
    channels: int = 1,
    max_voxels: int,
    within: Sequence[Path] = (),
) -> LabelMap:
    """Return the label maps of a file: whole numbers from 0, in the smallest unsigned type.

    A fourth axis holds 3D Slicer's layers, or the same ``channels`` as the volume's, of which ``channel`` was
    taken. Else as `load`; fractions and negative numbers are `Unusable`.
    """
    file = _checked(path, max_voxels, within)
    layers: Sequence[int] = (0,)
    if file.segments:
        layers = range(file.grid[3])
    elif file.grid[3] > 1:
        if channel is None or file.grid[3] != channels:
            advice = "save each as a file, with {label} in the pattern `masks`"
            detail = f"{file.grid[3]} beside a volume of {channels}; {advice}"
            raise Unusable("volume of several channels", detail)
        layers = (channel,)
    notes: dict[str, str] = {}
    found = []
    for layer in layers:
        array = file.array(layer)
        if array.dtype.kind == "f":
            whole = np.rint(array)
            distance = float(np.abs(array - whole).max(initial=0))
            if not distance <= ROUNDED:
                raise Unusable("label map with fractions", "nearest neighbour keeps labels whole")
            if distance:
                notes["labels"] = f"rounded by up to {distance:.2g}"
            array = whole
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if low < 0 or high > 2**32 - 1:
            raise Unusable("label map with values below 0 or beyond 32 bits", f"{low} to {high}")
        turned, affine = to_ras(array.astype(np.min_scalar_type(high)), file.affine)
        found.append(turned)
    return LabelMap(tuple(found), affine, file.segments, notes)


def _checked(path: Path, max_voxels: int, within: Sequence[Path]) -> VolumeFile:
    file = open_volume(path, within)
    if not file.oriented:
        problem = "the header doesn't say where left and right are"
        detail = f"{problem} (sform, qform, space, TransformMatrix)"
        raise Unusable("volume without an orientation", detail)
    spatial = file.grid[:3]
    if math.prod(spatial) > max_voxels:
        raise Unusable(TOO_LARGE, f"{size_text(spatial)} are more than `max_voxels`, {max_voxels}")
    return file


def intensities(file: VolumeFile, channel: int | None) -> Grid:
    """Return one or all channels in RAS+; what is not finite becomes the smallest value, with a note."""
    from nibabel.orientations import aff2axcodes

    array = file.array(channel)
    notes = {}
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        bad = ~np.isfinite(array)
        count = int(np.count_nonzero(bad))
        if count == bad.size:
            raise Unusable("volume without a finite voxel")
        if count:
            array = np.where(bad, array[~bad].min(), array)
            notes["not finite"] = f"{count} voxels set to the smallest value"
    array, affine = to_ras(array, file.affine)
    notes["stored as"] = "".join(str(code) for code in aff2axcodes(file.affine))
    return Grid(array, affine, notes, file.grid[3], len(file.shape) == 2)
