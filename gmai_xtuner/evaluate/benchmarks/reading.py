# SPDX-License-Identifier: Apache-2.0

"""What a reader gives, and what every reader needs: files with their hashes, option lists, and a collector.

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
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import GMAIError, ImageError, is_unicode
from gmai_xtuner.evaluate.questions import IMAGE_MARK, ImageSource, Question

_NUMBERED_MARK = re.compile(r"<image (\d+)>")
_MAX_FIELD = 1 << 30


class BenchmarkError(GMAIError):
    """A benchmark's file can't be read as a whole, or is another benchmark's."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that was read.

    Args:
        path: where it lies.
        sha256: of its bytes, in hexadecimal.
        size: bytes.
    """

    path: Path
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A question that can't be asked, or not as its authors meant it.

    Args:
        reason: short stable key under which problems are counted, e.g. ``"missing_image"``.
        record: id of the question, or its line or position in the file.
        detail: what was expected and what came, e.g. the name of the missing image.
        left_out: the question is not among ``Benchmark.questions``.
    """

    reason: str
    record: str
    detail: str
    left_out: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that has been read.

    Args:
        name: one of ``NAMES``.
        variant: part or language, e.g. ``"en"`` of SLAKE, ``"test_clean"`` of PMC-VQA.
        questions: in the order of the file.
        source: every annotation file that was read; image files are not hashed.
        problems: what could not be used, in the order of the file.
    """

    name: str
    variant: str
    questions: tuple[Question, ...]
    source: tuple[SourceFile, ...]
    problems: tuple[Problem, ...] = ()

    def counted_problems(self) -> Mapping[str, int]:
        """Return reason -> number of problems, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each annotation file by its name; files of one name (MMMU's) are numbered."""
        found: dict[str, str] = {}
        for file in sorted(self.source, key=lambda one: (one.path.name, one.sha256)):
            name, number = file.path.name, 1
            while name in found:
                number += 1
                name = f"{file.path.name} ({number})"
            found[name] = file.sha256
        return found


def hashed(path: Path) -> SourceFile:
    """Return a file with its SHA-256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return SourceFile(path, digest.hexdigest(), file.tell())


def read_text(path: Path) -> tuple[str, SourceFile]:
    """Return a UTF-8 file's text (a byte order mark is dropped), and the file with its hash.

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
    """Return the objects of a JSON list, and the file with its hash.

    Raises:
        BenchmarkError: no JSON, no list, or a list with something else than objects.
    """
    text, source = read_text(path)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise BenchmarkError(
            f"{str(path)!r} is not valid JSON ({error}). Fetch it again."
        ) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise BenchmarkError(f"{str(path)!r} holds no list of records. Fetch it again.")
    return records, source


def read_csv(path: Path) -> tuple[list[dict[str, str]], SourceFile]:
    """Return the rows of a CSV file by column name, and the file with its hash.

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
    """Return a list, or the text of one as Python writes it, as texts; an empty text is an empty list.

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
    """Turn texts with ``<image 2>`` into the same with ``<image>``, and order the images as the marks.

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


class Collector:
    """Gathers questions and what is wrong with others.

    Args:
        name: of the benchmark.
        variant: of the benchmark.
        require_images: leave out questions whose image file is missing.
        roots: folders below which image files must lie; a record may name no other file.
    """

    def __init__(
        self, name: str, variant: str, *, require_images: bool, roots: Collection[str] = ("/",)
    ) -> None:
        self._roots = tuple(roots)
        self.name = name
        self.variant = variant
        self._require_images = require_images
        self._questions: dict[str, Question] = {}
        self._problems: list[Problem] = []
        self._repeated: dict[str, int] = {}
        self._folders: dict[Path, frozenset[str]] = {}

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
        outside = [image for image in question.images if not self._is_inside(image)]
        if outside:
            detail = f"{str(outside[0])!r} lies outside of {', '.join(self._roots)}"
            self.problem("image_outside", question.id, detail)
            return
        if not all(
            map(is_unicode, (question.id, question.text, *question.options, question.answer or ""))
        ):
            self.problem(
                "not_text", ascii(question.id), "no UTF-8 can hold it (half a surrogate pair)"
            )
            return
        if self._require_images:
            missing = [
                str(image)
                for image in question.images
                if isinstance(image, Path) and not self._exists(image)
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

    def _is_inside(self, image: ImageSource) -> bool:
        if not isinstance(image, Path):
            return True
        path = os.path.abspath(image)
        return any(path.startswith(root.rstrip("/") + "/") for root in self._roots)

    def _exists(self, path: Path) -> bool:
        """Look a file up in one listing of its folder: a look at each of 89,000 files takes longer."""
        if path.parent not in self._folders:
            try:
                names = frozenset(os.listdir(path.parent))
            except OSError:
                names = frozenset()
            self._folders[path.parent] = names
        return path.name in self._folders[path.parent]

    def benchmark(self, source: Sequence[SourceFile]) -> Benchmark:
        """Return what was gathered.

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
    """Return the option that a gold text means; the text itself where that is none.

    An option is meant if it is equal, or the only one that is but for case and outer spaces.
    """
    if answer in options:
        return answer
    meant = {option for option in options if option.strip().casefold() == answer.strip().casefold()}
    return meant.pop() if len(meant) == 1 else answer


def find_file(name: str, folders: Sequence[Path]) -> Path:
    """Return the first that exists of a name in several folders; in the first folder where none does."""
    candidates = [folder / name for folder in folders]
    return next(filter(os.path.isfile, candidates), candidates[0])


def text_of(record: Mapping[str, Any], name: str) -> str:
    """Return a field as text; absent and null are empty. Numbers are written as JSON has them."""
    value = record.get(name)
    return "" if value is None else str(value)


def image_error(name: str, problem: str, reason: str = "missing_image") -> ImageError:
    """Return the error of an image that stands inside a benchmark's file."""
    remedy = "Load the benchmark again; if that does not help, fetch its file again."
    return ImageError(f"image {name}: {problem}", remedy=remedy, reason=reason)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
