# SPDX-License-Identifier: Apache-2.0

"""What leaves a source in place of its own names: neutral names, and messages in the tool's own words.

A path, a group or a text of a file may say who the patient is. With ``anonymous_names``, the default for
DICOM and for sets that an agreement closes, they stay inside of the reader: corpus, state, cache and messages
hold keyed hashes of paths and groups, and of a message only words that the tool or the job says itself.
Nothing keeps a list of them. Who has the data computes it anew: ``generate.py JOB --names`` lists which file
a neutral name stands for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from data_tools.readers import SourceOptions
from data_tools.readers.files import IMAGE_SUFFIXES, files
from data_tools.records import Drop
from gmai_xtuner.core.errors import SourceError

_SUFFIXES = (
    *(".json", ".jsonl", ".txt", ".csv", ".tsv", ".xlsx", ".xml", ".md", ".pdf", ".html", ".zip"),
    *(".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".mgh", ".mgz", ".npz", ".npy", ".h5"),
    *(".mp4", ".avi", ".mov", ".mkv", ".svs", ".ndpi", ".mrxs", ".dcm"),
    *IMAGE_SUFFIXES,
)
PROFILE = "DICOM PS3.15 2026c, table E.1-1"
_OF_THE_FIRST_FILE = 2**24  # bytes that make the key
_HIDDEN = "…"
_TOKEN = re.compile(r"(?:line|row|entry) \d+|\d+ (?:bytes|voxels|pixels)|\w+(?:[-./:^'@]+\w+)*")
_SHORT_NUMBER = re.compile(r"\d{1,5}(?:\.\d+)?")
_WORD = re.compile(r"[^\W_]+")


def suffix(path: str) -> str:
    """Return the end of a name if it is one of a known format; any other may be part of somebody's name."""
    return next((end for end in _SUFFIXES if path.lower().endswith(end)), "")


def salted(source: SourceOptions) -> SourceOptions:
    """Return the source with a ``salt``: its own, or one that only who has its first file can compute.

    Who has it and a list of patients can tell who is in the corpus.
    """
    if not source.anonymous_names or source.salt is not None:
        return source
    try:
        path = next(path for name in files(source) if (path := source.root / name).is_file())
        with path.open("rb") as file:
            content = file.read(_OF_THE_FIRST_FILE)
    except (OSError, StopIteration):  # readers tell the fault
        return source.model_copy(update={"salt": ""})
    # Another hash than the SHA-256 that the corpus tells of each file.
    salt = hashlib.blake2b(content, digest_size=16, person=b"gmai names").hexdigest()
    return source.model_copy(update={"salt": salt})


class Names:
    """The neutral names of a `salted` source; with ``anonymous_names: false`` everything is as it is."""

    def __init__(self, source: SourceOptions) -> None:
        self._root, self._is_hidden = source.root, source.anonymous_names
        self._key = (source.salt or "").encode()
        values = source.model_dump(mode="json", exclude={"root", "links", "salt"})
        self._words = frozenset(_WORD.findall(str(values)))

    def file(self, path: str) -> str:
        """Return the name of a file below the root."""
        return f"{self._hash('file', path)}{suffix(path)}" if self._is_hidden else path

    def group(self, text: str) -> str:
        """Return the name of a patient, case, video or slide."""
        return self._hash("group", text) if self._is_hidden else text

    def sealed(self, unit: str, texts: Iterable[str]) -> tuple[str, ...]:
        """Return texts about a unit so that only who knows the unit can read them; and the texts of such."""
        if not self._is_hidden:
            return tuple(texts)
        return tuple(self._crypt(unit, text) for text in texts)

    def _crypt(self, unit: str, text: str) -> str:
        is_sealed = text.startswith("\0")
        data = bytes.fromhex(text[1:]) if is_sealed else text.encode("utf-8", "surrogatepass")
        seed = hmac.digest(self._key, unit.encode("utf-8", "surrogatepass"), "sha256")
        stream = hashlib.shake_256(seed).digest(len(data))
        mixed = bytes(one ^ other for one, other in zip(data, stream, strict=True))
        return mixed.decode("utf-8", "surrogatepass") if is_sealed else f"\0{mixed.hex()}"

    def text(self, text: str, paths: Iterable[str] = (), labels: Iterable[str] = ()) -> str:
        """Return a message without what neither the tool nor the job nor a label of the corpus says.

        Args:
            text: of a reader or a library.
            paths: that it may hold; they become neutral names, and their parts are hidden.
            labels: names that the corpus holds anyway.
        """
        if not self._is_hidden or not text:
            return text
        whole = {path for path in paths if "/" in path or suffix(path)}
        parts = {part for path in whole for part in _WORD.findall(path) if len(part) > 2}
        known = self._words.union(*map(_WORD.findall, labels))
        found = "|".join((*map(re.escape, sorted(whole, key=len, reverse=True)), _TOKEN.pattern))

        def shown(match: re.Match[str]) -> str:
            token = match[0]
            if token in whole:
                return self.file(token)
            if _SHORT_NUMBER.fullmatch(token) or " " in token:
                return token
            words = _WORD.findall(token)
            if all(word in known or (word in own_words() and word not in parts) for word in words):
                return token
            is_file = suffix(token) and (self._root / token).is_file()
            return self.file(token) if is_file else _HIDDEN

        return re.sub(found, shown, text)

    def drops(
        self, drops: Iterable[Drop], paths: Iterable[str], labels: Iterable[str]
    ) -> Iterator[Drop]:
        """Yield drops whose texts name nobody; see `text`."""
        paths, labels = tuple(paths), tuple(labels)
        for drop in drops:
            where, detail = (self.text(text, paths, labels) for text in (drop.where, drop.detail))
            yield Drop(drop.stage, drop.reason, where, detail)

    def _hash(self, kind: str, text: str) -> str:
        message = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:16]


def method_of(source: SourceOptions) -> tuple[str, tuple[str, ...]]:
    """Return what ``DeidentificationMethod`` would say of a source, and its codes (PS3.16, CID 7050).

    113100 Basic Application Confidentiality Profile, 113101 Clean Pixel Data Option (text is cropped or
    dropped), 113108 Retain Patient Characteristics Option. Without ``labels`` the names of structures
    (ROIName) leave as they are: that is not the profile.
    """
    names = "keyed hashes for files and groups" if source.anonymous_names else "names of files kept"
    text = source.text_in_pixels
    names += "" if text == "keep" else f"; burned-in text looked for by OCR: {text}"
    if source.reader != "dicom":
        return f"pixels alone; {names}", ()
    codes = []
    if source.anonymous_names and (source.labels is not None or not source.segmentations):  # type: ignore[attr-defined]
        cleaned = ["113101"] if text in ("crop", "drop") else []
        codes = ["113100", *cleaned, *(["113108"] if "PatientSex" in source.keep else [])]  # type: ignore[attr-defined]
    return f"{PROFILE}; pixels and allowed attributes alone; {names}", tuple(codes)


@contextmanager
def neutral_errors(source: SourceOptions) -> Iterator[None]:
    """Let `SourceError` out without what may name somebody."""
    try:
        yield
    except SourceError as error:
        text = Names(salted(source)).text(str(error))
        if text == str(error):
            raise
        advice = "a dry run with `anonymous_names: false` shows them"
        hidden = f"(Names of files and what they say are hidden; {advice}.)"
        raise SourceError(f"{text} {hidden}") from error


@cache
def own_words() -> frozenset[str]:
    """Return the words that the program itself is written in."""
    here = Path(__file__).resolve().parent
    sources = (*here.rglob("*.py"), *(here.parent / "gmai_xtuner" / "core").rglob("*.py"))
    words = (_WORD.findall(source.read_text(encoding="utf-8")) for source in sources)
    return frozenset(word for found in words for word in found if not word.isdigit())


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts in a unit's payload; a `TypeError` if it holds something else than plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in texts_in(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in texts_in(item))
    elif dataclasses.is_dataclass(value):
        yield from texts_in([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif not isinstance(value, bool | int | float | bytes | None):
        raise TypeError(f"a unit's payload holds a {type(value).__name__}; expected plain values")
