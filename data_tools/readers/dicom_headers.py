"""What is read of a DICOM header, and the little of it that leaves the reader.

Only these leave, each only in the form named: the modality's code; ``BodyPartExamined``, ``ViewPosition`` and
laterality (`ATTRIBUTES`); labels of segments. Names, numbers, dates, places, devices, descriptions, comments,
UIDs and private elements never do. A patient, series or path is shown as a keyed hash, `Pseudonyms`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.readers.files import LINK
from gmai_xtuner.core.errors import Unusable

Attribute = Literal["BodyPartExamined", "ViewPosition", "Laterality", "PatientSex"]
ATTRIBUTES: tuple[Attribute, ...] = ("BodyPartExamined", "ViewPosition", "Laterality")

NOT_DICOM = "not a DICOM file"
NO_PICTURE = "DICOM object without a picture"

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
DIRECTORY = "1.2.840.10008.1.3.10"
ENHANCED = (
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
    "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
)
# Objects with pixel data that are numbers of a calculation, not a picture of the patient.
NO_PICTURES = ("RTDOSE", "SEG", "RTSTRUCT", "REG", "RWV", "PR", "KO", "SR", "DOC")

_HEADER_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"),
    *("Modality", "Rows", "Columns", "NumberOfFrames", "ImagePositionPatient"),
    *("ImageOrientationPatient", "InstanceNumber", "EchoNumbers", "TemporalPositionIdentifier"),
    *("AcquisitionNumber", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
)
_SIDES = {"L": "left", "R": "right", "B": "both", "U": ""}
_SEXES = {"M": "male", "F": "female"}
_CODE = re.compile(r"[A-Z][A-Z _]{0,15}")
_VIEW = re.compile(r"[A-Z]{1,5}")
_IDENTITY = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthDate"),
    *("PatientAddress", "AccessionNumber", "InstitutionName", "StudyID", "StudyDate"),
    *("ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName", "SeriesDate"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """Of one file, as much as is needed to sort it.

    ``orientation`` and ``position`` are in millimetres of the patient's LPS axes, None without them;
    ``order`` is what else may tell slices of one place apart; ``references`` are series that a
    segmentation was drawn on.
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


class Pseudonyms:
    """Keyed hashes (HMAC-SHA-256, 64 bits shown) in the place of what would say who the patient is.

    Args:
        key: secret. Who has it and a list of patients can tell who is in the corpus.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, kind: str, text: str) -> str:
        """16 hexadecimal digits; the same text gives another pseudonym as another ``kind``."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:16]

    @classmethod
    def for_source(cls, salt: str | None, headers: Iterable[Header]) -> Pseudonyms:
        """With the job's salt, or a key that only who has all of the files can compute."""
        if salt is not None:
            return cls(salt.encode())
        digest = hashlib.sha256()
        for header in headers:
            digest.update(f"{header.patient}\0{header.instance}\0".encode("utf-8", "surrogatepass"))
        return cls(digest.digest())


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings, which quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_dataset(path: Path, *, tags: tuple[str, ...] | None = None) -> Any:
    """The data set of a file, pixels not read with ``tags``.

    Files from before the DICOM file format, which begin with the first element, are read as well.

    Raises:
        ValueError: it is no DICOM file.
        OSError: it can't be opened.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    with quiet():
        try:
            return _read(pydicom, path, tags, force=False)
        except InvalidDicomError:
            pass
        with path.open("rb") as file:
            start = file.read(8)
        # Group 0008 comes first in every such file, in either order of bytes.
        if start[:2] not in (b"\x08\x00", b"\x00\x08"):
            raise ValueError(NOT_DICOM)
        data = _read(pydicom, path, tags, force=True)
        if not data.get("SOPClassUID"):
            raise ValueError(NOT_DICOM)
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


def _read(pydicom: Any, path: Path, tags: tuple[str, ...] | None, *, force: bool) -> Any:
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(
            path,
            force=force,
            stop_before_pixels=tags is not None,
            specific_tags=list(tags) if tags else None,
        )
    except (InvalidDicomError, OSError):
        raise
    except Exception as error:  # whatever a damaged header makes pydicom stumble over
        raise ValueError(NOT_DICOM) from error


def read_header(path: Path, name: str) -> Header:
    """Return the header of the file ``path``, which is called ``name`` below the root.

    Raises:
        Unusable: the file can't be read, or a value is no number where one is expected.
    """
    if path.is_dir():
        raise Unusable(LINK)
    try:
        data = open_dataset(path, tags=_HEADER_TAGS)
    except ValueError as error:
        raise Unusable(NOT_DICOM) from error
    except OSError as error:
        raise Unusable("file can't be read", error.strerror or type(error).__name__) from error
    try:
        with quiet():
            return _header(data, name)
    except (
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        NotImplementedError,
        KeyError,
    ) as error:
        raise Unusable("DICOM header with wrong values") from error


def _header(data: Any, name: str) -> Header:
    def text(key: str) -> str:
        value = data.get(key)
        return "" if value is None else str(value).strip()

    def numbers(key: str, count: int) -> tuple[float, ...] | None:
        values = data.get(key)
        if values is None or len(values) != count:
            return None
        return tuple(float(value) for value in values)

    return Header(
        name,
        text("SOPClassUID") or str(getattr(data.file_meta, "MediaStorageSOPClassUID", "")),
        text("SOPInstanceUID"),
        text("StudyInstanceUID"),
        text("SeriesInstanceUID"),
        text("PatientID"),
        text("Modality"),
        int(data.get("Rows") or 0),
        int(data.get("Columns") or 0),
        int(data.get("NumberOfFrames") or 1),
        numbers("ImageOrientationPatient", 6),
        numbers("ImagePositionPatient", 3),
        int(data.get("InstanceNumber") or 0),
        (text("EchoNumbers"), text("TemporalPositionIdentifier"), text("AcquisitionNumber")),
        _references(data),
    )


def _references(data: Any) -> tuple[str, ...]:
    found = [str(item.SeriesInstanceUID) for item in data.get("ReferencedSeriesSequence") or []]
    for frame in data.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                found.append(str(series.SeriesInstanceUID))
    return tuple(dict.fromkeys(found))


# --- what leaves --------------------------------------------------------------------------------


def identity(data: Any) -> frozenset[str]:
    """Words of the header that name somebody or something, in lower case, of three characters or more."""
    words = set()
    for key in _IDENTITY:
        value = data.get(key)
        for part in re.split(r"[\s^=\\,/]+", "" if value is None else str(value).lower()):
            if len(part) >= 3:
                words.add(part)
    return frozenset(words)


def harmless(text: str, names: frozenset[str]) -> bool:
    """Whether no word of ``names`` is in the text: people type names into all sorts of elements."""
    folded = text.lower()
    return not any(re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", folded) for word in names)


def attributes_of(data: Any, wanted: tuple[Attribute, ...]) -> dict[str, str]:
    """The wanted attributes in the corpus' words; a value of another form than the standard's is left out."""
    names = identity(data)
    found = {}
    for key in wanted:
        value = data.get(key)
        if key == "Laterality":
            value = data.get("ImageLaterality") or value
        text = "" if value is None else str(value).strip().upper()
        if not text or not harmless(text, names):
            continue
        if key == "BodyPartExamined" and _CODE.fullmatch(text):
            found["body part"] = text.replace("_", " ").lower()
        elif key == "ViewPosition" and _VIEW.fullmatch(text):
            found["view"] = text
        elif key == "Laterality" and _SIDES.get(text):
            found["side"] = _SIDES[text]
        elif key == "PatientSex" and text in _SEXES:
            found["sex"] = _SEXES[text]
    return found


def modality_of(code: str) -> str | None:
    """A DICOM code that says how the picture was taken; OT (other) and the like don't."""
    return None if code in ("", "OT", "DOC", "SC") or not _CODE.fullmatch(code) else code


def words_of(error: Exception, data: Any, path: Path) -> str:
    """A library's text, if nothing of the patient's is in it."""
    text = " ".join(str(error).replace(str(path), "the file").split())[:240]
    names = identity(data) if data is not None else frozenset()
    return f"{type(error).__name__}: {text}" if harmless(text, names) else type(error).__name__


def sha256_of(paths: Iterable[Path]) -> str:
    """Of one file's bytes; of several the hash of their hashes, in their order."""
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256"))
    if len(hashes) == 1:
        return hashes[0].hexdigest()
    return hashlib.sha256(b"".join(item.digest() for item in hashes)).hexdigest()


def plain(values: Mapping[str, str]) -> dict[str, str]:
    """Without empty values."""
    return {key: value for key, value in values.items() if value}
