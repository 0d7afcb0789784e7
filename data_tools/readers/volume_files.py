"""Volumes as files -> arrays in RAS+: NIfTI by nibabel, NRRD and MetaImage by SimpleITK."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.preprocess.volumes import LPS_TO_RAS, orientation, to_ras
from data_tools.readers.volume_samples import BadVolume

NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
SIMPLEITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = NIBABEL_SUFFIXES + SIMPLEITK_SUFFIXES

UNREADABLE = "volume can't be read"
TOO_LARGE = "volume is too large"

# A header may name the file of the voxels: `ElementDataFile = x` of MetaImage, `data file: x` of NRRD.
_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.I | re.M)
_PLAIN_NAME = re.compile(r"[\w.+ -]+")


@dataclass(frozen=True, slots=True)
class Grid:
    """An array with its place in the body.

    Args:
        array: ``[X, Y, Z]`` in RAS+; a view of what was read.
        affine: ``[4, 4]``, to RAS+ millimetres.
        notes: what is to be kept in ``Sample.preprocessing``.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: dict[str, str] = field(default_factory=dict)


def load(path: Path, *, channel: int | None = None, max_voxels: int) -> Grid:
    """The intensities of a volume, finite.

    Args:
        path: of the file.
        channel: index along the fourth axis, if there is one.
        max_voxels: see `volume_samples.VolumeOptions`.

    Raises:
        BadVolume: it can't be read; the reason says why.
    """
    array, affine = _read(path, channel, max_voxels)
    if array.dtype.kind not in "iufb":
        raise BadVolume("voxels that are no grey levels", f"type {array.dtype}")
    notes = {}
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        bad = ~np.isfinite(array)
        count = int(np.count_nonzero(bad))
        if count == bad.size:
            raise BadVolume("volume without a finite voxel")
        if count:
            array = np.where(bad, array[~bad].min(), array)
            notes["not finite"] = f"{count} voxels set to the smallest value"
    array, turned = _turn(array, affine)
    return Grid(array, turned, notes | {"stored as": orientation(affine)})


def load_labels(path: Path, *, max_voxels: int) -> Grid:
    """A label map: whole numbers from 0, in the smallest unsigned type.

    Raises:
        BadVolume: as `load`, and for fractions and negative numbers.
    """
    array, affine = _read(path, None, max_voxels)
    if array.dtype.kind not in "iufb":
        raise BadVolume("label map that holds no numbers", f"type {array.dtype}")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise BadVolume("label map with fractions", "nearest neighbour keeps labels whole")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > 2**32 - 1:
        raise BadVolume("label map with values below 0 or beyond 32 bits", f"{low} to {high}")
    array, turned = _turn(array.astype(np.min_scalar_type(high)), affine)
    return Grid(array, turned)


def channels(path: Path) -> int:
    """Length of the fourth axis by the header; 1 if there is none.

    Raises:
        BadVolume: the header can't be read.
    """
    shape = _Header(path).shape
    return int(np.prod(shape[3:], dtype=object)) if len(shape) > 3 else 1


def _turn(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        return to_ras(array, affine)
    except ValueError as error:
        raise BadVolume("volume without a usable orientation", str(error)) from error


def _read(path: Path, channel: int | None, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    """``[I, J, K]`` as stored and its affine to RAS+."""
    header = _Header(path)
    shape = tuple(header.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    spatial = shape[:3]
    if len(shape) < 3 or 0 in shape:
        raise BadVolume("volume of less than three axes", " x ".join(map(str, header.shape)))
    voxels = int(np.prod(spatial, dtype=object))
    if voxels > max_voxels:
        size = " x ".join(map(str, spatial))
        raise BadVolume(TOO_LARGE, f"{size} are more than {max_voxels} voxels")
    rest = [length for length in shape[3:] if length != 1]
    if len(rest) > 1:
        raise BadVolume("volume of more than four axes", " x ".join(map(str, header.shape)))
    count = rest[0] if rest else 1
    if channel is None and count > 1:
        raise BadVolume("volume of several channels", f"{count}; say `channel` in the job")
    if channel is not None and not 0 <= channel < count:
        raise BadVolume("no such channel", f"{channel}; there are {count}, from 0")
    return header.array(channel or 0), header.affine


class _Header:
    """Shape and affine without the voxels.

    ``shape`` is ``(I, J, K)`` or longer; ``affine`` leads to RAS+.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        name = path.name.lower()
        if not name.endswith(SUFFIXES):
            raise BadVolume(UNREADABLE, f"the suffix is none of {', '.join(SUFFIXES)}")
        try:
            if name.endswith(NIBABEL_SUFFIXES):
                self._open_with_nibabel()
            else:
                self._open_with_simpleitk()
        except _library_errors() as error:
            raise BadVolume(UNREADABLE, _words(error, path)) from error

    def array(self, channel: int) -> np.ndarray:
        """``[I, J, K]`` of one channel."""
        try:
            return self._array(channel)
        except _library_errors() as error:
            raise BadVolume(UNREADABLE, _words(error, self.path)) from error

    def _open_with_nibabel(self) -> None:
        import nibabel

        image: Any = nibabel.load(self.path)
        if not isinstance(image, nibabel.spatialimages.SpatialImage):
            raise BadVolume(UNREADABLE, "no image in it")
        header: Any = image.header
        if "sform_code" in header and not (int(header["sform_code"]) or int(header["qform_code"])):
            raise BadVolume(
                "volume without an orientation",
                "neither sform nor qform: left and right are unknown",
            )
        self.shape = tuple(int(length) for length in image.shape)
        self.affine = np.asarray(image.affine, dtype=np.float64)

        def array(channel: int) -> np.ndarray:
            proxy: Any = image.dataobj
            scaled = proxy.slope != 1 or proxy.inter != 0
            data = proxy[(slice(None),) * 3 + (Ellipsis, channel) if _many(self.shape) else ...]
            data = np.asarray(data).reshape(self.shape[:3])
            return data.astype(np.float32) if scaled else data

        self._array = array

    def _open_with_simpleitk(self) -> None:
        import SimpleITK

        _refuse_foreign_data(self.path)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(self.path))
        reader.ReadImageInformation()
        size = reader.GetSize()
        components = reader.GetNumberOfComponents()
        if "complex" in SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()):
            raise BadVolume("voxels that are no grey levels", "complex numbers")
        self.shape = (*size, components) if components > 1 else tuple(size)
        dimension = len(size)
        direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
        lps = np.eye(4)
        if dimension >= 3:
            lps[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
            lps[:3, 3] = reader.GetOrigin()[:3]
        self.affine = LPS_TO_RAS @ lps

        def array(channel: int) -> np.ndarray:
            if dimension == 4 and size[3] > 1:
                reader.SetExtractIndex([0, 0, 0, channel])
                reader.SetExtractSize([*size[:3], 0])
            data = SimpleITK.GetArrayFromImage(reader.Execute())
            if components > 1:
                data = data[..., channel]
            return data.reshape(size[2::-1]).transpose(2, 1, 0)

        self._array = array


def _many(shape: tuple[int, ...]) -> bool:
    return len(shape) > 3 and shape[-1] > 1


def _refuse_foreign_data(path: Path) -> None:
    """A header that names its voxels' file may name any file of this machine."""
    with path.open("rb") as file:
        match = _DATA_FILE.search(file.read(2**16))
    if match is None:
        return
    name = match[1].decode("latin-1")
    if name.upper() == "LOCAL":
        return
    if not _PLAIN_NAME.fullmatch(name) or name in (".", "..") or name.upper().startswith("LIST"):
        raise BadVolume(
            "path outside the source", f"the header takes its voxels from {name[:200]!r}"
        )
    data = path.parent / name
    if data.is_symlink() or not data.is_file():
        raise BadVolume(UNREADABLE, f"the header takes its voxels from {name!r}, which isn't there")


def _library_errors() -> tuple[type[Exception], ...]:
    """What nibabel and SimpleITK raise for a bad file."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    return (
        *(ImageFileError, HeaderDataError, WrapStructError, zlib.error),
        *(OSError, EOFError, ValueError, RuntimeError, OverflowError, KeyError, TypeError),
        MemoryError,  # a header that promises more than there is
    )


def _words(error: Exception, path: Path) -> str:
    """The library's text without the path of this machine."""
    text = " ".join(str(error).replace(str(path), path.name).split())
    return f"{type(error).__name__}: {text[-300:]}"
