# SPDX-License-Identifier: Apache-2.0

"""What a reader gives, and what every reader needs: files with their hashes, option lists, and a collector.

Nothing here repairs: what can't be read becomes a :class:`Problem` with a reason, what can't be a benchmark
at all a :class:`BenchmarkError`.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gmai_xtuner.core.errors import GMAIError, is_unicode
from gmai_xtuner.evaluate.protocols import Protocol
from gmai_xtuner.evaluate.questions import IMAGE_MARK, ImageSource, Question

_NUMBERED_MARK = re.compile(r"<image (\d+)>")


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
        protocols: the ways to ask and score it.
    """

    name: str
    variant: str
    questions: tuple[Question, ...]
    source: tuple[SourceFile, ...]
    problems: tuple[Problem, ...] = ()
    protocols: tuple[Protocol, ...] = ()

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


_FAULTS = frozenset(
    {
        *("no_question", "no_answer", "no_options", "one_option", "bad_options", "bad_answer"),
        *("bad_image_path", "answer_disagrees", "ambiguous_answer", "answer_not_an_option"),
        "duplicate_id",
    }
)
"""What is wrong with a file or with its column map: an own benchmark is refused, the authors' is not."""


class Collector:
    """Gathers questions and what is wrong with others.

    Args:
        name, variant: of the benchmark.
        require_images: leave out questions whose image file is missing.
        needs_images: leave out questions that name no image.
        roots: folders below which image files must lie; a record may name no other file.
        strict: refuse the file where a row shows that it, or its column map, is wrong.

    Attributes:
        place: file and row that is being read.
    """

    def __init__(
        self,
        name: str,
        variant: str,
        *,
        require_images: bool,
        needs_images: bool,
        roots: Collection[str],
        strict: bool,
    ) -> None:
        self.name, self.variant, self.place, self.strict = name, variant, "", strict
        self._require_images, self.needs_images = require_images, needs_images
        self._roots = tuple(root.rstrip("/") + "/" for root in roots)
        self._questions: dict[str, Question] = {}
        self._problems: list[Problem] = []
        self._repeated: Counter[str] = Counter()
        self._folders: dict[Path, frozenset[str]] = {}

    def problem(
        self, reason: str, record: str, detail: str, *, left_out: bool = True, column: str = ""
    ) -> None:
        """Note what is wrong with a record.

        Raises:
            BenchmarkError: the file is refused for it.
        """
        if self.strict and reason in _FAULTS:
            where = f", column {column!r}" if column else ""
            raise BenchmarkError(
                f"{self.place}{where} (question {record}): {detail}. Correct the file or its column map."
            )
        self._problems.append(Problem(reason, record, detail, left_out))

    def add(self, question: Question) -> None:
        """Take a question, unless it can't be asked: then note why."""
        if (why := self._why_not(question)) is not None:
            self.problem(
                why[0], ascii(question.id) if why[0] == "not_text" else question.id, why[1]
            )
            return
        if question.id in self._questions:
            # the authors' counts hold it, so it stays, under an id of its own
            self._repeated[question.id] += 1
            renamed = f"{question.id}#{self._repeated[question.id] + 1}"
            told = f"the id occurred before; it is {renamed}"
            self.problem("duplicate_id", question.id, told, left_out=False)
            question = replace(question, id=renamed)
        if question.options and question.answer is not None and not question.gold_letters():
            told = f"the gold answer {_short(question.answer)} is none of the options: every answer is wrong"
            self.problem("answer_not_an_option", question.id, told, left_out=False)
        self._questions[question.id] = question

    def _why_not(self, question: Question) -> tuple[str, str] | None:
        """Return why a question can't be asked: the key that it is counted under, and a sentence."""
        texts, files = (question.text, *question.options), []
        if not question.text.strip():
            return "no_question", "the question is empty"
        if len(question.options) == 1:
            return "one_option", f"only one option: {question.options[0]!r}"
        for image in question.images:
            if isinstance(image, Path):
                files.append(image)
                if not os.path.abspath(image).startswith(self._roots):
                    return (
                        "image_outside",
                        f"{str(image)!r} lies outside of {', '.join(self._roots)}",
                    )
        if not all(map(is_unicode, (question.id, *texts, question.answer or ""))):
            return "not_text", "no UTF-8 can hold it (half a surrogate pair)"
        if self._require_images:
            missing = [str(image) for image in files if not self._exists(image)]
            if missing:
                return "missing_image", ", ".join(dict.fromkeys(missing))
            if not question.images and self.needs_images:
                return "no_image", "the record names no image"
        marks = sum(text.count(IMAGE_MARK) for text in texts)
        if marks not in (0, len(question.images)):
            return (
                "image_marks",
                f"{marks} marks {IMAGE_MARK} in the text, {len(question.images)} images",
            )
        return None

    def _exists(self, path: Path) -> bool:
        """Look a file up in one listing of its folder: a look at each of 89,000 files takes longer."""
        if path.parent not in self._folders:
            try:
                names = frozenset(os.listdir(path.parent))
            except OSError:
                names = frozenset()
            self._folders[path.parent] = names
        return path.name in self._folders[path.parent]

    def benchmark(
        self, source: Sequence[SourceFile], protocols: tuple[Protocol, ...] = ()
    ) -> Benchmark:
        """Return what was gathered, with the protocols that can ask it.

        Raises:
            BenchmarkError: not one question can be asked; the message has the reasons with counts.
        """
        questions, problems = tuple(self._questions.values()), tuple(self._problems)
        found = Benchmark(self.name, self.variant, questions, tuple(source), problems, protocols)
        if not questions:
            files = ", ".join(repr(str(file.path)) for file in source[:3])
            files += f" and {len(source) - 3} more" if len(source) > 3 else ""
            told = f"{files} has no question of this variant."
            if problems:
                counts = (f"{count} {reason}" for reason, count in found.counted_problems().items())
                told = (
                    f"not one question of {files} can be asked ({', '.join(counts)}). "
                    f"The first: question {problems[0].record}, {problems[0].detail}."
                )
            raise BenchmarkError(f"{self.name} ({self.variant}): {told}")
        return found


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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
