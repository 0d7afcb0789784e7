# SPDX-License-Identifier: Apache-2.0

"""DICOM: files, headers, and the place of slices; pixels are those of `dicom_pixels`.

Header values may name a patient: errors quote none of them but a modality's code, and library texts only
without them (`words_of`).

Slices that lie unevenly, or that a tilted gantry shifts against each other, are images of their own plane
only: a cut across them would be distorted, so `Stack.flaw` says not to make one.
"""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gmai_xtuner.core.errors import GMAIError, Unusable
from gmai_xtuner.core.imaging.volumes import AXES, Axis

NOT_DICOM = "not a DICOM file"
CANT_OPEN = "file can't be read"
DAMAGED = "DICOM file that is damaged"
WRONG_VALUES = "DICOM header with wrong values"
NO_PICTURE = "DICOM object without a picture"
TOO_LARGE = "DICOM file that unpacks to too much"
MIXED = "series of differing sizes or directions"
TWICE = "series with two slices at one place"
NO_SPACING = "series without a pixel spacing"

UNEVEN = 0.1
"""How far a slice may lie from where even spacing puts it, as a share of the spacing."""
JITTER = 1e-3
"""How far direction cosines, and spacings in millimetres, of one stack may differ."""

MAX_INFLATED = 2**28
"""Bytes that a deflated data set may unpack to."""

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

# Objects that are numbers of a calculation or text, not an image of the patient.
NO_PICTURES = ("RTDOSE", "SEG", "RTSTRUCT", "REG", "RWV", "PR", "KO", "SR", "DOC", "RTPLAN", "ECG")
_CODE = re.compile(r"[A-Z]{1,8}")
_HEADER_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"),
    *("Modality", "Rows", "Columns", "NumberOfFrames", "ImagePositionPatient"),
    *("ImageOrientationPatient", "InstanceNumber", "EchoNumbers", "TemporalPositionIdentifier"),
    *("AcquisitionNumber", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
    "PixelSpacing",
]
_IDENTITY = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthDate"),
    *("PatientAddress", "AccessionNumber", "InstitutionName", "StudyID", "StudyDate"),
    *("ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName", "SeriesDate"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings, which quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def damage_as(reason: str, data: Any = None) -> Iterator[None]:
    """Turn whatever a library raises for damaged data into `Unusable` with this reason.

    ``data`` is the data set whose identity the library's text must not hold; without it the text isn't told.
    """
    try:
        yield
    except GMAIError:
        raise
    except Exception as error:  # as many kinds of damage as there are elements
        detail = type(error).__name__ if data is None else words_of(error, data)
        raise Unusable(reason, detail) from error


def is_dicom(path: Path) -> bool:
    """Return True for a DICOM file, with its preamble or without one."""
    with path.open("rb") as file:
        start = file.read(132)
    # Without a preamble the first element, of group 0002 or 0008, is at the beginning.
    bare = (start[:2] in (b"\2\0", b"\x08\0") and start[3:4] == b"\0") or start[:3] == b"\0\x08\0"
    return start[128:] == b"DICM" or bare


def open_dataset(path: Path, *, header_only: bool = False) -> Any:
    """Return a file's data set, with ``header_only`` no more than `header_of` needs.

    `Unusable` if it is no DICOM file, is damaged, unpacks to too much, or can't be opened.
    """
    import pydicom

    tags: Any = {"stop_before_pixels": True, "specific_tags": _HEADER_TAGS} if header_only else {}
    try:
        if not is_dicom(path):
            raise Unusable(NOT_DICOM)
        with damage_as(DAMAGED), quiet():
            with path.open("rb") as file:
                has_preamble = _refuse_bomb(file)
            data = pydicom.dcmread(path, force=True, **tags)
            if not has_preamble and not data.get("SOPClassUID"):
                raise Unusable(NOT_DICOM)
            if "TransferSyntaxUID" not in data.file_meta:
                implicit, little = data.original_encoding
                kind = f"{'Im' if implicit else 'Ex'}plicitVR{'Little' if little else 'Big'}Endian"
                data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, kind)
            return data
    except OSError as error:
        raise Unusable(CANT_OPEN, error.strerror or type(error).__name__) from error


def _refuse_bomb(file: BinaryIO) -> bool:
    """Check what a deflated data set unpacks to, before pydicom does it; return if there is a preamble."""
    from pydicom.filereader import _read_file_meta_info, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    preamble = read_preamble(file, force=True)
    meta = _read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflate.unconsumed_tail or file.read(2**20):
            size += len(inflate.decompress(chunk, 2**24))
            if size > MAX_INFLATED:
                raise Unusable(TOO_LARGE, f"more than {MAX_INFLATED} bytes")
    return preamble is not None


@dataclass(frozen=True, slots=True)
class Header:
    """As much of a header as is needed to sort files; most of it must not leave the program.

    ``orientation`` (of rows and columns) and ``position`` (of the first pixel, millimetres) are in the
    patient's LPS axes, ``spacing`` is in millimetres from row to row and from column to column; None without.
    ``order`` is what else may tell slices of one place apart; ``references`` are series that a
    segmentation was drawn on; ``path`` is what the caller calls the file; ``frame`` counts from 0.
    """

    path: str
    sop_class: str
    instance: str
    study: str
    series: str
    patient: str
    modality: str
    rows: int
    columns: int
    frames: int
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    number: int
    order: tuple[str, str, str]
    references: tuple[str, ...]
    spacing: tuple[float, float] | None = None
    frame: int = 0


@damage_as(WRONG_VALUES)
@quiet()
def header_of(data: Any, path: str = "") -> Header:
    """Return the header of a data set; `Unusable` if a value is no number where one is expected."""

    def text(key: str) -> str:
        value = data.get(key)
        return "" if value is None else str(value).strip()

    references = list(data.get("ReferencedSeriesSequence") or [])
    for frame in data.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            references += study.get("RTReferencedSeriesSequence") or []
    return Header(
        path,
        text("SOPClassUID") or str(getattr(data.file_meta, "MediaStorageSOPClassUID", "")),
        text("SOPInstanceUID"),
        text("StudyInstanceUID"),
        text("SeriesInstanceUID"),
        text("PatientID"),
        text("Modality"),
        int(data.get("Rows") or 0),
        int(data.get("Columns") or 0),
        int(data.get("NumberOfFrames") or 1),
        _vector(data, "ImageOrientationPatient", 6),
        _vector(data, "ImagePositionPatient", 3),
        int(data.get("InstanceNumber") or 0),
        (text("EchoNumbers"), text("TemporalPositionIdentifier"), text("AcquisitionNumber")),
        tuple(dict.fromkeys(str(item.SeriesInstanceUID) for item in references)),
        _spacing(data),
    )


def _vector(source: Any, key: str, count: int) -> tuple[float, ...] | None:
    values = numbers(source, key)
    return tuple(values) if len(values) == count and all(map(math.isfinite, values)) else None


def _spacing(source: Any) -> tuple[float, float] | None:
    """Return the pixel spacing; None for one that says nothing, which is no fault of a single image."""
    try:
        rows, columns = _vector(source, "PixelSpacing", 2) or (0, 0)
    except Unusable:
        return None
    return (rows, columns) if min(rows, columns) > 0 else None


def functional_group(data: Any, frame: int, name: str) -> Any | None:
    """Return the item of an enhanced object's macro that holds for a frame: its own, or that of all."""
    for groups, at in (("PerFrame", frame), ("Shared", 0)):
        try:
            return data[f"{groups}FunctionalGroupsSequence"].value[at][name].value[0]
        except (AttributeError, IndexError, KeyError, TypeError):
            continue
    return None


@damage_as(WRONG_VALUES)
@quiet()
def frame_headers(data: Any, path: str = "") -> list[Header]:
    """Return a header for each frame, with the place of its functional groups (PS3.3 C.7.6.16)."""
    header = header_of(data, path)
    # A frame of one bit is possible, none of nothing.
    if header.frames > 8 * max(1, *(len(data.get(key) or b"") for key in PIXELS)):
        raise Unusable(WRONG_VALUES, "NumberOfFrames")
    headers = []
    for frame in range(header.frames):
        found: dict[str, Any] = {"frames": 1, "frame": frame}
        if header.frames > 1:
            found["number"] = frame
        if item := functional_group(data, frame, "PlaneOrientationSequence"):
            found["orientation"] = _vector(item, "ImageOrientationPatient", 6)
        if item := functional_group(data, frame, "PlanePositionSequence"):
            found["position"] = _vector(item, "ImagePositionPatient", 3)
        if item := functional_group(data, frame, "PixelMeasuresSequence"):
            found["spacing"] = _spacing(item)
        headers.append(replace(header, **found))
    return headers


def numbers(source: Any, key: str) -> list[float]:
    """Return the numbers of an element, none without it; `Unusable` if one is no number, such as ``0,75``."""
    try:
        with quiet():
            value = source.get(key)
            if value is None or value == "":
                return []
            values = [value] if isinstance(value, int | float | str) else list(value)
            return [float(item) for item in values]
    except Exception:  # its text may quote the value
        raise Unusable(WRONG_VALUES, key) from None


@damage_as(WRONG_VALUES)
def modality_code(data: Any) -> str:
    """Return the modality's code, or nothing if it does not look like one: people type names anywhere."""
    found = _CODE.fullmatch(str(data.get("Modality", "")).strip())
    return found[0] if found else ""


def identity(data: Any) -> frozenset[str]:
    """Return words of the header that name somebody or something, in lower case, of three letters or more."""
    values = (value for key in _IDENTITY if (value := data.get(key)) is not None)
    words = (word for value in values for word in re.split(r"[\s^=\\,/]+", str(value).lower()))
    return frozenset(word for word in words if len(word) >= 3)


def harmless(text: str, names: frozenset[str]) -> bool:
    """Return True if no word of ``names`` is in the text."""
    folded = text.lower()
    return not any(re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", folded) for word in names)


def words_of(error: Exception, data: Any) -> str:
    """Return a library's text, if nothing of the patient's and no path of this machine is in it."""
    path = str(getattr(data, "filename", None) or "\0")
    text = " ".join(str(error).replace(path, "the file").split())[:240]
    with suppress(Exception):  # the elements of identity are damaged themselves
        if harmless(text, identity(data)):
            return f"{type(error).__name__}: {text}"
    return type(error).__name__


@dataclass(frozen=True, slots=True)
class Stack:
    """The place of slices in the body.

    ``order`` are the indices of the headers along their normal, ``planes`` they in that order; ``affine``
    leads from (slice, row, column) to LPS millimetres, without the slices' shift in their plane; ``flaw``
    says why nothing can be cut across the slices; ``siblings`` are instances of the same series that lie in
    another stack, such as another time point.
    """

    order: tuple[int, ...]
    planes: tuple[Header, ...]
    affine: np.ndarray
    flaw: str
    siblings: frozenset[str] = frozenset()

    @property
    def axis(self) -> Axis:
        """The body's axis along which the slices lie one behind the other."""
        return AXES[int(np.abs(self.affine[:3, 0]).argmax())]

    @property
    def heights(self) -> np.ndarray:
        """Millimetres of each slice along the normal."""
        return np.array([plane.position for plane in self.planes]) @ _normal(self.planes[0])

    def indices(self, points: np.ndarray) -> np.ndarray:
        """Return (slice, row, column) of LPS points ``[N, 3]``, fractional, each in its nearest plane."""
        heights, first = self.heights, self.planes[0]
        axes = np.array(first.orientation, dtype=float)
        steps = np.diff(heights) if len(heights) > 1 else np.ones(1)
        # one more slice at either end, so that what lies outside has an index too
        known = np.r_[heights[0] - steps[0], heights, heights[-1] + steps[-1]]
        height = points @ _normal(first)
        slices = np.interp(height, known, np.arange(-1, len(heights) + 1))
        slices[height < known[0]], slices[height > known[-1]] = -1, len(heights)
        nearest = np.clip(np.rint(slices).astype(int), 0, len(heights) - 1)
        offset = points - np.array([plane.position for plane in self.planes])[nearest]
        spacing = first.spacing or (1.0, 1.0)
        return np.c_[slices, offset @ axes[3:] / spacing[0], offset @ axes[:3] / spacing[1]]


def _normal(header: Header) -> np.ndarray:
    axes = np.array(header.orientation, dtype=float)
    return np.cross(axes[:3], axes[3:])


def is_stack(headers: Sequence[Header]) -> bool:
    """Return True if files of a series are slices: single frames with a place each, at two places or more."""
    return (
        len(headers) > 1
        and all(header.frames == 1 and header.orientation and header.position for header in headers)
        and len({header.position for header in headers}) > 1
    )


def alike(one: Header, other: Header) -> bool:
    """Return True if two images have the same size, and the same direction and spacing but for jitter."""
    if (one.rows, one.columns) != (other.rows, other.columns):
        return False
    return _close(one.orientation, other.orientation) and _close(one.spacing, other.spacing)


def _close(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(abs(a - b) <= JITTER for a, b in zip(one, other, strict=True))


def stack_of(headers: Sequence[Header]) -> Stack:
    """Return the place of slices, which are one or for which `is_stack` is true.

    `Unusable` if they differ in size, spacing or direction, two lie at one place, or a spacing is missing.
    """
    first, count = headers[0], f"{len(headers)} images"
    if any(header.spacing is None for header in headers):
        raise Unusable(NO_SPACING, count)
    assert first.spacing is not None
    if not all(alike(first, header) for header in headers):
        raise Unusable(MIXED, count)
    axes = np.array(first.orientation, dtype=float)
    lengths = np.linalg.norm(axes.reshape(2, 3), axis=1)
    if not np.allclose(lengths, 1, atol=0.01) or abs(axes[:3] @ axes[3:]) > 0.01:
        raise Unusable(MIXED, "direction cosines that are no right angle")
    normal = _normal(first)
    places = np.array([header.position for header in headers], dtype=float)
    heights = places @ normal
    keys = [(height, h.number, h.path) for height, h in zip(heights, headers, strict=True)]
    order = sorted(range(len(headers)), key=keys.__getitem__)
    distances = np.diff(heights[order])
    spacing = float(np.median(distances)) if len(headers) > 1 else 1.0
    if spacing <= 0 or distances.min(initial=np.inf) < 1e-3 * spacing:
        same = len(headers) - len({header.instance for header in headers})
        why = "time points, phases or b-values; make a series of each"
        why = f"{same} say that they are the same as another" if same else why
        raise Unusable(TWICE, f"{count}; {why}")
    shift = places - places[order[0]]
    shift -= np.outer(shift @ normal, normal)
    flaw, most = "", max(0.5 * min(first.spacing), 0.01 * np.ptp(heights))
    if np.abs(distances - spacing).max(initial=0) > UNEVEN * spacing:
        flaw = "uneven distances"
    elif np.linalg.norm(shift, axis=1).max() > most:
        flaw = "shifted against each other, as by a tilted gantry"
    affine = np.eye(4)
    affine[:3, 0] = normal * (np.ptp(heights) / (len(headers) - 1) if len(headers) > 1 else 1.0)
    affine[:3, 1] = axes[3:] * first.spacing[0]
    affine[:3, 2] = axes[:3] * first.spacing[1]
    affine[:3, 3] = places[order[0]]
    return Stack(tuple(order), tuple(headers[at] for at in order), affine, flaw)
