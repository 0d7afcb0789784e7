# SPDX-License-Identifier: Apache-2.0

"""Stored answers -> scores -> the numbers of a result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.evaluate.protocols import Asked, Average
from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS
from gmai_xtuner.evaluate.statistics import Interval, interval_of
from gmai_xtuner.evaluate.store import Answer, AnswerKey, Given, Identity

SCORES_FILE = "scores.jsonl"
RESULT_FILE = "result.json"
MODELS_DOING = ("cut", "empty", "declined", "refused_by_server")
"""Reasons by which a question has no answer since the model gave none."""
_FINDINGS = {
    "answer_not_an_option": "gold answers are none of the options, so every answer to them is wrong",
    "duplicate_id": "questions have the id of an earlier one",
    "answer_disagrees": "gold answers disagree with the gold letter, which counts",
    "no_verdict": "replies of the judge are no verdict: there the score of the rules stands",
}


@dataclass(frozen=True, slots=True)
class Scored:
    """A question with its answer and what it is worth."""

    question: Question
    answer: Answer
    score: Score


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of a table: the mean score of ``n`` questions, 0 to 1; None where none has a gold answer.

    ``unparsed`` is the share of answers that the scorer did not understand; each counts as wrong.
    """

    n: int
    value: float | None
    unparsed: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of the controls or of the calibration, over ``n`` questions or pairs of answers.

    ``value`` is from 0 to 1, or a difference of two such; ``p_value`` two-sided, of a difference of paired
    scores.
    """

    name: str
    n: int
    value: float
    interval: Interval | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Result:
    """One model, one benchmark, one protocol, one scorer (with a judge its model and its prompt's version).

    ``model_name`` and ``model`` (a hash) have answered. ``n`` questions were scored, ``selected`` are the
    protocol's in the files, ``expected`` in the authors' (None: unknown); ``limited`` by ``--limit``.
    ``left_out``, ``unanswered`` and ``controls_unanswered`` count questions by reason, see
    :data:`MODELS_DOING`; ``findings`` what is odd about others. ``averages``: ``micro`` or ``macro over
    <group>`` -> number, the headline first; ``groups``: key -> value -> number, as the file has them.
    ``source``: sha256 of each annotation file. ``unread`` are examples of answers that are none or not
    understood; ``controls`` and ``flags`` what ``--controls`` found. ``scorer_version`` is the scorer's; 0:
    written by an earlier version of this package.
    """

    benchmark: str
    variant: str
    protocol: str
    version: int
    description: str
    scorer: str
    model_name: str
    model: str
    generation: Mapping[str, Any]
    n: int
    selected: int
    expected: int | None
    limited: bool
    left_out: Mapping[str, int]
    unanswered: Mapping[str, int]
    averages: Mapping[str, Cell]
    groups: Mapping[str, Mapping[str, Cell]] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    controls: tuple[Measure, ...] = ()
    flags: tuple[str, ...] = ()
    controls_unanswered: Mapping[str, int] = field(default_factory=dict)
    scorer_version: int = 0

    @property
    def unread_share(self) -> float:
        """Return the share of answers that were cut, empty, refused or not understood."""
        none = sum(self.unanswered.get(reason, 0) for reason in MODELS_DOING)
        return (round(self.headline.unparsed * self.n) + none) / max(1, self.n + none)

    @property
    def headline(self) -> Cell:
        return next(iter(self.averages.values()))

    @property
    def problems(self) -> list[str]:
        """Say why the number is not the protocol's, one sentence each; nothing for a whole run."""
        more = " (raise --max-new-tokens)" if "cut" in self.unanswered else ""
        counted = (
            (self.left_out, "left out when the files of the variant "
             f"{self.variant} were read, whatever protocol they belong to"),
            (self.unanswered, f"without an answer, not in the score{more}"),
            (self.controls_unanswered, "of the controls without an answer"),
        )  # fmt: skip
        problems = [f"flag: {flag}" for flag in self.flags]
        if self.limited:
            problems.append(f"limited to {self.n} of {self.selected} questions")
        for reasons, told in counted:
            if reasons:
                listed = ", ".join(f"{name} {count}" for name, count in reasons.items())
                problems.append(f"{sum(reasons.values())} questions ({listed}) {told}")
        problems += [f"{n} {_FINDINGS.get(name, name)}" for name, n in self.findings.items()]
        if self.expected not in (None, self.selected):
            told = f"the files have {self.selected} questions of this protocol"
            problems.append(f"{told}, the authors' have {self.expected}")
        return problems

    @property
    def complete(self) -> bool:
        """Tell whether every question that was to be asked was asked, and the model had its say."""
        lacking = {*self.unanswered, *self.controls_unanswered} - {"cut", "empty", "declined"}
        return not (self.left_out or lacking)


def score_all(
    asked: Asked, answers: Mapping[AnswerKey, Answer]
) -> tuple[list[Scored], list[tuple[Question, Answer | None]]]:
    """Score what has an answer to exactly the protocol's prompt, in the questions' order.

    Also returns the questions without an answer, with what came instead, if anything.
    """
    scored: list[Scored] = []
    missing: list[tuple[Question, Answer | None]] = []
    for question, job in asked.jobs():
        answer = answers.get(job.key)
        if answer is None or answer.problem:
            missing.append((question, answer))
        else:
            scored.append(Scored(question, answer, asked.protocol.score(question, answer.answer)))
    return scored, missing


def reason_of(question: Question, answer: Answer | None, failed: Mapping[str, Given]) -> str:
    """Say why a question has no answer: what went wrong now, what came instead, or that it wasn't asked."""
    came = failed.get(question.id, answer)
    return came.problem if came is not None else "not_asked"


def summarise(
    asked: Asked, scored: Sequence[Scored], identity: Identity, *, scorer: str, **more: Any
) -> Result:
    """Return the numbers of scored questions; ``more`` are further fields of :class:`Result`."""
    protocol = asked.protocol
    return Result(
        benchmark=protocol.benchmark,
        variant=protocol.variant,
        protocol=protocol.name,
        version=protocol.version,
        description=protocol.description,
        scorer=scorer,
        scorer_version=SCORERS[scorer.partition("+")[0]].version,
        model_name=identity.model_name,
        model=identity.model,
        generation={**identity.generation, "max_new_tokens": asked.max_new_tokens},
        n=len(scored),
        selected=asked.selected,
        expected=protocol.expected,
        limited=len(asked.questions) < asked.selected,
        averages={average.name: average_of(scored, average) for average in protocol.averages},
        groups={
            key: {name: cell_of([part]) for name, part in grouped(scored, key).items()}
            for key in protocol.table
        },
        source=dict(identity.source),
        **more,
    )


def average_of(scored: Sequence[Scored], average: Average) -> Cell:
    """Return a micro or macro average of scored questions."""
    return cell_of([scored] if average.over is None else [*grouped(scored, average.over).values()])


def grouped(scored: Iterable[Scored], key: str) -> dict[str, list[Scored]]:
    """Return value of a group -> its questions, both as they come; questions without it are left out."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        if (name := one.question.groups.get(key)) is not None:
            groups.setdefault(name, []).append(one)
    return groups


def cell_of(groups: Sequence[Sequence[Scored]]) -> Cell:
    """Return the mean over the means of groups; of one group, its mean."""
    scores = ([one.score.value for one in group if one.score.value is not None] for group in groups)
    values = [part for part in scores if part]
    everyone = [one for group in groups for one in group]
    unparsed = sum(one.score.parsed is None for one in everyone)
    return Cell(
        n=len(everyone),
        value=sum(sum(part) / len(part) for part in values) / len(values) if values else None,
        unparsed=unparsed / len(everyone) if everyone else 0.0,
        interval=interval_of(values) if values else None,
    )


def write_result(folder: Path, result: Result, scored: Sequence[Scored]) -> None:
    """Write ``result.json`` and ``scores.jsonl``, which :mod:`gmai_xtuner.evaluate.compare` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_score_line(one), ensure_ascii=False) for one in scored)
    replace_text(folder / SCORES_FILE, "".join(f"{line}\n" for line in lines))
    text = json.dumps(as_json(result), indent=1, ensure_ascii=False)
    replace_text(folder / RESULT_FILE, f"{text}\n")


def _score_line(one: Scored) -> dict[str, Any]:
    question = one.question
    return {
        "id": question.id,
        "question": question.digest(),
        "text": question.text,
        "options": question.lettered(),
        "value": one.score.value,
        "parsed": one.score.parsed,
        "answer": one.answer.answer,
        "ended": one.answer.ended,
        "gold": question.answer,
        "target": question.target,
        "groups": dict(question.groups),
    }


def as_json(result: Result) -> dict[str, Any]:
    """Return a result as it is written and printed."""
    return {**msgspec.to_builtins(result), "problems": result.problems, "complete": result.complete}


def read_result(folder: Path) -> Result:
    """Read a result that :func:`write_result` wrote; an ``EvaluationError`` where it can't be read."""
    with _readable(folder):
        return msgspec.json.decode((folder / RESULT_FILE).read_bytes(), type=Result)


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the scores by question that :func:`write_result` wrote; raises as :func:`read_result`."""
    with _readable(folder):
        lines = msgspec.json.Decoder().decode_lines((folder / SCORES_FILE).read_bytes())
        found = {line["id"]: line for line in lines}
        is_old = not all({"question", "target"} <= line.keys() for line in found.values())
    if is_old:
        raise EvaluationError(
            f"{folder / SCORES_FILE} is of an earlier version. Score its answers again (--score-only)"
        )
    return found


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
        raise EvaluationError(f"the result in {folder} can't be read: {error}") from error
