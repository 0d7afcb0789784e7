"""Named, versioned ways to ask and score each benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gmai_xtuner.evaluation.questions import Question, Score


@dataclass(frozen=True, slots=True)
class Average:
    """How scores become one number.

    Args:
        kind: ``micro`` is the mean over questions, ``macro`` the mean over the means of groups.
        over: the key of ``Question.groups`` that a macro average is over; None for micro.
    """

    kind: Literal["micro", "macro"]
    over: str | None = None


@dataclass(frozen=True)
class Protocol:
    """One way to ask and score one benchmark.

    Args:
        name: e.g. ``"closed-251"``, unique in its benchmark.
        version: grows when a question, a prompt or a score changes.
        benchmark: name of the benchmark.
        variant: the variant of the benchmark that it is for.
        description: whose protocol it is and what it counts.
        expected: number of questions that the authors' files give; None where unknown.
        scorer: name of the scorer whose score is the protocol's.
        also: names of further scorers that the same stored answers can be scored by.
        averages: the first is the headline.
        table: keys of ``Question.groups`` that the tables are over.
        max_new_tokens: the longest answer, in tokens.
    """

    name: str
    version: int
    benchmark: str
    variant: str
    description: str
    expected: int | None
    scorer: str
    also: tuple[str, ...]
    averages: tuple[Average, ...]
    table: tuple[str, ...]
    max_new_tokens: int

    def select(self, questions: Iterable[Question]) -> tuple[Question, ...]:
        """The questions that count, in their order."""
        raise NotImplementedError

    def prompt(self, question: Question) -> str:
        """What is asked: question, options and instruction; ``<image>`` where the authors name an image."""
        raise NotImplementedError

    def score(self, question: Question, answer_text: str, *, scorer: str | None = None) -> Score:
        """Score one stored answer, by the protocol's scorer or by another of :data:`SCORERS`."""
        raise NotImplementedError


PROTOCOLS: Mapping[str, tuple[Protocol, ...]] = {}
"""Protocols by benchmark; the first of each variant is its default."""


def protocol(benchmark: str, name: str | None = None, *, variant: str | None = None) -> Protocol:
    """Look a protocol up.

    Args:
        benchmark: one of :data:`gmai_xtuner.evaluation.benchmarks.NAMES`.
        name: as in :data:`PROTOCOLS`; None takes the default of the variant.
        variant: None takes the benchmark's first.

    Raises:
        ProtocolError: no such protocol; the message lists those there are.
    """
    raise NotImplementedError
