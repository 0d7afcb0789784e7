# SPDX-License-Identifier: Apache-2.0

"""What every benchmark becomes, and what every scorer gives.

Nothing is repaired: what can't be read becomes a :class:`Problem` with a reason, what can't be a benchmark at
all a :class:`BenchmarkError`.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gmai_xtuner.core.errors import GMAIError

if TYPE_CHECKING:
    from PIL import Image

    from gmai_xtuner.evaluate import protocols

IMAGE_MARK = "<image>"
"""Where an image belongs in a text."""


@runtime_checkable
class StoredImage(Protocol):
    """An image inside the benchmark's own file, named by file and place; hashable, small, and pickled.

    So twenty thousand questions hold no pixels: they are read when they are asked for.
    """

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """Return the encoded image; an ``ImageError`` where the file is gone or changed, or none is there."""
        ...


ImageSource = Path | bytes | StoredImage
"""A file, the bytes of one, or one inside the benchmark's own file."""


def load_image(source: ImageSource) -> Path | bytes:
    """Return what :mod:`gmai_xtuner.core.imaging.images` reads: a path or an encoded image."""
    return source.read() if isinstance(source, StoredImage) else source


def open_image(source: ImageSource, name: str) -> Image.Image:
    """Open a question's image as training does; errors call it ``name`` where it has no file of its own."""
    from gmai_xtuner.core.imaging.images import decode_rgb, open_rgb

    content = load_image(source)
    return decode_rgb(content, name) if isinstance(content, bytes) else open_rgb(content)


@dataclass(frozen=True, slots=True)
class Question:
    """One question, by an id that is unique in its benchmark.

    ``text`` is without options or instruction, with ``<image>`` marks where the authors name an image.
    ``images`` are in the order of the marks in text and options, an image named twice standing twice; all of
    them before the text where there is no mark. ``answer`` is the text of the right option, or the gold
    answer; None where the authors keep it; ``answers`` count as right as well. ``groups``, e.g.
    ``{"modality": "CT"}``, are what tables are made over. ``letters`` are the options' where they are not A,
    B, C ..., ``gold_letter`` is the file's own; it decides where options read the same, as images do.
    """

    id: str
    text: str
    images: tuple[ImageSource, ...] = ()
    options: tuple[str, ...] = ()
    answer: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    letters: str = ""
    gold_letter: str = ""

    def lettered(self) -> dict[str, str]:
        """Return letter -> text of each option."""
        letters = self.letters or string.ascii_uppercase[: len(self.options)]
        return dict(zip(letters, self.options, strict=True))

    def gold_letters(self) -> frozenset[str]:
        """Return the letters of the gold answer; several where two options read the same."""
        if self.gold_letter and self.answer is not None and IMAGE_MARK in self.answer:
            return frozenset(self.gold_letter)
        return frozenset(letter for letter, text in self.lettered().items() if text == self.answer)

    @property
    def target(self) -> str:
        """The one letter that the file means; empty where it is kept, or there are no options."""
        return self.gold_letter or min(self.gold_letters(), default="")

    def digest(self) -> str:
        """Hash words, lettered options and gold answers: an id may stand for another question elsewhere."""
        options = list(self.lettered().items())
        content = [self.text, options, self.answer, list(self.answers), self.gold_letter]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class BenchmarkError(GMAIError):
    """A benchmark's file can't be read as a whole, or is another benchmark's."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that was read, with the hash of its bytes in hexadecimal, and its size in bytes."""

    path: Path
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A question that can't be asked, or not as its authors meant it.

    ``reason`` is a short stable key under which problems are counted, ``record`` the question's id, or its
    place in the file, ``detail`` what was expected and what came. ``left_out``: it is not among
    ``Benchmark.questions``.
    """

    reason: str
    record: str
    detail: str
    left_out: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that has been read; questions and problems stand in the order of the files.

    ``variant`` is its part or language, e.g. ``"en"`` of SLAKE; ``source`` every annotation file; images are
    not hashed.
    """

    name: str
    variant: str
    questions: tuple[Question, ...]
    source: tuple[SourceFile, ...]
    problems: tuple[Problem, ...] = ()
    protocols: tuple[protocols.Protocol, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name} ({self.variant})"

    @property
    def known_as(self) -> str:
        """The names by which it may be known: its own, and those of its files."""
        return " ".join((self.name, self.variant, *self.hashes()))

    def counted_problems(self) -> Mapping[str, int]:
        """Return reason -> number of problems, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each annotation file by its name; files of one name (MMMU's) are numbered."""
        found: dict[str, str] = {}
        names: Counter[str] = Counter()
        for name, digest in sorted((one.path.name, one.sha256) for one in self.source):
            names[name] += 1
            found[f"{name} ({names[name]})" if names[name] > 1 else name] = digest
        return found


@dataclass(frozen=True, slots=True)
class Score:
    """What one answer is worth, from 0 to 1; None where there is no gold answer.

    ``parsed`` is what the scorer understood, e.g. the letter of an option; None if nothing: then ``value`` is
    0 (None without gold), it is never guessed.
    """

    value: float | None
    parsed: str | None


@dataclass(frozen=True, slots=True)
class Scorer:
    """A named rule; its version grows when any answer's score changes.

    ``rule`` gives the score of an answer; its value is dropped where a question has no gold answer.
    ``applies`` tells whether a question can be scored by it, e.g. only one with options.
    """

    name: str
    version: int
    description: str
    rule: Callable[[Question, str], Score]
    applies: Callable[[Question], bool] = lambda _: True

    def score(self, question: Question, answer: str) -> Score:
        """Score an answer."""
        score = self.rule(question, answer)
        return Score(None, score.parsed) if question.answer is None else score
