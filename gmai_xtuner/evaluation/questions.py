"""What every benchmark becomes, and what every scorer gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ImageSource = Path | bytes
"""A file, or the bytes of one that stands inside the benchmark's own file."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Args:
        id: unique in its benchmark; the authors' own where they give one.
        text: the question alone, without options or instruction; ``<image>`` marks where the authors name
            an image in the text, otherwise none.
        images: in the order of the marks.
        options: texts of the choices, in the order of the letters; empty for a question without.
        answer: gold answer: the text of the right option, or the answer of a question without options;
            None where the authors keep it.
        groups: what tables are made over, by the benchmark's own names, e.g.
            ``{"question_type": "Disease Diagnosis", "modality": "CT"}``.
    """

    id: str
    text: str
    images: tuple[ImageSource, ...] = ()
    options: tuple[str, ...] = ()
    answer: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """What one answer is worth.

    Args:
        value: from 0 to 1; None where there is no gold answer.
        parsed: what the scorer understood, e.g. the letter of an option; None if it understood nothing:
            then ``value`` is 0 and the answer counts as unparsed, it is never guessed.
    """

    value: float | None
    parsed: str | None
