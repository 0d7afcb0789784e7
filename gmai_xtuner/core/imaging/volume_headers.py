# SPDX-License-Identifier: Apache-2.0

"""Headers of volume files: NIfTI, Analyze and MGH by nibabel, NRRD by pynrrd, MetaImage by MetaIO's rules.

A library sees the bytes of a header and nothing else: this module opens every file itself. So a header can't
lead to a file outside the folders that the caller allows, and `Header.voxels` reads no more than the header
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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
class Header:
    """A volume's header.

    Args:
        shape: lengths of the axes as stored.
        dtype: of the numbers as stored.
        affine: ``[4, 4]``, from indices to RAS+ millimetres.
        oriented: whether the file says how the volume lies in the body.
        path: of the voxels.
        offset: of the first voxel in the file, of a packed file in what it unpacks to; -1: the voxels end
            where the file ends.
        packing: of the voxels; ``zlib`` and ``bzip2`` begin at ``packed_at``.
        slope, inter: what is stored is multiplied by and added.
        channel_axis: axis of ``shape`` that counts channels, if it isn't behind the spatial ones.
        segments: of 3D Slicer.
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
    segments: tuple[Segment, ...] = field(default=())

    def voxels(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return ``count`` stored numbers from the ``first``, flat; default all.

        Raises:
            Unusable: the file is shorter than its header says.
        """
        total = math.prod(self.shape)
        count = total - first if count is None else count
        size = self.dtype.itemsize
        length = self.path.stat().st_size
        needed = max(self.offset, 0) + total * size
        if needed > (length - self.packed_at) * _RATIOS[self.packing]:
            raise Unusable(UNREADABLE, f"the header promises {needed} bytes, the file has {length}")
        out = np.empty(count, dtype=self.dtype)
        with self.path.open("rb") as file:
            start = length - total * size if self.offset < 0 else self.offset
            _read_exactly(_unpacked(file, self), start + first * size, out.view(np.uint8).data)
        return out


def _unpacked(file: BinaryIO, header: Header) -> Any:
    file.seek(header.packed_at)
    if header.packing == "gzip":
        return gzip.GzipFile(fileobj=file)
    if header.packing == "bzip2":
        return bz2.BZ2File(file)
    if header.packing == "zlib":
        promised = header.offset + math.prod(header.shape) * header.dtype.itemsize
        return io.BytesIO(zlib.decompressobj().decompress(file.read(), promised))
    return file


def _read_exactly(stream: Any, start: int, out: memoryview) -> None:
    stream.seek(start)  # packed streams read and throw away
    done = 0
    while done < len(out):
        read = stream.readinto(out[done : done + 2**24])
        if not read:
            raise Unusable(
                UNREADABLE, f"the file ends {len(out) - done} bytes before its voxels do"
            )
        done += read


def read_header(path: Path, within: Sequence[Path] = ()) -> Header:
    """Read the header of a volume.

    Args:
        path: of the file. A ``.img`` stands for the ``.hdr`` beside it.
        within: folders that the voxels' own file may lie in; default: that of the header.

    Raises:
        Unusable: it is no volume, its voxels are no numbers or lie elsewhere.
        OSError, ValueError, ...: the libraries' own errors, see `volumes`.
    """
    allowed = tuple(os.path.realpath(folder) for folder in within or (path.parent,))
    name = path.name.lower()
    if name.endswith(".img"):
        path = _beside(path, path.with_suffix(".hdr").name, allowed)
    with path.open("rb") as file:
        start = file.read(4)
        packed = start[:2] == b"\x1f\x8b"
        file.seek(0)
        head = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_HEADER)
    if head.startswith(b"NRRD"):
        return _nrrd(path, head, allowed)
    if name.endswith((".mha", ".mhd")):
        return _meta_image(path, head, allowed)
    return _by_nibabel(path, head, "gzip" if packed else "", allowed)


def _beside(header: Path, name: str, allowed: Sequence[str]) -> Path:
    """Return the file that a header names.

    Raises:
        Unusable: it isn't there, or not in one of the allowed folders.
    """
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name) or "\0" in name:
        raise Unusable(OUTSIDE, f"the header takes its voxels from {name[:200]!r}")
    path = header.parent / name
    real = os.path.realpath(path)
    if not any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in allowed):
        raise Unusable(OUTSIDE, f"the header takes its voxels from {name[:200]!r}, a link")
    if not os.path.isfile(path):
        raise Unusable(UNREADABLE, f"header and voxels belong together; {name!r} isn't there")
    return path


# --- NIfTI, Analyze, MGH --------------------------------------------------------------------------


def is_nifti_start(start: bytes) -> bool:
    """Return True if a file that begins so (348 bytes) is NIfTI in one file."""
    return start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0"


def _by_nibabel(path: Path, head: bytes, packing: Packing, allowed: Sequence[str]) -> Header:
    import nibabel

    image: Any
    if is_nifti_start(head):
        image = nibabel.Nifti2Image if head[4:8] == b"n+2\0" else nibabel.Nifti1Image
    elif head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        image = nibabel.Nifti2Pair if head[4:8] == b"ni2\0" else nibabel.Nifti1Pair
    elif path.name.lower().endswith((".mgh", ".mgz")):
        image = nibabel.MGHImage
    elif path.suffix.lower() == ".hdr":
        image = nibabel.Spm99AnalyzeImage
    else:
        raise Unusable(UNREADABLE, "neither NIfTI, MGH, NRRD nor MetaImage")
    kind = image.header_class
    header = kind(head[: kind.template_dtype.itemsize])
    dtype = header.get_data_dtype()
    shape = tuple(int(length) for length in header.get_data_shape())
    if dtype.fields is not None:
        raise Unusable(NO_GREY_LEVELS, str(dtype)[:60])
    if path.suffix.lower() == ".hdr" or head[344:347] == b"ni1" or head[4:7] == b"ni2":
        path = _beside(path, path.with_suffix(".img").name, allowed)
        with path.open("rb") as file:
            packing = "gzip" if file.read(2) == b"\x1f\x8b" else ""
    offset = int(header.get_data_offset())
    if not 0 <= offset <= MAX_GAP:
        raise Unusable(UNREADABLE, f"the voxels are said to begin at byte {offset}")
    slope, inter = getattr(header, "get_slope_inter", lambda: (None, None))()
    codes = [header[key] for key in ("sform_code", "qform_code") if key in header]
    return Header(
        shape,
        dtype,
        np.asarray(header.get_best_affine(), dtype=np.float64),
        any(map(int, codes)) if codes else path.suffix.lower() != ".img",
        path,
        offset,
        packing,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
    )


# --- NRRD -----------------------------------------------------------------------------------------

_NRRD_TYPES = {
    "char": "i1",
    "int8": "i1",
    "short": "i2",
    "int16": "i2",
    "int": "i4",
    "int32": "i4",
    "longlong": "i8",
    "int64": "i8",
    "float": "f4",
    "double": "f8",
}
_NRRD_PACKINGS: Mapping[str, Packing] = {
    "raw": "",
    "gzip": "gzip",
    "gz": "gzip",
    "bzip2": "bzip2",
    "bz2": "bzip2",
}


def _nrrd(path: Path, head: bytes, allowed: Sequence[str]) -> Header:
    """Read NRRD's header (teem.sourceforge.net/nrrd/format.html)."""
    import nrrd

    stream = io.BytesIO(head)
    try:
        values = nrrd.read_header(iter(stream.readline, b""))
    except nrrd.NRRDError as error:
        raise ValueError(str(error)) from error
    end = stream.tell()
    named = values.get("data file", values.get("datafile"))
    if named is None:
        if end == MAX_HEADER:
            raise Unusable(UNREADABLE, f"a header of more than {MAX_HEADER} bytes")
        data = path
    else:
        data, end = _beside(path, _single(str(named)), allowed), 0
    encoding = str(values["encoding"]).lower()
    skipped = int(values.get("byte skip", values.get("byteskip", 0)))
    lines = int(values.get("line skip", values.get("lineskip", 0)))
    if (
        encoding not in _NRRD_PACKINGS
        or lines
        or skipped < -1
        or (skipped < 0 and encoding != "raw")
    ):
        problem = f"encoding {encoding!r} with line skip {lines} and byte skip {skipped}"
        raise Unusable(UNREADABLE, f"{problem}; raw, gzip and bzip2 are read")
    packing = _NRRD_PACKINGS[encoding]
    shape = tuple(int(size) for size in values["sizes"])
    affine, channel_axis, oriented = _nrrd_geometry(values, len(shape))
    return Header(
        shape,
        _nrrd_type(str(values["type"]), str(values.get("endian", ""))),
        affine,
        oriented,
        data,
        skipped if packing or skipped < 0 else end + skipped,
        packing,
        packed_at=end if packing else 0,
        channel_axis=channel_axis,
        segments=tuple(_segments(values)),
    )


def _nrrd_type(name: str, endian: str) -> np.dtype:
    plain = name.replace("unsigned ", "u").replace("signed ", "").replace("long long", "longlong")
    plain = plain.removesuffix(" int").removesuffix("_t")
    code = _NRRD_TYPES.get(plain.removeprefix("u"), "")
    if not code:
        raise Unusable(NO_GREY_LEVELS, name[:60])
    if code[1] != "1" and endian not in ("little", "big"):
        raise Unusable(UNREADABLE, "the header has no `endian`")
    code = code.replace("i", "u") if plain.startswith("u") else code
    return np.dtype((">" if endian == "big" else "<") + code)


def _nrrd_geometry(values: Mapping[str, Any], axes: int) -> tuple[np.ndarray, int | None, bool]:
    """Return affine, axis that is no direction of space, and whether the body's directions are known."""
    affine = np.eye(4)
    space = str(values.get("space", "")).lower()
    letters = "".join(word[0] for word in space.split("-")[:3]) if "-" in space else space[:3]
    directions = np.asarray(values.get("space directions", np.full((axes, 3), np.nan)), dtype=float)
    spatial = [axis for axis in range(axes) if np.isfinite(directions[axis]).all()]
    others = [axis for axis in range(axes) if axis not in spatial]
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


# --- MetaImage ------------------------------------------------------------------------------------

_META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def _meta_image(path: Path, head: bytes, allowed: Sequence[str]) -> Header:
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
    code = _META_TYPES.get(values["ElementType"].removesuffix("_ARRAY"), "")
    if not code:
        raise Unusable(NO_GREY_LEVELS, values["ElementType"][:60])
    big = values.get("BinaryDataByteOrderMSB", values.get("ElementByteOrderMSB", "False"))
    shape = tuple(int(size) for size in values["DimSize"].split())
    channels = int(values.get("ElementNumberOfChannels", 1))
    lps = np.eye(4)
    count = int(values["NDims"])
    matrix = numbers("TransformMatrix", "Rotation", "Orientation")
    oriented = matrix is not None and count >= 3
    if matrix is not None and oriented:
        spacing, origin = (
            numbers("ElementSpacing", "ElementSize"),
            numbers("Offset", "Position", "Origin"),
        )
        # Each row is the direction of one axis.
        lps[:3, :3] = matrix.reshape(count, count)[:3, :3].T * (
            1.0 if spacing is None else spacing[:3]
        )
        lps[:3, 3] = 0.0 if origin is None else origin[:3]
    begin = end if local else 0
    return Header(
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
