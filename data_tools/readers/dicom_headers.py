# SPDX-License-Identifier: Apache-2.0

"""The little of a DICOM header that leaves the reader, and the headers of one series.

Only these leave, each only in the form named: the modality's code; ``BodyPartExamined``, ``ViewPosition`` and
laterality (`ATTRIBUTES`); labels of segments. Names, numbers, dates, places, devices, descriptions, comments,
UIDs and private elements never do. A patient, series or path is shown as a keyed hash, `Pseudonyms`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from data_tools.readers.files import LINK
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import (
    DAMAGED,
    Header,
    damage_as,
    harmless,
    header_of,
    identity,
    modality_code,
    open_dataset,
)
from gmai_xtuner.core.imaging.dicom_stacks import alike

Attribute = Literal["BodyPartExamined", "ViewPosition", "Laterality", "PatientSex"]
ATTRIBUTES: tuple[Attribute, ...] = ("BodyPartExamined", "ViewPosition", "Laterality")

SEGMENTATION = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
DIRECTORY = "1.2.840.10008.1.3.10"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
ENHANCED = (
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
    "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
    "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
)

_SIDES = {"L": "left", "R": "right", "B": "both", "U": ""}
_SEXES = {"M": "male", "F": "female"}
_CODE = re.compile(r"[A-Z][A-Z _]{0,15}")
_VIEW = re.compile(r"[A-Z]{1,5}")


class Pseudonyms:
    """Keyed hashes (HMAC-SHA-256, 64 bits shown) in the place of what would say who the patient is.

    Args:
        key: secret. Who has it and a list of patients can tell who is in the corpus.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, kind: str, text: str) -> str:
        """Return 16 hexadecimal digits; the same text gives another pseudonym as another ``kind``."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:16]

    @classmethod
    def for_source(cls, salt: str | None, headers: Iterable[Header]) -> Pseudonyms:
        """Take the job's salt, or a key that only who has all of the files can compute."""
        if salt is not None:
            return cls(salt.encode())
        digest = hashlib.sha256()
        for header in headers:
            digest.update(f"{header.patient}\0{header.instance}\0".encode("utf-8", "surrogatepass"))
        return cls(digest.digest())


def read_header(path: Path, name: str) -> Header:
    """Return the header of the file ``path``, which is called ``name`` below the root.

    Raises:
        Unusable: the file can't be read, or a value is no number where one is expected.
    """
    if path.is_dir():
        raise Unusable(LINK)
    return header_of(open_dataset(path, header_only=True), name)


def attributes_of(data: Any, wanted: tuple[Attribute, ...]) -> dict[str, str]:
    """Return the wanted attributes in the corpus' words; values that the standard has not are left out."""
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


def modality_of(data: Any) -> str | None:
    """Return the code that says how the image was taken; OT (other) and the like don't."""
    code = modality_code(data)
    return None if code in ("", "OT", "DOC", "SC") else code


def sha256_of(paths: Iterable[Path]) -> str:
    """Return the hash of one file's bytes; of several the hash of their hashes, in their order."""
    hashes = []
    for path in paths:
        found = path.stat()
        hashes.append(_sha256(path, found.st_mtime_ns, found.st_size))
    if len(hashes) == 1:
        return hashes[0].hex()
    return hashlib.sha256(b"".join(hashes)).hexdigest()


@lru_cache(maxsize=64)  # a segmentation is hashed for each image of its series
def _sha256(path: Path, changed: int, size: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# --- series ---------------------------------------------------------------------------------------


def groups(images: Sequence[Header]) -> Iterator[list[Header]]:
    """Yield images that may be one stack; a series may hold several, such as the planes of a scout."""
    series: dict[tuple[object, ...], list[list[Header]]] = defaultdict(list)
    for header in images:
        echo, time, _ = header.order
        made = series[header.series or header.path, header.rows, header.columns, echo, time]
        own = next((group for group in made if alike(group[0], header)), None)
        if own is None:
            made.append([header])
        else:
            own.append(header)
    return (group for made in series.values() for group in made)


def copies(members: Sequence[Header], root: Path) -> list[Header]:
    """Return the files that are there again under another name, byte for byte."""
    instances = Counter(header.instance for header in members)
    seen, found = set(), []
    for header in sorted(members, key=lambda member: member.path):
        if instances[header.instance] > 1:
            digest = sha256_of([root / header.path])
            if digest in seen:
                found.append(header)
            seen.add(digest)
    return found


def targets(header: Header, images: Sequence[Header], root: Path) -> list[str]:
    """Return the series that a segmentation was drawn on: those that it names, or whose images it names."""
    known = dict.fromkeys(image.series for image in images if image.series)
    if named := [uid for uid in header.references if uid in known]:
        return named
    referred = set()
    try:
        with damage_as(DAMAGED):
            waiting = [open_dataset(root / header.path)]
            while waiting:
                for element in waiting.pop():
                    if element.VR == "SQ":
                        waiting += element.value
                    elif element.keyword == "ReferencedSOPInstanceUID":
                        referred.add(str(element.value))
    except Unusable:
        return []
    return list(dict.fromkeys(image.series for image in images if image.instance in referred))
