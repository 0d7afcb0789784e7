"""Rows of JSON, JSONL, CSV, TSV and Parquet files, streamed; what is in a row that holds a conversation."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from gmai_xtuner.core.errors import SourceError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
CONVERSATIONS = (".json", ".jsonl", ".ndjson", ".parquet")
"""Files that a mixture may name."""

_CELL = 2**30  # characters: pictures lie in cells as base64
_ROWS = 64
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file, ``number`` from 1: the line of JSONL, the record of the others."""

    number: int
    cells: Mapping[str, Any]


def rows(path: Path, *, columns: tuple[str, ...] | None = None) -> Iterator[Row]:
    """Rows of a file by its suffix.

    Args:
        path: of `SUFFIXES`.
        columns: of a Parquet file, which others are not read; default: all.

    Raises:
        SourceError: the file can't be read, with place and reason.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path, columns)
        elif suffix in (".csv", ".tsv"):
            yield from _table(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json":
            yield from _json(path)
        else:
            yield from _lines(path)
    except OSError as error:
        raise SourceError(f"{path} can't be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
            if not text:
                continue
            try:
                cells = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{path}, line {number} is not JSON ({error}).") from error
            yield Row(number, cells if isinstance(cells, dict) else {})


def _json(path: Path) -> Iterator[Row]:
    """Objects of a list, or of the lists in an object (``{"data": [...]}``, ``{"SLAKE": [...]}``)."""
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        with path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            try:
                for number, cells in enumerate(ijson.items(file, "item", use_float=True), 1):
                    yield Row(number, cells if isinstance(cells, dict) else {})
            except ijson.JSONError as error:
                raise SourceError(f"{path} is not a JSON list ({error}).") from error
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error}).") from error
    number = 0
    for part in content.values() if isinstance(content, dict) else ():
        for cells in part if isinstance(part, list) else [part]:
            if isinstance(cells, dict):
                number += 1
                yield Row(number, cells)


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    before = csv.field_size_limit(_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.DictReader(file, delimiter=delimiter), 1):
                yield Row(number, {key: value for key, value in cells.items() if key is not None})
    except csv.Error as error:
        raise SourceError(f"{path} can't be read as a table ({error}).") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            picked = there if columns is None else [name for name in columns if name in there]
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=picked):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(number, cells)
    except pa.ArrowException as error:
        raise SourceError(f"{path} is not a readable Parquet file ({error}).") from error


# --- conversations ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """What is asked, and what is answered to it (or "")."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record in LLaVA or OpenAI form.

    Args:
        id: its own, or ``"<file>:<number>"``, as training calls it.
        turns: questions with their answers.
        images: names as they are in the record, normalised.
        inside: pictures inside of the record (bytes or data URLs), which training doesn't read.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    inside: int


def conversation(row: Row, file: Path) -> Conversation | None:
    """The conversation in a row; None if it has no turns of a human and a model."""
    cells = row.cells
    messages = cells.get("conversations") or cells.get("messages")
    if not isinstance(messages, list):
        return None
    listed = cells.get("image") if cells.get("image") is not None else cells.get("images")
    pictures: list[Any] = listed if isinstance(listed, list) else [] if listed is None else [listed]
    turns: list[list[str]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            return None
        role = message.get("from") or message.get("role")
        value = message.get("value") if message.get("value") is not None else message.get("content")
        text, shown = _text(value)
        pictures = [*pictures, *shown]
        if role in _HUMAN:
            turns.append([text, ""])
        elif role in _MODEL and turns:
            turns[-1][1] = text
    if not turns:
        return None
    own = next((cells[key] for key in ("id", "question_id") if cells.get(key) is not None), None)
    names = [one for one in pictures if isinstance(one, str) and not one.startswith("data:")]
    return Conversation(
        id=str(own) if own is not None else f"{file.name}:{row.number}",
        turns=tuple(Turn(question, answer) for question, answer in turns),
        images=tuple(dict.fromkeys(posixpath.normpath(name) for name in names if name)),
        inside=len(pictures) - len(names),
    )


def _text(value: Any) -> tuple[str, list[Any]]:
    """Text and pictures of a message."""
    if isinstance(value, str):
        return value, []
    texts, pictures = [], []
    for part in value if isinstance(value, list) else ():
        if not isinstance(part, Mapping):
            continue
        if isinstance(part.get("text"), str):
            texts.append(part["text"])
        for key in ("image_url", "image", "path"):
            if (shown := part.get(key)) is not None:
                pictures.append(shown.get("url") if isinstance(shown, Mapping) else shown)
                break
    return "\n".join(texts), pictures
