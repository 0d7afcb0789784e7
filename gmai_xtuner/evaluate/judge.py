"""A model that judges free answers: optional, asked once for each answer, and named in the result.

The rules come first. Only answers that they don't understand, and open answers that they don't count as fully
right, go to the judge; what it says replaces their score in a result of its own, never in theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.answerers import Answerer, Job
from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.results import Scored
from gmai_xtuner.evaluate.store import Answer, AnswerStore, Identity, key_of

PROMPT_VERSION = 2
_LONGEST = 16
_VERDICT = re.compile(r"\b(CORRECT|WRONG)\b", re.IGNORECASE)
_PROMPT = """You grade an answer to a question about a medical image. You don't see the image; the reference \
answer is right.

Question: {question}
{options}Reference answer: {gold}
Answer to grade: {answer}

Does the answer to grade mean the same as the reference answer? An answer that says more is correct if \
nothing in it contradicts the reference. Reply with one word, CORRECT or WRONG."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores with the judge's in them.

    Args:
        scored: in the order that came in.
        asked: answers that were judged, now or in an earlier run.
        unclear: of these, replies that are neither verdict; they count as wrong and unparsed.
    """

    scored: list[Scored]
    asked: int
    unclear: int


def judge_name(judge: Answerer) -> str:
    """How results name a judge: its model and the version of the prompt."""
    return f"judge:{judge.name}/{PROMPT_VERSION}"


def judge_answers(scored: Sequence[Scored], judge: Answerer, *, cache: Path) -> Judged:
    """Let a model judge what the rules leave open.

    Args:
        scored: by rules.
        judge: who is asked; replies are kept.
        cache: folder of the replies; a reply to the same words is not asked for again.

    Raises:
        EvaluationError: the judge can't be asked, or has refused some of the answers.
    """
    jobs = {
        number: Job(one.question.id, _prompt(one), (), _LONGEST, f"judge/{PROMPT_VERSION}")
        for number, one in enumerate(scored)
        if is_open(one)
    }
    replies = _replies(list(jobs.values()), judge, cache)
    result, unclear = list(scored), 0
    for number, job in jobs.items():
        reply = replies[key_of(job.id, job.prompt, job.max_new_tokens)].answer
        verdict = verdict_of(reply)
        unclear += verdict is None
        score = Score(1.0 if verdict == "CORRECT" else 0.0, verdict and verdict.lower())
        result[number] = replace(scored[number], score=score)
    return Judged(result, len(jobs), unclear)


def is_open(one: Scored) -> bool:
    """Whether the rules leave a question to the judge."""
    question, score = one.question, one.score
    if question.answer is None or score.value is None or not one.answer.answer.strip():
        return False
    return score.parsed is None or (not question.options and score.value < 1)


def verdict_of(reply: str) -> str | None:
    """``CORRECT`` or ``WRONG``; None for a reply with neither or both."""
    said = {word.upper() for word in _VERDICT.findall(reply)}
    return said.pop() if len(said) == 1 else None


def _prompt(one: Scored) -> str:
    question: Question = one.question
    options = "".join(f"{letter}. {text}\n" for letter, text in question.lettered().items())
    return _PROMPT.format(
        question=question.text.replace("<image>", "[image]"),
        options=options,
        gold=str(question.answer).replace("<image>", "[image]"),
        answer=one.answer.answer.replace("<image>", "[image]"),
    )


def _replies(jobs: Sequence[Job], judge: Answerer, cache: Path) -> Mapping[tuple[str, str], Answer]:
    identity = Identity("judge", f"prompt {PROMPT_VERSION}", judge.model, judge.name, {})
    store = AnswerStore(cache, identity)
    failed: list[Any] = []
    with store.locked():
        store.create()
        known = store.read()
        new = [job for job in jobs if key_of(job.id, job.prompt, job.max_new_tokens) not in known]
        with store.writer() as writer:
            for given in judge.answers(new):
                failed += [one for one in given if one.text is None]
                writer.add(
                    [
                        Answer(
                            one.job.id,
                            one.job.prompt,
                            one.text,
                            one.seconds,
                            judge.model,
                            one.job.protocol,
                            {**judge.generation, "max_new_tokens": one.job.max_new_tokens},
                        )
                        for one in given
                        if one.text is not None
                    ]
                )
    if failed:
        raise EvaluationError(
            f"the judge {judge.name} gave no verdict on {len(failed)} of {len(jobs)} answers, the first on "
            f"question {failed[0].job.id}: {failed[0].detail}. Verdicts are kept: the same command goes on"
        )
    return store.read()
