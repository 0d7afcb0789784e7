"""Volumes as files -> arrays in RAS+: NIfTI and MGH by nibabel, NRRD and MetaImage by SimpleITK.

``X``, ``Y`` and ``Z`` are the lengths of the three axes, which run towards the patient's Right, Anterior and
Superior (NIfTI's RAS+) once an array has gone through `to_ras`; ``I``, ``J`` and ``K`` those of the axes as
stored; ``C`` counts channels or time points. An oblique volume is turned to the nearest axes, not resampled.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gmai_xtuner.core.errors import Unusable

# DICOM and ITK count positions towards Left, Posterior and Superior, NIfTI towards Right, Anterior, Superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
SIMPLEITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = NIBABEL_SUFFIXES + SIMPLEITK_SUFFIXES

UNREADABLE = "volume can't be read"
TOO_LARGE = "volume is too large"
FEW_AXES = "volume of less than three axes"
MANY_AXES = "volume of more than four axes"
NO_GREY_LEVELS = "voxels that are no grey levels"
NO_ORIENTATION = "volume without a usable orientation"

# A header may name the file of the voxels: `ElementDataFile = x` of MetaImage, `data file: x` of NRRD.
_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.I | re.M)
_PLAIN_NAME = re.compile(r"[\w.+ -]+")


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


def same_grid(
    shape: tuple[int, ...],
    affine: np.ndarray,
    other_shape: tuple[int, ...],
    other_affine: np.ndarray,
    *,
    tolerance: float = 0.1,
) -> str:
    """Return why two grids are not the same, or an empty text.

    Args:
        tolerance: how far any corner may lie from its counterpart, in voxels of the smallest spacing.
    """
    if shape != other_shape:
        return f"{_size(shape)} voxels against {_size(other_shape)}"
    corners = np.array([[*at, 1.0] for at in np.ndindex(2, 2, 2)])
    corners[:, :3] *= np.array(shape) - 1
    distance = float(np.linalg.norm(corners @ (affine - other_affine).T, axis=1).max())
    spacing = min(spacing_of(affine))
    if distance > tolerance * spacing:
        return f"corners lie up to {distance:.3g} mm apart, voxels are {spacing:.3g} mm"
    return ""


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(length) for length in shape)


# --- loading ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """An array with its place in the body.

    Args:
        array: ``[X, Y, Z]`` or ``[X, Y, Z, C]``; a view of what was read.
        affine: ``[4, 4]``, to RAS+ millimetres.
        notes: what is to be kept in ``Sample.preprocessing``.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: dict[str, str] = field(default_factory=dict)


def load(path: Path, *, channel: int | None = None, max_voxels: int) -> Grid:
    """Return the finite intensities of a volume, ``[X, Y, Z]``.

    Args:
        path: of the file.
        channel: index along the fourth axis, if there is one.
        max_voxels: a file that declares more is refused before it is read.

    Raises:
        Unusable: the reason says why.
    """
    return _checked(path, channel, max_voxels).intensities(channel or 0)


def load_labels(path: Path, *, max_voxels: int) -> Grid:
    """Return a label map: whole numbers from 0, in the smallest unsigned type.

    Raises:
        Unusable: as `load`, and for fractions and negative numbers.
    """
    file = _checked(path, None, max_voxels)
    array = file.array(0)
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise Unusable("label map with fractions", "nearest neighbour keeps labels whole")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > 2**32 - 1:
        raise Unusable("label map with values below 0 or beyond 32 bits", f"{low} to {high}")
    return Grid(*to_ras(array.astype(np.min_scalar_type(high)), file.affine))


def _checked(path: Path, channel: int | None, max_voxels: int) -> VolumeFile:
    file = VolumeFile(path)
    if not file.oriented:
        raise Unusable(
            "volume without an orientation", "neither sform nor qform: left and right are unknown"
        )
    if len(file.shape) < 3:
        raise Unusable(FEW_AXES, _size(file.shape))
    *spatial, count = file.grid
    if int(np.prod(spatial, dtype=object)) > max_voxels:
        raise Unusable(TOO_LARGE, f"{_size(tuple(spatial))} are more than {max_voxels} voxels")
    if channel is None and count > 1:
        raise Unusable("volume of several channels", f"{count}; say `channel` in the job")
    if channel is not None and not 0 <= channel < count:
        raise Unusable("no such channel", f"{channel}; there are {count}, from 0")
    return file


def is_nifti(path: Path) -> bool:
    """Return True for NIfTI, plain or in gzip, by its content; pairs of .hdr and .img are not taken."""
    try:
        with path.open("rb") as file:
            start = file.read(348)
        if start[:2] == b"\x1f\x8b":
            with gzip.open(path) as unpacked:
                start = unpacked.read(348)
    except (OSError, EOFError, zlib.error):
        return False
    return start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0"


class VolumeFile:
    """A volume whose header is read; its voxels are read by `array` and `intensities`.

    ``shape`` is as stored, ``affine`` leads to RAS+, ``oriented`` is False if the file does not say how the
    volume lies in the body.

    Raises:
        Unusable: the header can't be read, or its voxels are no numbers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.oriented = True
        name = path.name.lower()
        if not name.endswith(SUFFIXES):
            raise Unusable(UNREADABLE, f"the suffix is none of {', '.join(SUFFIXES)}")
        with _library_errors(path):
            if name.endswith(NIBABEL_SUFFIXES):
                self._open_with_nibabel()
            else:
                self._open_with_simpleitk()

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """``(I, J, K, C)``; a flat image has one slice.

        Raises:
            Unusable: there are more axes, or an axis of no length.
        """
        shape = self.shape
        if len(shape) < 2 or 0 in shape:
            raise Unusable(FEW_AXES, _size(shape))
        i, j, k = (*shape, 1)[:3]
        rest = [length for length in shape[3:] if length != 1]
        if len(rest) > 1:
            raise Unusable(MANY_AXES, _size(shape))
        return i, j, k, rest[0] if rest else 1

    def array(self, channel: int | None) -> np.ndarray:
        """Return ``[I, J, K]`` of one channel, ``[I, J, K, C]`` for None."""
        with _library_errors(self._path):
            return self._array(channel)

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
        return Grid(array, affine, notes)

    def _open_with_nibabel(self) -> None:
        import nibabel

        image: Any = nibabel.load(self._path, mmap=False)
        if not isinstance(image, nibabel.spatialimages.SpatialImage):
            raise Unusable(UNREADABLE, "no image in it")
        header: Any = image.header
        if "sform_code" in header:
            self.oriented = bool(int(header["sform_code"]) or int(header["qform_code"]))
        stored = header.get_data_dtype()
        if stored.fields is not None or stored.kind not in "iufb":
            raise Unusable(NO_GREY_LEVELS, str(stored)[:60])
        self.shape = tuple(int(length) for length in image.shape)
        self.affine = np.asarray(image.affine, dtype=np.float64)

        def array(channel: int | None) -> np.ndarray:
            proxy: Any = image.dataobj
            *spatial, count = self.grid
            if channel is not None and count > 1 and self.shape[-1] == count:
                data = np.asarray(proxy[..., channel]).reshape(spatial)
            else:
                data = np.asarray(proxy).reshape(*spatial, count)
                data = data if channel is None else data[..., channel]
            scaled = proxy.slope != 1 or proxy.inter != 0
            return data.astype(np.float32) if scaled else data

        self._array = array

    def _open_with_simpleitk(self) -> None:
        import SimpleITK

        _refuse_foreign_data(self._path)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(self._path))
        reader.ReadImageInformation()
        size = reader.GetSize()
        components = reader.GetNumberOfComponents()
        if "complex" in SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()):
            raise Unusable(NO_GREY_LEVELS, "complex numbers")
        self.shape = (*size, components) if components > 1 else tuple(size)
        dimension = len(size)
        direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
        lps = np.eye(4)
        if dimension >= 3:
            lps[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
            lps[:3, 3] = reader.GetOrigin()[:3]
        self.affine = LPS_TO_RAS @ lps

        def array(channel: int | None) -> np.ndarray:
            if channel is None:
                return np.stack([array(each) for each in range(self.grid[3])], axis=-1)
            if dimension == 4 and size[3] > 1:
                reader.SetExtractIndex([0, 0, 0, channel])
                reader.SetExtractSize([*size[:3], 0])
            data = SimpleITK.GetArrayFromImage(reader.Execute())
            if components > 1:
                data = data[..., channel]
            return data.reshape(size[2::-1]).transpose(2, 1, 0)

        self._array = array


def _refuse_foreign_data(path: Path) -> None:
    """Check a header that names its voxels' file: it may name any file of this machine."""
    with path.open("rb") as file:
        match = _DATA_FILE.search(file.read(2**16))
    if match is None:
        return
    name = match[1].decode("latin-1")
    if name.upper() == "LOCAL":
        return
    if not _PLAIN_NAME.fullmatch(name) or name in (".", "..") or name.upper().startswith("LIST"):
        raise Unusable(
            "path outside the source", f"the header takes its voxels from {name[:200]!r}"
        )
    data = path.parent / name
    if data.is_symlink() or not data.is_file():
        problem = f"the header takes its voxels from {name!r}, which isn't there"
        raise Unusable(UNREADABLE, problem)


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """Turn what nibabel and SimpleITK raise for a bad file into Unusable, without its folder."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    bad = (
        *(ImageFileError, HeaderDataError, WrapStructError, zlib.error),
        *(OSError, EOFError, ValueError, RuntimeError, OverflowError, KeyError, TypeError),
        MemoryError,  # a header that promises more than there is
    )
    try:
        yield
    except Unusable:
        raise
    except bad as error:
        text = " ".join(str(error).replace(str(path), path.name).split())
        raise Unusable(UNREADABLE, f"{type(error).__name__}: {text[-300:]}") from error
