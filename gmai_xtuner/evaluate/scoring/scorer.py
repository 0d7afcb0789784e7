"""What a scorer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gmai_xtuner.evaluate.questions import Question, Score


@dataclass(frozen=True, slots=True)
class Scorer:
    """A named, versioned rule.

    Args:
        name: as results name it.
        version: grows when any answer's score changes.
        description: one line for tables.
        score: the rule.
        applies: whether a question can be scored by it, e.g. only one with options.
    """

    name: str
    version: int
    description: str
    score: Callable[[Question, str], Score]
    applies: Callable[[Question], bool]
