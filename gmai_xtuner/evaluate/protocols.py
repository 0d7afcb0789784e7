# SPDX-License-Identifier: Apache-2.0

"""Named, versioned ways to ask and score each benchmark.

A score is comparable only with scores of the same protocol: the same questions, the same words around them,
the same rules of scoring. Published numbers mix protocols; ``docs/benchmarks.md`` says whose is which. Each
benchmark's own are in its column map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gmai_xtuner.core.errors import EvaluationError, GMAIError
from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring import SCORERS
from gmai_xtuner.evaluate.scoring.free_text import is_closed
from gmai_xtuner.evaluate.scoring.mentions import polarity
from gmai_xtuner.evaluate.store import Job


class ProtocolError(GMAIError):
    """No such protocol or scorer, or one that does not fit the question."""


@dataclass(frozen=True, slots=True)
class Average:
    """One number of scores: the mean over questions (``micro``), or over the means of groups (``macro``)."""

    kind: Literal["micro", "macro"]
    over: str | None = None

    @property
    def name(self) -> str:
        return self.kind if self.over is None else f"{self.kind} over {self.over}"


MICRO = Average("micro")
MAX_NEW_TOKENS = 2048
"""Tokens of an answer at the most: enough for a model that thinks first. Others end long before."""
VERSION = 2
"""Of all protocols: grows when a question, a prompt or a score changes."""

Questions = Literal["all", "yes_no", "closed", "open", "options"]
"""Which questions count: all; those answered by yes or no; those that the authors call closed, or open; those
with options."""

Words = Literal["llava", "vlmevalkit", "short", "short_zh", "none"]
"""The words of a prompt: see :meth:`Protocol.prompt`."""

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."
SHORT_INSTRUCTION_ZH = "请用一个词或短语回答问题。"
VLMEVALKIT_INSTRUCTION = "Please select the correct answer from the options above. "


@dataclass(frozen=True)
class Protocol:
    """One way to ask and score one benchmark.

    ``name`` is unique in its benchmark, ``expected`` the number of questions in the authors' files (None:
    unknown). ``scorer`` gives the protocol's score; ``also`` are others for the same answers. The first of
    ``averages`` is the headline; ``table`` are the keys of ``Question.groups`` that tables are over.
    """

    name: str
    version: int
    benchmark: str
    variant: str
    description: str
    expected: int | None
    scorer: str
    also: tuple[str, ...] = ()
    averages: tuple[Average, ...] = (MICRO,)
    table: tuple[str, ...] = ()
    questions: Questions = "all"
    words: Words = "llava"

    def select(self, questions: Iterable[Question]) -> tuple[Question, ...]:
        """Return the questions that count, in their order."""
        return tuple(question for question in questions if self._counts(question))

    def prompt(self, question: Question) -> str:
        """Return what is asked: question, options, instruction; ``<image>`` where the authors name an image.

        ``llava`` (LLaVA-1.5, MMMU and HuatuoGPT-Vision): question, lines "A. ...", then
        :data:`LETTER_INSTRUCTION`; without options :data:`SHORT_INSTRUCTION`, in Chinese for ``short_zh``.
        ``vlmevalkit``: its default for multiple choice. ``none``: for questions that are whole requests.
        """
        options = "\n".join(f"{letter}. {text}" for letter, text in question.lettered().items())
        if self.words == "vlmevalkit" and options:
            return f"Question: {question.text}\nOptions:\n{options}\n{VLMEVALKIT_INSTRUCTION}"
        short = SHORT_INSTRUCTION_ZH if self.words == "short_zh" else SHORT_INSTRUCTION
        instruction = "" if self.words == "none" else LETTER_INSTRUCTION if options else short
        return "\n".join(filter(None, (question.text, options, instruction)))

    def score(self, question: Question, answer_text: str, *, scorer: str | None = None) -> Score:
        """Score one stored answer, by the protocol's scorer or by another of ``SCORERS``.

        A ``ProtocolError`` if there is no such scorer, or it is for other questions.
        """
        return self._rule(scorer or self.scorer, [question]).score(question, answer_text)

    def check_scorer(self, scorer: str, questions: Iterable[Question]) -> None:
        """Check, before questions are asked, that their answers can be scored so; raises as :meth:`score`."""
        self._rule(scorer, questions)

    def _rule(self, name: str, questions: Iterable[Question]) -> Scorer:
        if name not in SCORERS:
            raise ProtocolError(f"no scorer is called {name!r}. There are {', '.join(SCORERS)}.")
        rule = SCORERS[name]
        for question in questions:
            if not rule.applies(question):
                others = [one for one in (self.scorer, *self.also) if one != name]
                take = f" Take one of {', '.join(others)}." if others else ""
                raise ProtocolError(
                    f"the scorer {name} can't score question {question.id} of {self.benchmark} {self.name}: "
                    f"it is for other questions ({rule.description}), or a group that it needs is "
                    f"missing.{take}"
                )
        return rule

    def _counts(self, question: Question) -> bool:
        match self.questions:
            case "yes_no":
                return polarity(question.answer or "") is not None
            case "closed" | "open":
                return is_closed(question) == (self.questions == "closed")
            case "options":
                return bool(question.options)
        return True


@dataclass(frozen=True)
class Asked:
    """What a protocol asks: the questions that count, in their order, cut by ``--limit``.

    ``selected`` is how many there would be without a limit; ``control`` the name of the control that they
    belong to.
    """

    protocol: Protocol
    questions: tuple[Question, ...]
    selected: int
    max_new_tokens: int = MAX_NEW_TOKENS
    control: str = ""

    @property
    def name(self) -> str:
        return f"{self.protocol.name}/{self.protocol.version} {self.control}".rstrip()

    def jobs(self) -> Iterator[tuple[Question, Job]]:
        """Yield each question with what is asked of a model."""
        for one in self.questions:
            prompt, labels = self.protocol.prompt(one), labels_of(one)
            yield one, Job(one.id, prompt, one.images, self.max_new_tokens, self.name, labels)


def labels_of(question: Question) -> tuple[str, ...]:
    """Return how an answer begins that says no more: by a letter of the options, or by yes or no."""
    if question.options:
        return tuple(question.lettered())
    return ("Yes", "yes", "No", "no", "是", "否") if polarity(question.answer or "") else ()


def ask_for(
    protocol: Protocol,
    questions: Sequence[Question],
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Asked:
    """Return what a protocol asks of a benchmark; an ``EvaluationError`` where that is nothing."""
    selected = protocol.select(questions)
    if not selected:
        raise EvaluationError(
            f"{protocol.benchmark} ({protocol.variant}) has no question for the protocol {protocol.name!r}: "
            f"{len(questions)} were read"
        )
    return Asked(protocol, selected[:limit], len(selected), max_new_tokens)
