# SPDX-License-Identifier: Apache-2.0

"""DICOM: files and headers. Pixels are those of `dicom_pixels`, series those of `dicom_stacks`.

Header values may name a patient: errors quote none of them but a modality's code, and library texts only
without them (`words_of`).
"""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from gmai_xtuner.core.errors import GMAIError, Unusable

NOT_DICOM = "not a DICOM file"
CANT_OPEN = "file can't be read"
DAMAGED = "DICOM file that is damaged"
WRONG_VALUES = "DICOM header with wrong values"
NO_PICTURE = "DICOM object without a picture"
TOO_LARGE = "DICOM file that unpacks to too much"

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


# --- files --------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings, which quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def damage_as(reason: str, data: Any = None) -> Iterator[None]:
    """Turn whatever a library raises for damaged data into `Unusable` with this reason.

    Args:
        reason: under which it is counted.
        data: data set whose identity the library's text must not hold; None: the text isn't told.
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
    """Return the data set of a file.

    Files without a preamble, which begin with the first element, are read as well.

    Args:
        path: of the file.
        header_only: read only what `header_of` needs, and no pixels.

    Raises:
        Unusable: it is no DICOM file, is damaged, unpacks to too much, or can't be opened.
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
                data.file_meta.TransferSyntaxUID = (
                    pydicom.uid.ImplicitVRLittleEndian
                    if implicit
                    else pydicom.uid.ExplicitVRLittleEndian
                    if little
                    else pydicom.uid.ExplicitVRBigEndian
                )
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


# --- headers ------------------------------------------------------------------------------------


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


def header_of(data: Any, path: str = "") -> Header:
    """Return the header of a data set.

    Raises:
        Unusable: a value is no number where one is expected.
    """
    with damage_as(WRONG_VALUES), quiet():
        return _header_of(data, path)


def _header_of(data: Any, path: str) -> Header:
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
    for groups, at in (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        try:
            return data[groups].value[at][name].value[0]
        except (AttributeError, IndexError, KeyError, TypeError):
            continue
    return None


def frame_headers(data: Any, path: str = "") -> list[Header]:
    """Return a header for each frame, with the place that its functional groups give it (PS3.3 C.7.6.16).

    Raises:
        Unusable: as `header_of`; or there are more frames than the file has bytes.
    """
    with damage_as(WRONG_VALUES), quiet():
        header = _header_of(data, path)
        # A frame of one bit is possible, none of nothing.
        if header.frames > 8 * max(1, *(len(data.get(key) or b"") for key in PIXELS)):
            raise Unusable(WRONG_VALUES, "NumberOfFrames")
        return [_frame_header(data, header, frame) for frame in range(header.frames)]


def _frame_header(data: Any, header: Header, frame: int) -> Header:
    found: dict[str, Any] = {"frames": 1, "frame": frame}
    if header.frames > 1:
        found["number"] = frame
    if item := functional_group(data, frame, "PlaneOrientationSequence"):
        found["orientation"] = _vector(item, "ImageOrientationPatient", 6)
    if item := functional_group(data, frame, "PlanePositionSequence"):
        found["position"] = _vector(item, "ImagePositionPatient", 3)
    if item := functional_group(data, frame, "PixelMeasuresSequence"):
        found["spacing"] = _spacing(item)
    return replace(header, **found)


def numbers(source: Any, key: str) -> list[float]:
    """Return the numbers of an element of one value or several; empty without it.

    Raises:
        Unusable: one is no number, such as ``0,75``.
    """
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
    words = set()
    for key in _IDENTITY:
        value = data.get(key)
        for part in re.split(r"[\s^=\\,/]+", "" if value is None else str(value).lower()):
            if len(part) >= 3:
                words.add(part)
    return frozenset(words)


def harmless(text: str, names: frozenset[str]) -> bool:
    """Return True if no word of ``names`` is in the text."""
    folded = text.lower()
    return not any(re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", folded) for word in names)


def words_of(error: Exception, data: Any) -> str:
    """Return a library's text, if nothing of the patient's and no path of this machine is in it."""
    path = str(getattr(data, "filename", None) or "\0")
    text = " ".join(str(error).replace(path, "the file").split())[:240]
    try:
        is_harmless = harmless(text, identity(data))
    except Exception:  # the elements of identity are damaged themselves
        is_harmless = False
    return f"{type(error).__name__}: {text}" if is_harmless else type(error).__name__
