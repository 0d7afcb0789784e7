"""What every reader needs: files with their hashes, option lists, and questions collected with what is wrong.

Nothing here repairs: what can't be read becomes a :class:`Problem` with a reason, what can't be a benchmark
at all a :class:`BenchmarkError`.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.benchmark import (
    Benchmark,
    BenchmarkError,
    Problem,
    SourceFile,
)
from gmai_xtuner.evaluate.questions import IMAGE_MARK, ImageSource, Question

_NUMBERED_MARK = re.compile(r"<image (\d+)>")
_MAX_FIELD = 1 << 30
_BLOCK = 1 << 20


def hashed(path: Path) -> SourceFile:
    """A file with its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        size = file.tell()
    return SourceFile(path, digest.hexdigest(), size)


def read_text(path: Path) -> tuple[str, SourceFile]:
    """A UTF-8 file's text (a byte order mark is dropped), and the file with its hash.

    Raises:
        BenchmarkError: it can't be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{str(path)!r} can't be read ({error}). Check the path.") from error
    source = SourceFile(path, hashlib.sha256(data).hexdigest(), len(data))
    try:
        return data.decode("utf-8-sig"), source
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BenchmarkError(
            f"{str(path)!r} is not UTF-8 at line {line} (byte {data[error.start]:#04x}). Fetch it again."
        ) from error


def read_records(path: Path) -> tuple[list[Mapping[str, Any]], SourceFile]:
    """The objects of a JSON list, and the file with its hash.

    Raises:
        BenchmarkError: no JSON, no list, or a list with something else than objects.
    """
    text, source = read_text(path)
    try:
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BenchmarkError(
            f"{str(path)!r} is not valid JSON ({error}). Fetch it again."
        ) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise BenchmarkError(f"{str(path)!r} holds no list of records. Fetch it again.")
    return records, source


def read_csv(path: Path) -> tuple[list[dict[str, str]], SourceFile]:
    """Rows of a CSV file by column name, and the file with its hash.

    Values stay text: "None" and "NA" are answers here, which pandas would read as missing.

    Raises:
        BenchmarkError: it can't be read, or a row has more or fewer fields than the header.
    """
    text, source = read_text(path)
    previous_limit = csv.field_size_limit(_MAX_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        rows = []
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise BenchmarkError(
                    f"{str(path)!r}, line {reader.line_num}: {len(fields)} fields, the header has "
                    f"{len(header)}. Fetch it again."
                )
            rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise BenchmarkError(
            f"{str(path)!r} is not valid CSV ({error}). Fetch it again."
        ) from error
    finally:
        csv.field_size_limit(previous_limit)
    return rows, source


class UnreadableOptions(ValueError):
    """An option list that can't be parsed."""


def parse_list(value: object) -> tuple[str, ...]:
    """A list, or the text of one as Python writes it, as texts; an empty text is an empty list.

    Only literals are read, nothing is evaluated.

    Raises:
        UnreadableOptions: it is neither.
    """
    parsed = value
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UnreadableOptions(f"{_short(value)} is no list ({error})") from error
    if not isinstance(parsed, list | tuple):
        raise UnreadableOptions(f"a list was expected, {_short(value)} came")
    if not all(isinstance(item, str | int | float) for item in parsed):
        raise UnreadableOptions(f"a list of texts was expected, {_short(value)} came")
    return tuple(str(item) for item in parsed)


def mark_images(
    texts: Sequence[str], images: Mapping[int, ImageSource]
) -> tuple[tuple[str, ...], tuple[ImageSource, ...]]:
    """Texts with ``<image 2>`` -> the same with ``<image>``, and the images in the order of the marks.

    Without any mark the images stand in their own order, for before the text; an image that no mark
    names comes before the text's own, as it would without marks.

    Args:
        texts: the question and its options.
        images: number in the marks -> image.

    Raises:
        KeyError: a mark whose image is not there; its argument is the number.
    """
    named: list[ImageSource] = []
    numbers: set[int] = set()

    def marked_as(match: re.Match[str]) -> str:
        number = int(match[1])
        named.append(images[number])
        numbers.add(number)
        return IMAGE_MARK

    marked = [_NUMBERED_MARK.sub(marked_as, text) for text in texts]
    unnamed = [images[number] for number in sorted(images) if number not in numbers]
    if named and unnamed:
        marked[0] = f"{IMAGE_MARK}\n" * len(unnamed) + marked[0]
    return tuple(marked), (*unnamed, *named)


class Folders:
    """Whether files exist, by one listing of each folder rather than one look at each file."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def has(self, path: Path) -> bool:
        folder = str(path.parent)
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._names[folder] = frozenset()
        return path.name in self._names[folder]


class Collector:
    """Gathers questions and what is wrong with others.

    Args:
        name: of the benchmark.
        variant: of the benchmark.
        require_images: leave out questions whose image file is missing.
    """

    def __init__(self, name: str, variant: str, *, require_images: bool) -> None:
        self.name = name
        self.variant = variant
        self._require_images = require_images
        self._questions: dict[str, Question] = {}
        self._problems: list[Problem] = []
        self._repeated: dict[str, int] = {}
        self._folders = Folders()

    def problem(self, reason: str, record: str, detail: str, *, left_out: bool = True) -> None:
        """Note what is wrong with a record."""
        self._problems.append(Problem(reason, record, detail, left_out))

    def add(self, question: Question) -> None:
        """Take a question, unless it can't be asked: then note why."""
        if not question.text.strip():
            self.problem("no_question", question.id, "the question is empty")
            return
        if len(question.options) == 1:
            self.problem("one_option", question.id, f"only one option: {question.options[0]!r}")
            return
        if self._require_images:
            missing = [
                str(image)
                for image in question.images
                if isinstance(image, Path) and not self._folders.has(image)
            ]
            if missing:
                self.problem("missing_image", question.id, ", ".join(dict.fromkeys(missing)))
                return
            if not question.images:
                self.problem("no_image", question.id, "the record names no image")
                return
        marks = sum(text.count(IMAGE_MARK) for text in (question.text, *question.options))
        if marks and marks != len(question.images):
            self.problem(
                "image_marks",
                question.id,
                f"{marks} marks {IMAGE_MARK} in the text, {len(question.images)} images",
            )
            return
        if question.id in self._questions:
            # the authors' counts hold it, so it stays, under an id of its own
            times = self._repeated[question.id] = self._repeated.get(question.id, 1) + 1
            renamed = f"{question.id}#{times}"
            self.problem(
                "duplicate_id",
                question.id,
                f"the id occurred before; it is {renamed}",
                left_out=False,
            )
            question = replace(question, id=renamed)
        if question.options and question.answer is not None and not question.gold_letters():
            self.problem(
                "answer_not_an_option",
                question.id,
                f"the gold answer {_short(question.answer)} is none of the options: every answer is wrong",
                left_out=False,
            )
        self._questions[question.id] = question

    def benchmark(self, source: Sequence[SourceFile]) -> Benchmark:
        """What was gathered.

        Raises:
            BenchmarkError: not one question can be asked; the message has the reasons with counts.
        """
        benchmark = Benchmark(
            self.name,
            self.variant,
            tuple(self._questions.values()),
            tuple(source),
            tuple(self._problems),
        )
        if not benchmark.questions:
            files = ", ".join(repr(str(file.path)) for file in source[:3])
            more = f" and {len(source) - 3} more" if len(source) > 3 else ""
            if not self._problems:
                raise BenchmarkError(
                    f"{self.name} ({self.variant}): {files}{more} has no question of this variant."
                )
            counts = ", ".join(
                f"{count} {reason}" for reason, count in benchmark.counted_problems().items()
            )
            first = self._problems[0]
            raise BenchmarkError(
                f"{self.name} ({self.variant}): not one question of {files}{more} can be asked ({counts}). "
                f"The first: question {first.record}, {first.detail}."
            )
        return benchmark


def gold_option(options: Sequence[str], answer: str) -> str:
    """The option that a gold text means: equal, or equal but for case and outer spaces; else the text itself.

    The second holds only if exactly one option is meant.
    """
    if answer in options:
        return answer
    meant = {option for option in options if option.strip().casefold() == answer.strip().casefold()}
    return meant.pop() if len(meant) == 1 else answer


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A field as text; absent and null are empty. Numbers are written as JSON has them."""
    value = record.get(name)
    return "" if value is None else str(value)


def walk(folder: Path, *, depth: int = 4) -> Iterator[Path]:
    """Annotation files under a folder, in the order of their names; folders of images are not entered.

    Raises:
        BenchmarkError: the folder can't be listed.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise BenchmarkError(f"{str(folder)!r} can't be listed ({error}).") from error
    for entry in entries:
        if entry.is_dir():
            if depth and not _IMAGE_FOLDER.search(entry.name) and not entry.name.startswith("."):
                yield from walk(Path(entry.path), depth=depth - 1)
        elif entry.name.lower().endswith(ANNOTATION_SUFFIXES):
            yield Path(entry.path)


ANNOTATION_SUFFIXES = (".json", ".csv", ".tsv", ".parquet", ".pkl")
"""Endings of the files that benchmarks ship their questions in."""

_IMAGE_FOLDER = re.compile(r"^(?:imgs?|images?|figures?)(?:_\d+)?$|image[_ ]folder$", re.IGNORECASE)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
