# SPDX-License-Identifier: Apache-2.0

"""Headers of volume files: NIfTI, Analyze and MGH by nibabel, NRRD by pynrrd, MetaImage by MetaIO's rules.

A library sees the bytes of a header and nothing else: this module opens every file itself. So a header can't
lead to a file outside the folders that the caller allows, and `VolumeFile.array` reads no more than it
promises, after comparing that with the length of the file.

``I``, ``J``, ``K`` are the axes as stored, the first runs fastest; ``C`` counts channels.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from gmai_xtuner.core.errors import Unusable

# DICOM and ITK count positions towards Left, Posterior and Superior, NIfTI towards Right, Anterior, Superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img")
SUFFIXES = (*NIFTI_SUFFIXES, ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd")

UNREADABLE = "volume can't be read"
OUTSIDE = "path outside the source"
NO_GREY_LEVELS = "voxels that are no grey levels"
FEW_AXES = "volume of less than two axes"
MANY_AXES = "volume of more than four axes"
MAX_HEADER = 2**20
MAX_GAP = 2**26  # bytes between header and voxels: NIfTI's extensions

Packing = Literal["", "gzip", "bzip2", "zlib"]
# Bytes that one byte of a packed file may stand for, at most.
_RATIOS: dict[Packing, int] = {"": 1, "gzip": 1100, "zlib": 1100, "bzip2": 2**20}


@dataclass(frozen=True, slots=True)
class Segment:
    """A structure of a segmentation by 3D Slicer: ``value`` in ``layer`` of the array."""

    name: str
    layer: int
    value: int


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """A volume whose header is read; its voxels, in ``path``, are read by `array`.

    ``shape`` and ``dtype`` are as stored; ``affine`` ``[4, 4]`` leads from indices to RAS+ millimetres;
    ``oriented``: the file says how the volume lies in the body. ``offset`` is of the first voxel in the file,
    of a packed file in what it unpacks to; -1: the voxels end where the file ends. ``packing`` ``zlib`` and
    ``bzip2`` begin at ``packed_at``. What is stored is multiplied by ``slope``, and ``inter`` added.
    ``channel_axis`` of ``shape`` counts channels, if it isn't behind the spatial ones. ``segments`` are 3D
    Slicer's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    oriented: bool
    path: Path
    offset: int
    packing: Packing = ""
    packed_at: int = 0
    slope: float = 1.0
    inter: float = 0.0
    channel_axis: int | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """``(I, J, K, C)``; a flat image has one slice. `Unusable` for more axes, or one of no length."""
        shape = list(self.shape)
        if self.channel_axis is not None:
            shape.append(shape.pop(self.channel_axis))
        if len(shape) < 2 or min(shape) < 1:
            raise Unusable(FEW_AXES, size_text(self.shape))
        i, j, k = (*shape, 1)[:3]
        rest = [length for length in shape[3:] if length != 1]
        if len(rest) > 1:
            raise Unusable(MANY_AXES, size_text(self.shape))
        return i, j, k, rest[0] if rest else 1

    def array(self, channel: int | None) -> np.ndarray:
        """Return ``[I, J, K]`` of one channel, ``[I, J, K, C]`` for None, or raise `Unusable`."""
        from nibabel.volumeutils import apply_read_scaling

        *spatial, count = self.grid
        with library_errors(self.path):
            if self.channel_axis is not None:
                whole = self._voxels(0, math.prod(self.shape)).reshape(self.shape, order="F")
                data = np.moveaxis(whole, self.channel_axis, -1)
                data = data if channel is None else data[..., channel]
            else:
                first, shape = (0, [*spatial, count]) if channel is None else (channel, spatial)
                size = math.prod(spatial)
                data = self._voxels(first * size, math.prod(shape)).reshape(shape, order="F")
            data = data.astype(data.dtype.newbyteorder("="), copy=False)
            if self.slope == 1 and self.inter == 0:
                return data
            return np.asarray(apply_read_scaling(data, self.slope, self.inter), dtype=np.float32)

    def _voxels(self, first: int, count: int) -> np.ndarray:
        size, length = self.dtype.itemsize, self.path.stat().st_size
        total = math.prod(self.shape) * size
        needed = max(self.offset, 0) + total
        if needed > (length - self.packed_at) * _RATIOS[self.packing]:
            raise Unusable(UNREADABLE, f"the header promises {needed} bytes, the file has {length}")
        out = np.empty(count, dtype=self.dtype)
        with self.path.open("rb") as file:
            start = length - total if self.offset < 0 else self.offset
            stream, bytes_ = self._unpacked(file, needed), out.view(np.uint8).data
            stream.seek(start + first * size)  # packed streams read and throw away
            done = 0
            while done < len(bytes_):
                read = stream.readinto(bytes_[done : done + 2**24])
                if not read:
                    missing = len(bytes_) - done
                    raise Unusable(
                        UNREADABLE, f"the file ends {missing} bytes before its voxels do"
                    )
                done += read
        return out

    def _unpacked(self, file: BinaryIO, needed: int) -> Any:
        file.seek(self.packed_at)
        if self.packing == "gzip":
            return gzip.GzipFile(fileobj=file)
        if self.packing == "bzip2":
            return bz2.BZ2File(file)
        if self.packing == "zlib":
            return io.BytesIO(zlib.decompressobj().decompress(file.read(), needed))
        return file


def size_text(shape: Sequence[int]) -> str:
    """Return ``4 x 5 x 6``."""
    return " x ".join(map(str, shape))


def open_volume(path: Path, within: Sequence[Path] = ()) -> VolumeFile:
    """Read the header of a volume. A ``.img`` stands for the ``.hdr`` beside it.

    The voxels' own file may lie ``within`` these folders; default: that of the header. `Unusable` if it lies
    elsewhere, or the file is no volume, damaged, or of no numbers.
    """
    with library_errors(path):
        allowed = tuple(os.path.realpath(folder) for folder in within or (path.parent,))
        name = path.name.lower()
        if name.endswith(".img"):
            path = _beside(path, path.with_suffix(".hdr").name, allowed)
        head, packed = _beginning(path, MAX_HEADER)
        if head.startswith(b"NRRD"):
            found = _nrrd(path, head, allowed)
        elif name.endswith((".mha", ".mhd")):
            found = _meta_image(path, head, allowed)
        else:
            found = _by_nibabel(path, head, "gzip" if packed else "", allowed)
    if found.dtype.kind not in "iufb":
        raise Unusable(NO_GREY_LEVELS, str(found.dtype)[:60])
    return found


def _beginning(path: Path, count: int) -> tuple[bytes, bool]:
    """Return the first bytes of a file, and whether they are packed by gzip."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return (gzip.GzipFile(fileobj=file) if packed else file).read(count), packed


@contextmanager
def library_errors(path: Path, reason: str = UNREADABLE) -> Iterator[None]:
    """Turn what a library raises for a bad file into `Unusable`, without its folder."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError
    from nibabel.wrapstruct import WrapStructError
    from nrrd import NRRDError

    bad = (
        *(ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError, NRRDError, zlib.error),
        *(OSError, EOFError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError),
        *(zipfile.BadZipFile, struct.error),
        MemoryError,  # a header that promises more than there is
    )
    try:
        yield
    except Unusable:
        raise
    except bad as error:
        text = " ".join(str(error).replace(str(path), path.name).split())
        raise Unusable(reason, f"{type(error).__name__}: {text[-300:]}") from error


def _beside(header: Path, name: str, allowed: Sequence[str]) -> Path:
    """Return the file that a header names; `Unusable` if it isn't there, or not in an allowed folder."""
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name) or "\0" in name:
        raise Unusable(OUTSIDE, f"the header takes its voxels from {name[:200]!r}")
    path = header.parent / name
    real = os.path.realpath(path)
    if not any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in allowed):
        raise Unusable(OUTSIDE, f"the header takes its voxels from {name[:200]!r}, a link")
    if not os.path.isfile(path):
        raise Unusable(UNREADABLE, f"header and voxels belong together; {name!r} isn't there")
    return path


# Where the magic bytes stand, they themselves, and nibabel's class.
_NIFTI = (
    *((344, b"n+1\0", "Nifti1Image"), (4, b"n+2\0", "Nifti2Image")),
    *((344, b"ni1\0", "Nifti1Pair"), (4, b"ni2\0", "Nifti2Pair")),
)


def _nifti_class(head: bytes) -> str:
    return next((name for at, magic, name in _NIFTI if head[at : at + 4] == magic), "")


def is_nifti(path: Path) -> bool:
    """Return True for NIfTI in one file, plain or in gzip, by its content."""
    try:
        return _nifti_class(_beginning(path, 348)[0]).endswith("Image")
    except (OSError, EOFError, zlib.error):
        return False


def _by_nibabel(path: Path, head: bytes, packing: Packing, allowed: Sequence[str]) -> VolumeFile:
    import nibabel

    name, suffix = _nifti_class(head), path.suffix.lower()
    if not name:
        others = {".mgh": "MGHImage", ".mgz": "MGHImage", ".hdr": "Spm99AnalyzeImage"}
        if not (name := others.get(suffix, "")):
            raise Unusable(UNREADABLE, "neither NIfTI, MGH, NRRD nor MetaImage")
    kind = getattr(nibabel, name).header_class
    header = kind(head[: kind.template_dtype.itemsize])
    dtype = header.get_data_dtype()
    if dtype.fields is not None:
        raise Unusable(NO_GREY_LEVELS, str(dtype)[:60])
    if suffix == ".hdr" or name.endswith("Pair"):
        path = _beside(path, path.with_suffix(".img").name, allowed)
        packing = "gzip" if _beginning(path, 0)[1] else ""
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if name.startswith("Nifti"):
        affine[:3] *= {"meter": 1000, "micron": 0.001}.get(header.get_xyzt_units()[0], 1)
        _refuse_two_orientations(header)
    offset = int(header.get_data_offset())
    if not 0 <= offset <= MAX_GAP:
        raise Unusable(UNREADABLE, f"the voxels are said to begin at byte {offset}")
    slope, inter = getattr(header, "get_slope_inter", lambda: (None, None))()
    codes = [header[key] for key in ("sform_code", "qform_code") if key in header]
    return VolumeFile(
        tuple(int(length) for length in header.get_data_shape()),
        dtype,
        affine,
        any(map(int, codes)) if codes else path.suffix.lower() != ".img",
        path,
        offset,
        packing,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
    )


def _refuse_two_orientations(header: Any) -> None:
    """Raise `Unusable` if sform and qform turn the voxels differently: readers take one or the other."""
    from nibabel import aff2axcodes
    from nibabel.spatialimages import HeaderDataError

    codes = set()
    for form in (header.get_sform, header.get_qform):
        with suppress(HeaderDataError, ValueError):  # a form that can't be read isn't taken
            affine, code = form(coded=True)
            codes |= {aff2axcodes(affine)} if code > 0 else set()
    if len(codes) > 1 and not any(None in code for code in codes):
        shown = " and ".join(sorted("".join(code) for code in codes))
        raise Unusable("volume whose sform and qform contradict each other", shown)


_MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "\u00b5m": 1e-3, "\u03bcm": 1e-3}


def _millimetres(units: Iterable[str]) -> float:
    """Return the unit of lengths in millimetres; where a header names none, it means these."""
    named = {str(unit).strip() for unit in units} - {"", "?"}
    if len(named) > 1 or not named <= _MILLIMETRES.keys():
        text = ", ".join(sorted(named))[:60]
        raise Unusable(UNREADABLE, f"lengths in {text!r}; mm, cm, m or um for all axes are read")
    return _MILLIMETRES[named.pop()] if named else 1.0


def _nrrd(path: Path, head: bytes, allowed: Sequence[str]) -> VolumeFile:
    """Read NRRD's header (teem.sourceforge.net/nrrd/format.html)."""
    import nrrd

    stream = io.BytesIO(head)
    values = nrrd.read_header(iter(stream.readline, b""))
    end = stream.tell()
    named = values.get("data file", values.get("datafile"))
    if named is None:
        if end == MAX_HEADER:
            raise Unusable(UNREADABLE, f"a header of more than {MAX_HEADER} bytes")
        data = path
    else:
        data, end = _beside(path, _single(str(named)), allowed), 0
    encoding = str(values["encoding"]).lower()
    packing: Any = {"raw": "", "gz": "gzip", "bz2": "bzip2"}.get(encoding, encoding)
    skipped = int(values.get("byte skip", values.get("byteskip", 0)))
    lines = int(values.get("line skip", values.get("lineskip", 0)))
    if packing not in ("", "gzip", "bzip2") or lines or skipped < (0 if packing else -1):
        problem = f"encoding {encoding!r} with line skip {lines} and byte skip {skipped}"
        raise Unusable(UNREADABLE, f"{problem}; raw, gzip and bzip2 are read")
    shape = tuple(int(size) for size in values["sizes"])
    affine, channel_axis, oriented = _nrrd_geometry(values, len(shape))
    affine[:3] *= _millimetres(values.get("space units", ()))
    return VolumeFile(
        shape,
        nrrd.reader._determine_datatype(values),
        affine,
        oriented,
        data,
        skipped if packing or skipped < 0 else end + skipped,
        packing,
        packed_at=end if packing else 0,
        channel_axis=channel_axis,
        segments=tuple(_segments(values)),
    )


def _nrrd_geometry(values: Mapping[str, Any], axes: int) -> tuple[np.ndarray, int | None, bool]:
    """Return affine, axis that is no direction of space, and whether the body's directions are known."""
    affine = np.eye(4)
    space = str(values.get("space", "")).lower()
    letters = "".join(word[0] for word in space.split("-")[:3]) if "-" in space else space[:3]
    directions = np.asarray(values.get("space directions", np.full((axes, 3), np.nan)), dtype=float)
    spatial = [axis for axis in range(axes) if np.isfinite(directions[axis]).all()]
    others = [axis for axis in range(axes) if axis not in spatial]
    if axes == 2 and not letters and directions.shape == (2, 2) and len(spatial) == 2:
        affine[:2, :2] = directions.T  # flat: shown as stored
        affine[:2, 3] = np.asarray(values.get("space origin", (0, 0)), dtype=float)
        return LPS_TO_RAS @ affine, None, True
    if letters not in ("lps", "ras", "las") or len(spatial) != 3 or directions.shape[1] != 3:
        return affine, None, False
    if len(others) > 1:
        raise Unusable(UNREADABLE, f"{axes} axes, of which three are of space")
    signs = [1.0 if letter in "ras" else -1.0 for letter in letters]
    affine[:3, :3] = (directions[spatial] * signs).T
    affine[:3, 3] = np.asarray(values.get("space origin", (0, 0, 0)), dtype=float) * signs
    return affine, others[0] if len(others) == 1 else None, True


def _segments(values: Mapping[str, Any]) -> Iterator[Segment]:
    """Yield 3D Slicer's segments; before version 4.11 each had a layer of its own and no value."""
    for number in range(len(values)):
        name = values.get(f"Segment{number}_Name")
        if name is None:
            return
        layer = int(values.get(f"Segment{number}_Layer", number))
        yield Segment(str(name).strip(), layer, int(values.get(f"Segment{number}_LabelValue", 1)))


def _single(named: str) -> str:
    if named.split()[:1] == ["LIST"] or re.search(r"%\d*d", named):
        raise Unusable(UNREADABLE, "voxels in several files; save the volume as one file")
    return named


_SIGNED = {"CHAR": "i1", "SHORT": "i2", "INT": "i4", "LONG_LONG": "i8"}
_META_TYPES = {
    "FLOAT": "f4",
    "DOUBLE": "f8",
    **_SIGNED,
    **{f"U{name}": code.replace("i", "u") for name, code in _SIGNED.items()},
}


def _meta_image(path: Path, head: bytes, allowed: Sequence[str]) -> VolumeFile:
    """Read MetaImage's header (itk.org/Wiki/ITK/MetaIO/Documentation); its last field names the voxels."""
    stream = io.BytesIO(head)
    values: dict[str, str] = {}
    while "ElementDataFile" not in values:
        line = stream.readline()
        key, _, value = line.decode("latin-1").partition("=")
        if not line or (line.strip() and "=" not in line.decode("latin-1")):
            raise Unusable(UNREADABLE, "a MetaImage header ends with ElementDataFile")
        values[key.strip()] = value.strip()

    def numbers(*keys: str) -> np.ndarray | None:
        text = next((values[key] for key in keys if key in values), None)
        return None if text is None else np.array([float(part) for part in text.split()])

    named, end = _single(values["ElementDataFile"]), stream.tell()
    local = named.upper() == "LOCAL"
    data = path if local else _beside(path, named, allowed)
    compressed = values.get("CompressedData", "False").upper() == "TRUE"
    skipped = int(values.get("HeaderSize", 0))
    if values.get("BinaryData", "True").upper() != "TRUE" or (compressed and skipped):
        raise Unusable(UNREADABLE, "BinaryData = False, or HeaderSize of packed voxels")
    kind = values["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")
    code = _META_TYPES.get(kind, "")
    if not code:
        raise Unusable(NO_GREY_LEVELS, values["ElementType"][:60])
    big = values.get("BinaryDataByteOrderMSB", values.get("ElementByteOrderMSB", "False"))
    shape = tuple(int(size) for size in values["DimSize"].split())
    channels = int(values.get("ElementNumberOfChannels", 1))
    lps = np.eye(4)
    count = int(values["NDims"])
    matrix = numbers("TransformMatrix", "Rotation", "Orientation")
    oriented = matrix is not None and count >= 2
    if matrix is not None and oriented:
        space = min(count, 3)  # what is flat has neither left nor right: it is shown as stored
        spacing = numbers("ElementSpacing", "ElementSize")
        origin = numbers("Offset", "Position", "Origin")
        # Each row is the direction of one axis.
        lps[:space, :space] = matrix.reshape(count, count)[:space, :space].T
        lps[:space, :space] *= 1.0 if spacing is None else spacing[:space]
        lps[:space, 3] = 0.0 if origin is None else origin[:space]
    lps[:3] *= _millimetres([values.get("DistanceUnits", "")])
    begin = end if local else 0
    return VolumeFile(
        (channels, *shape) if channels > 1 else shape,
        np.dtype((">" if big.upper() == "TRUE" else "<") + code),
        LPS_TO_RAS @ lps,
        oriented,
        data,
        -1 if skipped < 0 else 0 if compressed else begin + skipped,
        "zlib" if compressed else "",
        packed_at=begin if compressed else 0,
        channel_axis=0 if channels > 1 else None,
    )
