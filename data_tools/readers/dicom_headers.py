# SPDX-License-Identifier: Apache-2.0

"""The little of a DICOM header that leaves the reader, and the headers of one series.

Only these leave, each only in the form named: the modality's code; ``BodyPartExamined``, ``ViewPosition`` and
laterality (`ATTRIBUTES`); labels of segments. Names, numbers, dates, places, devices, descriptions, comments,
UIDs and private elements never do. ``dicom_profile.tsv`` is PS3.15 table E.1-1, row by row, with what the
reader uses an attribute for.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from data_tools.readers.files import LINK
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.files import sha256_of_file
from gmai_xtuner.core.imaging import dicom
from gmai_xtuner.core.imaging.dicom import Header, alike, open_dataset

Attribute = Literal["BodyPartExamined", "ViewPosition", "Laterality", "PatientSex"]
ATTRIBUTES: tuple[Attribute, ...] = ("BodyPartExamined", "ViewPosition", "Laterality")

SEGMENTATION = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
DIRECTORY = "1.2.840.10008.1.3.10"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
ENHANCED = tuple(
    f"1.2.840.10008.5.1.4.1.1.{number}"  # CT, MR and PET, each also as legacy converted
    for number in ("2.1", "2.2", "4.1", "4.4", "130", "128.1")
)


_WORDS: dict[Attribute, tuple[str, Callable[[str], str | None]]] = {
    "BodyPartExamined": (
        "body part",
        lambda text: (
            text.replace("_", " ").lower() if re.fullmatch("[A-Z][A-Z _]{0,15}", text) else None
        ),
    ),
    "ViewPosition": ("view", lambda text: text if re.fullmatch("[A-Z]{1,5}", text) else None),
    "Laterality": ("side", {"L": "left", "R": "right", "B": "both"}.get),
    "PatientSex": ("sex", {"M": "male", "F": "female"}.get),
}
"""Element -> name of the attribute, and the word for a value; None for one that the standard has not."""


def read_header(path: Path, name: str) -> Header:
    """Return the header of a file, which is called ``name`` below the root, or raise `Unusable`."""
    if path.is_dir():
        raise Unusable(LINK)
    return dicom.header_of(open_dataset(path, header_only=True), name)


def attributes_of(data: Any, wanted: tuple[Attribute, ...]) -> dict[str, str]:
    """Return the wanted attributes in the corpus' words; values that the standard has not are left out."""
    names, found = dicom.identity(data), {}
    for key in wanted:
        name, words = _WORDS[key]
        value = (data.get("ImageLaterality") if key == "Laterality" else None) or data.get(key)
        text = "" if value is None else str(value).strip().upper()
        if text and dicom.harmless(text, names) and (word := words(text)):
            found[name] = word
    return found


def modality_of(data: Any) -> str | None:
    """Return the code that says how the image was taken; OT (other) and the like don't."""
    code = dicom.modality_code(data)
    return None if code in ("", "OT", "DOC", "SC") else code


def sha256_of(paths: Iterable[Path]) -> str:
    """Return the hash of one file's bytes; of several the hash of their hashes, in their order."""
    hashes = [bytes.fromhex(sha256_of_file(path)) for path in paths]
    return (hashes[0] if len(hashes) == 1 else hashlib.sha256(b"".join(hashes)).digest()).hex()


def groups(images: Sequence[Header]) -> Iterator[list[Header]]:
    """Yield images that may be one stack; a series may hold several, such as the planes of a scout."""
    series: dict[tuple[object, ...], list[list[Header]]] = defaultdict(list)
    for header in images:
        echo, time, _ = header.order
        made = series[header.series or header.path, header.rows, header.columns, echo, time]
        own = next((group for group in made if alike(group[0], header)), None)
        if own is None:
            made.append(own := [])
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
        with dicom.damage_as(dicom.DAMAGED):
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
