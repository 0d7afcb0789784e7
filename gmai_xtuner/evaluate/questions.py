# SPDX-License-Identifier: Apache-2.0

"""What every benchmark becomes, and what every scorer gives."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image

IMAGE_MARK = "<image>"
"""Where an image belongs in a text."""


@runtime_checkable
class StoredImage(Protocol):
    """An image inside the benchmark's own file, read when it is asked for.

    It is hashable, small and can be sent to another process, so that twenty thousand questions
    hold no pixels.
    """

    @property
    def name(self) -> str:
        """The file and the place in it, for people."""
        ...

    def read(self) -> bytes:
        """Return the encoded image, e.g. a PNG file's bytes.

        Raises:
            ImageError: the file is gone or changed, or no image stands at that place.
        """
        ...


ImageSource = Path | bytes | StoredImage
"""A file, the bytes of one, or one inside the benchmark's own file."""


def load_image(source: ImageSource) -> Path | bytes:
    """Return what :mod:`gmai_xtuner.core.imaging.images` reads: a path or an encoded image."""
    return source.read() if isinstance(source, StoredImage) else source


def open_image(source: ImageSource, name: str) -> Image.Image:
    """Open a question's image as training does.

    Args:
        source: the image.
        name: what errors call it where it has no file of its own.

    Raises:
        ImageError: as :func:`gmai_xtuner.core.imaging.images.open_rgb`.
    """
    from gmai_xtuner.core.imaging.images import decode_rgb, open_rgb

    content = load_image(source)
    return decode_rgb(content, name) if isinstance(content, bytes) else open_rgb(content)


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Args:
        id: unique in its benchmark; the authors' own where they give one.
        text: the question alone, without options or instruction; ``<image>`` marks where the authors name
            an image in the text, otherwise none.
        images: in the order of the marks in text and options, an image named twice standing twice; all of
            them before the text where there is no mark.
        options: texts of the choices, in the order of the letters; empty for a question without.
        answer: gold answer: the text of the right option, or the answer of a question without options;
            None where the authors keep it.
        groups: what tables are made over, by the benchmark's own names, e.g.
            ``{"question_type": "Disease Diagnosis", "modality": "CT"}``.
        answers: what counts as right as well, where the authors give several answers.
        letters: the options' letters where they are not A, B, C ..., e.g. ``"ABD"`` of a file that leaves
            out C.
        gold_letter: letter of the right option, needed only where it is an image: such options read the same.
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

    def digest(self) -> str:
        """Hash words, lettered options and gold answers: an id may stand for another question elsewhere.

        Images do not count.
        """
        content = [
            self.text,
            list(self.lettered().items()),
            self.answer,
            list(self.answers),
            self.gold_letter,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Score:
    """What one answer is worth.

    Args:
        value: from 0 to 1; None where there is no gold answer.
        parsed: what the scorer understood, e.g. the letter of an option; None if it understood nothing:
            then ``value`` is 0 (None without gold) and the answer counts as unparsed, it is never guessed.
    """

    value: float | None
    parsed: str | None


@dataclass(frozen=True, slots=True)
class Scorer:
    """A named, versioned rule.

    Args:
        name: as results name it.
        version: grows when any answer's score changes.
        description: one line for tables.
        rule: gives the score of an answer; its value is dropped where a question has no gold answer.
        applies: tells whether a question can be scored by it, e.g. only one with options.
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
