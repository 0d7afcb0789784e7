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

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.volume_headers import (
    NO_GREY_LEVELS,
    UNREADABLE,
    Segment,
    is_nifti_start,
    read_header,
)

TOO_LARGE = "volume is too large"
FEW_AXES = "volume of less than two axes"
MANY_AXES = "volume of more than four axes"
NO_ORIENTATION = "volume without a usable orientation"
OTHER_GRID = "mask on another grid than its volume"
ROUNDED = 0.05  # labels may lie so far from whole numbers: the rounding of a stored slope


# --- geometry -----------------------------------------------------------------------------------


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip axes so that they run nearest to Right, Anterior, Superior; a view, not a copy.

    This is what `nibabel.as_closest_canonical` does, for arrays of any origin.

    Args:
        array: ``[I, J, K]`` or ``[I, J, K, C]``.
        affine: ``[4, 4]``, from indices to RAS+ millimetres.

    Raises:
        Unusable: the affine is not invertible or not finite.
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


def on_grid(
    labels: np.ndarray, affine: np.ndarray, grid: Grid, *, tolerance: float = 0.1
) -> np.ndarray:
    """Return a label map on a volume's grid: as it is, or laid into it where it was cut out of it.

    Args:
        labels: ``[x, y, z]`` in RAS+; a part of the grid, moved by whole voxels.
        affine: of ``labels``.
        grid: of the volume.
        tolerance: how far any corner may lie from its place, in voxels of the smallest spacing.

    Raises:
        Unusable: the grids are not the same.
    """
    shape, spacing = grid.array.shape[:3], np.array(spacing_of(grid.affine))
    corners = np.array([[*at, 1.0] for at in np.ndindex(2, 2, 2)])
    corners[:, :3] *= np.array(labels.shape) - 1
    found = (corners @ (np.linalg.inv(grid.affine) @ affine).T)[:, :3]
    shift = np.rint(found[0]).astype(int)
    distance = np.linalg.norm((found - corners[:, :3] - shift) * spacing, axis=1).max()
    if distance > tolerance * spacing.min():
        difference = f"corners lie up to {distance:.3g} mm apart, voxels are {spacing.min():.3g} mm"
        raise Unusable(OTHER_GRID, f"{_size(labels.shape)} against {_size(shape)}; {difference}")
    if (shift < 0).any() or (shift + labels.shape > shape).any():
        raise Unusable(
            OTHER_GRID, f"{_size(labels.shape)} voxels from {shift.tolist()} in {_size(shape)}"
        )
    if labels.shape == shape:
        return labels
    whole = np.zeros(shape, dtype=labels.dtype)
    whole[tuple(slice(at, at + n) for at, n in zip(shift, labels.shape, strict=True))] = labels
    return whole


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(length) for length in shape)


# --- slices -------------------------------------------------------------------------------------

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


# --- loading ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """An array with its place in the body.

    Args:
        array: ``[X, Y, Z]`` or ``[X, Y, Z, C]``; a view of what was read.
        affine: ``[4, 4]``, to RAS+ millimetres.
        notes: what is to be kept in ``Sample.preprocessing``.
        channels: of the file.
        flat: whether it was stored with two axes.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: dict[str, str] = field(default_factory=dict)
    channels: int = 1
    flat: bool = False


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Label maps of one file.

    Args:
        layers: unsigned ``[X, Y, Z]`` each; more than one where structures overlap.
        affine: ``[4, 4]``, to RAS+ millimetres.
        segments: names of the values, where the file has them (3D Slicer).
        notes: as `Grid.notes`.
    """

    layers: tuple[np.ndarray, ...]
    affine: np.ndarray
    segments: tuple[Segment, ...]
    notes: dict[str, str]


def load(
    path: Path, *, channel: int | None = None, max_voxels: int, within: Sequence[Path] = ()
) -> Grid:
    """Return the finite intensities of a volume, ``[X, Y, Z]``.

    Args:
        path: of the file.
        channel: index along the fourth axis, if there is one.
        max_voxels: a file that declares more is refused before it is read.
        within: folders that a file of voxels, which a header names, may lie in; default: the header's.

    Raises:
        Unusable: the reason says why.
    """
    file = _checked(path, max_voxels, within)
    count = file.grid[3]
    if channel is None and count > 1:
        raise Unusable("volume of several channels", f"{count}; say `channel` in the job")
    if channel is not None and not 0 <= channel < count:
        raise Unusable("no such channel", f"{channel}; there are {count}, from 0")
    return file.intensities(channel or 0)


def load_labels(
    path: Path,
    *,
    channel: int | None = None,
    channels: int = 1,
    max_voxels: int,
    within: Sequence[Path] = (),
) -> LabelMap:
    """Return the label maps of a file: whole numbers from 0, in the smallest unsigned type.

    A fourth axis holds 3D Slicer's layers, or the same channels as the volume's.

    Args:
        path, max_voxels, within: see `load`.
        channel, channels: which one of how many was taken of the volume.

    Raises:
        Unusable: as `load`, and for fractions and negative numbers.
    """
    file = _checked(path, max_voxels, within)
    layers: Sequence[int] = (0,)
    if file.segments:
        layers = range(file.grid[3])
    elif file.grid[3] > 1:
        if channel is None or file.grid[3] != channels:
            detail = (
                f"{file.grid[3]} beside a volume of {channels}; save each as a file, with {{label}}"
            )
            raise Unusable("volume of several channels", f"{detail} in the pattern `masks`")
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
    file = VolumeFile(path, within)
    if not file.oriented:
        detail = (
            "the header doesn't say where left and right are (sform, qform, space, TransformMatrix)"
        )
        raise Unusable("volume without an orientation", detail)
    *spatial, _ = file.grid
    if int(np.prod(spatial, dtype=object)) > max_voxels:
        size = _size(tuple(spatial))
        raise Unusable(TOO_LARGE, f"{size} are more than `max_voxels`, {max_voxels}")
    return file


def is_nifti(path: Path) -> bool:
    """Return True for NIfTI in one file, plain or in gzip, by its content."""
    try:
        with path.open("rb") as file:
            start = file.read(348)
        if start[:2] == b"\x1f\x8b":
            with gzip.open(path) as unpacked:
                start = unpacked.read(348)
    except (OSError, EOFError, zlib.error):
        return False
    return is_nifti_start(start)


class VolumeFile:
    """A volume whose header is read; its voxels are read by `array` and `intensities`.

    ``shape`` is as stored, ``affine`` leads to RAS+, ``oriented`` is False if the file does not say how the
    volume lies in the body; ``segments`` are those of 3D Slicer.

    Args:
        path: of the file.
        within: folders that a file of voxels, which a header names, may lie in; default: the header's.

    Raises:
        Unusable: the header can't be read, or its voxels are no numbers.
    """

    def __init__(self, path: Path, within: Sequence[Path] = ()) -> None:
        self._path = path
        with _library_errors(path):
            self._header = header = read_header(path, within)
        self.shape, self.affine, self.oriented = header.shape, header.affine, header.oriented
        self.segments = header.segments
        if header.dtype.kind not in "iufb":
            raise Unusable(NO_GREY_LEVELS, str(header.dtype)[:60])

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """``(I, J, K, C)``; a flat image has one slice.

        Raises:
            Unusable: there are more axes, or an axis of no length.
        """
        shape = list(self.shape)
        if self._header.channel_axis is not None:
            shape = [*_without(shape, self._header.channel_axis), shape[self._header.channel_axis]]
        if len(shape) < 2 or min(shape) < 1:
            raise Unusable(FEW_AXES, _size(self.shape))
        i, j, k = (*shape, 1)[:3]
        rest = [length for length in shape[3:] if length != 1]
        if len(rest) > 1:
            raise Unusable(MANY_AXES, _size(self.shape))
        return i, j, k, rest[0] if rest else 1

    def array(self, channel: int | None) -> np.ndarray:
        """Return ``[I, J, K]`` of one channel, ``[I, J, K, C]`` for None."""
        with _library_errors(self._path):
            return self._array(channel)

    def _array(self, channel: int | None) -> np.ndarray:
        from nibabel.volumeutils import apply_read_scaling

        header = self._header
        *spatial, count = self.grid
        size = int(np.prod(spatial, dtype=object))
        if header.channel_axis is None and channel is not None:
            data = header.voxels(channel * size, size).reshape(spatial, order="F")
        else:
            data = header.voxels().reshape(self.shape, order="F")
            if header.channel_axis is None:
                data = data.reshape((*spatial, count), order="F")
            else:
                data = np.moveaxis(data, header.channel_axis, -1)
            data = data if channel is None else data[..., channel]
        data = data.astype(data.dtype.newbyteorder("="), copy=False)
        if header.slope == 1 and header.inter == 0:
            return data
        return np.asarray(apply_read_scaling(data, header.slope, header.inter), dtype=np.float32)

    def intensities(self, channel: int | None) -> Grid:
        """Return one or all channels in RAS+; what is not finite becomes the smallest value, with a note.

        Raises:
            Unusable: no voxel is finite, or the file can't be read.
        """
        from nibabel.orientations import aff2axcodes

        array = self.array(channel)
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
        array, affine = to_ras(array, self.affine)
        notes["stored as"] = "".join(str(code) for code in aff2axcodes(self.affine))
        return Grid(array, affine, notes, self.grid[3], len(self.shape) == 2)


def _without(values: Sequence[int], at: int) -> list[int]:
    return [value for number, value in enumerate(values) if number != at]


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for a bad file into Unusable, without its folder."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError
    from nibabel.wrapstruct import WrapStructError

    bad = (
        *(ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError, zlib.error),
        *(OSError, EOFError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError),
        MemoryError,  # a header that promises more than there is
    )
    try:
        yield
    except Unusable:
        raise
    except bad as error:
        text = " ".join(str(error).replace(str(path), path.name).split())
        raise Unusable(UNREADABLE, f"{type(error).__name__}: {text[-300:]}") from error
