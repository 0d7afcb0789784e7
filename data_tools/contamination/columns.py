"""Which column of a benchmark's row is the question, an option, the answer, a picture; in whatever spelling.

Names are compared in lower case without spaces and punctuation, so ``Figure_path`` is ``figurepath``.
"""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

QUESTIONS = ("question", "questionrephrase", "query", "problem", "instruction", "prompt")
ANSWERS = ("answer", "gtanswer", "groundtruth", "response", "answerlabel", "label")
LISTS = ("options", "choices")
IDS = ("id", "qid", "index", "questionid", "uid")
CASES = ("caseid", "patientid", "patient", "case", "subjectid", "studyid")
SPLITS = ("split", "phrasetype")
PICTURES = (
    "image",
    "images",
    "imagepath",
    "imagepaths",
    "imagename",
    "imgname",
    "imgpath",
    "img",
    "figurepath",
    "imagefile",
    "filename",
    "filepath",
    *(f"image{number}" for number in range(1, 10)),
)
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".bmp",
    ".webp",
    ".gif",
    ".jp2",
    ".ppm",
    ".pgm",
)
"""Of picture files."""

_LETTER = re.compile(r"(?:option|choice)?([a-j])")
# The first bytes of PNG, JPEG, GIF, WebP, TIFF and BMP, as base64 writes them.
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_PREFIX = re.compile(r"^\s*\(?([A-Ja-j])\s*[:.)]\s*")


def plain(name: str) -> str:
    """A column's name as it is compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def by_name(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Cells under their compared names; of two that are the same the first that has something in it."""
    found: dict[str, Any] = {}
    for name, value in cells.items():
        if found.get(plain(name)) in (None, ""):
            found[plain(name)] = value
    return found


def first(cells: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these cells that has something in it, as text."""
    for name in names:
        value = cells.get(name)
        if value is not None and not isinstance(value, dict | list | bytes) and str(value).strip():
            return str(value).strip()
    return ""


def spelt(cells: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The column of a row whose compared name is the first of these that has something in it, as it is spelt
    there; or ""."""
    for name in names:
        for own, value in cells.items():
            if plain(own) == name and value not in (None, ""):
                return own
    return ""


def questions(cells: Mapping[str, Any]) -> list[str]:
    """The texts of a row's question: as it is, and rephrased if the benchmark does."""
    found = [cells[name] for name in QUESTIONS if isinstance(cells.get(name), str)]
    texts = [text.strip() for text in found if text.strip()]
    wanted = texts[:1]
    rephrased = cells.get("questionrephrase")
    if (
        isinstance(rephrased, str)
        and len(rephrased.split()) > 1
        and rephrased.strip() not in wanted
    ):
        wanted.append(rephrased.strip())
    return wanted


def options(cells: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> text of the options, without ``A:`` before it."""
    for name in LISTS:
        value = cells.get(name)
        if isinstance(value, str) and value.strip().startswith(("[", "{")):
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
        if isinstance(value, dict):
            return {str(key): str(text) for key, text in value.items() if text is not None}
        if isinstance(value, list) and value:
            return {chr(65 + at): _bare(str(text)) for at, text in enumerate(value[:26])}
    found = {}
    for name, value in cells.items():
        match = _LETTER.fullmatch(name)
        if match and value is not None and str(value).strip() and str(value) != "nan":
            found[match[1].upper()] = _bare(str(value))
    return dict(sorted(found.items()))


def answer(cells: Mapping[str, Any]) -> str:
    """The right answer as text: of a letter, its option's."""
    given = first(cells, ANSWERS)
    if len(given) == 1 and given.isalpha():
        return options(cells).get(given.upper(), given)
    return given


def _bare(text: str) -> str:
    return _PREFIX.sub("", text).strip()


def pictures(cells: Mapping[str, Any]) -> Iterator[str | bytes]:
    """A row's pictures: names of files as texts, and the bytes of those that lie in the row."""
    for name in PICTURES:
        yield from _pictures(cells.get(name), certain=name not in ("filename", "filepath"))


def _pictures(value: Any, *, certain: bool) -> Iterator[str | bytes]:
    if isinstance(value, bytes):
        if value:
            yield value
    elif isinstance(value, Mapping):
        inner = value.get("bytes") or value.get("path") or value.get("url")
        yield from _pictures(inner, certain=certain)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _pictures(one, certain=certain)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, str) and value.strip() and value.strip().lower() != "nan":
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                listed = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                listed = None
            if isinstance(listed, list):
                yield from _pictures(listed, certain=certain)
                return
        coded = _DATA_URL.sub("", text, count=1)
        if coded is not text or (len(text) > 64 and text.startswith(_BASE64) and " " not in text):
            try:
                yield base64.b64decode(coded, validate=False)
                return
            except (binascii.Error, ValueError):
                pass
        if certain or is_picture(text):
            yield text


def is_picture(name: str) -> bool:
    """Whether a name is that of a picture file."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES
