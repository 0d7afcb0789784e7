"""DICOM: headers, and the slices of a series in their order. Pixels are those of `dicom_pixels`.

Header values may name a patient: errors quote none of them but a modality's code, and library texts only
without them (`words_of`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.slicing import AXES, Axis

NOT_DICOM = "not a DICOM file"
CANT_OPEN = "file can't be read"
WRONG_VALUES = "DICOM header with wrong values"
NO_PICTURE = "DICOM object without a picture"
MIXED = "series of differing sizes or directions"
TWICE = "series with two slices at one place"
NO_SPACING = "series without a pixel spacing"

# Objects that are numbers of a calculation or text, not an image of the patient.
NO_PICTURES = ("RTDOSE", "SEG", "RTSTRUCT", "REG", "RWV", "PR", "KO", "SR", "DOC", "RTPLAN", "ECG")
UNEVEN = 0.1
"""How far a slice may lie from where even spacing puts it, as a share of the spacing."""

_CODE = re.compile(r"[A-Z]{1,8}")
_HEADER_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"),
    *("Modality", "Rows", "Columns", "NumberOfFrames", "ImagePositionPatient"),
    *("ImageOrientationPatient", "InstanceNumber", "EchoNumbers", "TemporalPositionIdentifier"),
    *("AcquisitionNumber", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
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


def is_dicom(path: Path) -> bool:
    """Return True for a DICOM file, with its preamble or from before there was one."""
    with path.open("rb") as file:
        start = file.read(132)
    # Group 0008 comes first in a file without a preamble.
    return start[128:] == b"DICM" or start[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")


def open_dataset(path: Path, *, header_only: bool = False) -> Any:
    """Return the data set of a file.

    Files from before the DICOM file format, which begin with the first element, are read as well.

    Args:
        path: of the file.
        header_only: read only what `header_of` needs, and no pixels.

    Raises:
        Unusable: it is no DICOM file, or can't be opened.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    tags: Any = {"stop_before_pixels": True, "specific_tags": _HEADER_TAGS} if header_only else {}
    try:
        with quiet():
            try:
                data = pydicom.dcmread(path, **tags)
            except InvalidDicomError:
                # Group 0008 comes first in every such file, in either order of bytes.
                with path.open("rb") as file:
                    if file.read(2) not in (b"\x08\x00", b"\x00\x08"):
                        raise
                data = pydicom.dcmread(path, force=True, **tags)
                if not data.get("SOPClassUID"):
                    raise
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
    except Exception as error:  # whatever a damaged header makes pydicom stumble over
        raise Unusable(NOT_DICOM) from error


# --- headers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """As much of a header as is needed to sort files; most of it must not leave the program.

    ``orientation`` and ``position`` are in millimetres of the patient's LPS axes, None without them;
    ``order`` is what else may tell slices of one place apart; ``references`` are series that a
    segmentation was drawn on; ``path`` is what the caller calls the file.
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


def header_of(data: Any, path: str = "") -> Header:
    """Return the header of a data set.

    Raises:
        Unusable: a value is no number where one is expected.
    """
    try:
        with quiet():
            return _header_of(data, path)
    except (ValueError, TypeError, AttributeError, OverflowError, NotImplementedError, KeyError):
        raise Unusable(WRONG_VALUES) from None  # the library's text may quote them


def _header_of(data: Any, path: str) -> Header:
    def text(key: str) -> str:
        value = data.get(key)
        return "" if value is None else str(value).strip()

    def vector(key: str, count: int) -> tuple[float, ...] | None:
        values = data.get(key)
        if values is None or len(values) != count:
            return None
        return tuple(float(value) for value in values)

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
        vector("ImageOrientationPatient", 6),
        vector("ImagePositionPatient", 3),
        int(data.get("InstanceNumber") or 0),
        (text("EchoNumbers"), text("TemporalPositionIdentifier"), text("AcquisitionNumber")),
        tuple(dict.fromkeys(str(item.SeriesInstanceUID) for item in references)),
    )


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
    except (TypeError, ValueError, OverflowError):
        raise Unusable(WRONG_VALUES, key) from None


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
    return (
        f"{type(error).__name__}: {text}"
        if harmless(text, identity(data))
        else type(error).__name__
    )


# --- series -------------------------------------------------------------------------------------


def is_stack(headers: Sequence[Header]) -> bool:
    """Return True if files of a series are slices: single frames with a place each, at two places or more."""
    return (
        len(headers) > 1
        and all(header.frames == 1 and header.orientation and header.position for header in headers)
        and len({header.position for header in headers}) > 1
    )


def stack_order(headers: Sequence[Header]) -> tuple[list[int], bool]:
    """Return the indices of slices along their normal, and whether they lie evenly.

    Args:
        headers: of a stack (`is_stack`).

    Raises:
        Unusable: they differ in size or direction, or two lie at one place.
    """
    first, count = headers[0], f"{len(headers)} files"
    axes = np.array(first.orientation, dtype=float)
    for header in headers:
        same = np.allclose(header.orientation or (), axes, atol=1e-3)
        if (header.rows, header.columns) != (first.rows, first.columns) or not same:
            raise Unusable(MIXED, count)
    normal = np.cross(axes[:3], axes[3:])
    places = [float(np.dot(normal, header.position or (0, 0, 0))) for header in headers]
    order = sorted(
        range(len(headers)), key=lambda at: (places[at], headers[at].number, headers[at].path)
    )
    distances = np.diff(np.array(places)[order])
    spacing = float(np.median(distances))
    if distances.min() < 1e-3 * max(spacing, 1e-6) or spacing <= 0:
        raise Unusable(TWICE, f"{count}; name one echo or time point per series")
    return order, bool(np.abs(distances - spacing).max() <= UNEVEN * spacing)


def stack_affine(first: Header, last: Header, count: int, data: Any) -> np.ndarray:
    """Return the affine from (slice, row, column) to LPS millimetres (PS3.3 C.7.6.2.1.1).

    Args:
        first, last: slices in order.
        count: number of slices.
        data: any of their data sets, for the pixel spacing.

    Raises:
        Unusable: there is no usable pixel spacing.
    """
    spacing = numbers(data, "PixelSpacing")
    if len(spacing) != 2 or not min(spacing) > 0:
        raise Unusable(NO_SPACING)
    axes = np.array(first.orientation, dtype=float)
    start, end = (np.array(header.position, dtype=float) for header in (first, last))
    affine = np.eye(4)
    affine[:3, 0] = (end - start) / (count - 1)
    affine[:3, 1] = axes[3:] * spacing[0]
    affine[:3, 2] = axes[:3] * spacing[1]
    affine[:3, 3] = start
    return affine


def stack_axis(affine: np.ndarray) -> Axis:
    """Return the body's axis along which the slices of a stack lie one behind the other."""
    return AXES[int(np.abs(affine[:3, 0]).argmax())]
