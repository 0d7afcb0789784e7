# SPDX-License-Identifier: Apache-2.0

"""Rows of a benchmark's question files, and which of their columns is the question, an answer, an image.

Names of columns are compared in lower case without spaces and punctuation: ``Figure_path`` is ``figurepath``.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gmai_xtuner.core.errors import SourceError
from gmai_xtuner.core.records import SUFFIXES, iter_raw
from gmai_xtuner.core.strict_json import STRICT_JSON

QUESTION_FILES = (*SUFFIXES, ".csv", ".tsv")

QUESTIONS = ("question", "questionrephrase", "query", "problem", "instruction", "prompt")
ANSWERS = ("answer", "gtanswer", "groundtruth", "response", "answerlabel", "label")
LISTS = ("options", "choices")
IDS = ("id", "qid", "index", "questionid", "uid")
CASES = ("caseid", "patientid", "patient", "case", "subjectid", "studyid")
SPLITS = ("split", "phrasetype")
IMAGES = (
    *("image", "images", "imagepath", "imagepaths", "imagename", "imgname", "imgpath", "img"),
    *("figurepath", "imagefile", "filename", "filepath"),
    *(f"image{number}" for number in range(1, 10)),
)
IMAGE_FILES = frozenset(
    (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".ppm", ".pgm")
)

_CELL = 2**30  # characters: images lie in cells as base64
_LETTER = re.compile(r"(?:option|choice)?([a-j])")
# The first bytes of PNG, JPEG, GIF, WebP, TIFF and BMP, as base64 writes them.
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_PREFIX = re.compile(r"^\s*\(?([A-Ja-j])\s*[:.)]\s*")

Cells = Mapping[str, Any]


def rows(path: Path) -> Iterator[Cells]:
    """Yield the rows of a question file, of `QUESTION_FILES`; what is no row of columns is an empty one.

    Of a JSON object (``{"data": [...]}``, ``{"SLAKE": [...]}``) these are its lists. A `GMAIError` if it
    can't be read.
    """
    delimiter = {".csv": ",", ".tsv": "\t"}.get(suffix := path.suffix.lower())
    if delimiter:
        yield from _table(path, delimiter)
    elif suffix == ".json" and is_json_object(path):
        yield from _lists(path)
    else:
        for raw in iter_raw(path, columns=None):
            cells = raw.decode()
            yield cells if isinstance(cells, dict) else {}


def is_json_object(path: Path) -> bool:
    """Return whether a file begins as a JSON object, not as a list or as lines of something else."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _lists(path: Path) -> Iterator[Cells]:
    try:
        content = STRICT_JSON.decode(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error}).") from error
    for part in content.values():
        for cells in part if isinstance(part, list) else [part]:
            if isinstance(cells, dict):
                yield cells


def _table(path: Path, delimiter: str) -> Iterator[Cells]:
    before = csv.field_size_limit(_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(table, [])
            if len(set(header)) < len(header):
                raise SourceError(f"{path} has two columns of one name. Correct its header.")
            for cells in filter(None, table):
                if len(cells) != len(header):
                    told = f"{len(cells)} cells, the header has {len(header)}"
                    raise SourceError(
                        f"{path}, line {table.line_num}: {told}. Quote texts with {delimiter!r}."
                    )
                yield dict(zip(header, cells, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} can't be read as a table in UTF-8 ({error}).") from error
    finally:
        csv.field_size_limit(before)


def plain(name: str) -> str:
    """Return a column's name as it is compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def by_name(cells: Cells) -> dict[str, Any]:
    """Return cells under their compared names; of two that are the same the first that isn't empty."""
    found: dict[str, Any] = {}
    for name, value in cells.items():
        if found.get(plain(name)) in (None, ""):
            found[plain(name)] = value
    return found


def first(cells: Cells, names: tuple[str, ...]) -> str:
    """Return the first of these cells that isn't empty, as text; "" if there is none."""
    for value in map(cells.get, names):
        if value is not None and not isinstance(value, dict | list | bytes) and str(value).strip():
            return str(value).strip()
    return ""


def spelling(cells: Cells, names: tuple[str, ...]) -> str:
    """Return the name in the file of the first of these columns that isn't empty; "" if there is none."""
    own = {
        plain(name): name for name, value in reversed([*cells.items()]) if value not in (None, "")
    }
    return next((own[name] for name in names if name in own), "")


def questions(cells: Cells) -> list[str]:
    """Return the texts of a row's question: as it is, and rephrased if the benchmark does."""
    found = [cells[name] for name in QUESTIONS if isinstance(cells.get(name), str)]
    wanted = [text.strip() for text in found if text.strip()][:1]
    again = cells.get("questionrephrase")
    if isinstance(again, str) and len(again.split()) > 1 and again.strip() not in wanted:
        wanted.append(again.strip())
    return wanted


def options(cells: Cells) -> dict[str, str]:
    """Return letter -> text of the options, without ``A:`` before it."""
    for name in LISTS:
        value = cells.get(name)
        if isinstance(value, str) and value.strip().startswith(("[", "{")):
            value = _literal(value.strip())
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


def answer(cells: Cells) -> str:
    """Return the right answer as text: of a letter, its option's."""
    given = first(cells, ANSWERS)
    if len(given) == 1 and given.isalpha():
        return options(cells).get(given.upper(), given)
    return given


def _bare(text: str) -> str:
    return _PREFIX.sub("", text).strip()


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def images(cells: Cells) -> Iterator[str | bytes]:
    """Yield a row's images: names of files as texts, and the bytes of those that lie in the row."""
    for name in IMAGES:
        yield from _images(cells.get(name), certain=name not in ("filename", "filepath"))


def _images(value: Any, *, certain: bool) -> Iterator[str | bytes]:
    if isinstance(value, bytes):
        if value:
            yield value
    elif isinstance(value, Mapping):
        inner = value.get("bytes") or value.get("path") or value.get("url")
        yield from _images(inner, certain=certain)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _images(one, certain=certain)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, str) and value.strip() and value.strip().lower() != "nan":
        text = value.strip()
        listed = _literal(text) if text.startswith("[") and text.endswith("]") else None
        if isinstance(listed, list):
            yield from _images(listed, certain=certain)
            return
        coded = _DATA_URL.sub("", text, count=1)
        if coded is not text or (len(text) > 64 and text.startswith(_BASE64) and " " not in text):
            try:
                yield base64.b64decode(coded, validate=False)
                return
            except (binascii.Error, ValueError):
                pass
        if certain or is_image(text):
            yield text


def is_image(name: str) -> bool:
    """Return whether a name is that of an image file."""
    return PurePosixPath(name).suffix.lower() in IMAGE_FILES
