# SPDX-License-Identifier: Apache-2.0

"""A model that judges free answers: optional, asked once for each answer, and named in the result.

The rules come first. Only answers that they don't understand, and answers to open questions that they don't
count as fully right, go to the judge; what it says replaces their score in a result of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gmai_xtuner.evaluate.answerers import Answerer
from gmai_xtuner.evaluate.questions import Score
from gmai_xtuner.evaluate.results import Scored
from gmai_xtuner.evaluate.scoring.free_text import is_closed
from gmai_xtuner.evaluate.scoring.text import clean
from gmai_xtuner.evaluate.store import Answer, AnswerKey, Job

PROMPT_VERSION = 3
_LONGEST = 2048
"""Tokens of a verdict at the most: a judge may think before it."""
_VERDICT = re.compile(r"\b(CORRECT|WRONG)\b", re.IGNORECASE)
_PROMPT = """You grade an answer to a question about a medical image. You don't see the image; the reference \
answer is right.

Question: {question}
{options}Reference answer: {gold}
Answer to grade: {answer}

Does the answer to grade mean the same as the reference answer? An answer that says more is correct if \
nothing in it contradicts the reference. Reply with one word, CORRECT or WRONG."""


def judge_name(judge: Answerer) -> str:
    """Return how results name a judge: its model and the version of the prompt."""
    return f"judge:{judge.name}/{PROMPT_VERSION}"


def judge_jobs(scored: Sequence[Scored], benchmark: str) -> dict[int, Job]:
    """Return what a judge is asked about a benchmark of these names: place among the scored -> job."""
    protocol = f"judge/{PROMPT_VERSION}"
    return {
        place: Job(one.question.id, _prompt(one), (), _LONGEST, protocol, benchmark=benchmark)
        for place, one in enumerate(scored)
        if is_open(one)
    }


def apply_verdicts(
    scored: Sequence[Scored], jobs: Mapping[int, Job], replies: Mapping[AnswerKey, Answer]
) -> tuple[list[Scored], int]:
    """Replace the scores that the judge was asked about; count replies that are no verdict, change none."""
    result, unclear = list(scored), 0
    for place, job in jobs.items():
        reply = replies[job.key]
        verdict = None if reply.problem else verdict_of(reply.answer)
        if verdict is None:
            unclear += 1
        else:
            score = Score(float(verdict == "CORRECT"), verdict.lower())
            result[place] = replace(scored[place], score=score)
    return result, unclear


def is_open(one: Scored) -> bool:
    """Tell whether the rules leave a question to the judge."""
    question, score = one.question, one.score
    if question.answer is None or score.value is None or not one.answer.answer.strip():
        return False
    is_free = not question.options and not is_closed(question)
    return score.parsed is None or (is_free and score.value < 1)


def verdict_of(reply: str) -> str | None:
    """Return ``CORRECT`` or ``WRONG``; None for a reply with neither or both."""
    said = {word.upper() for word in _VERDICT.findall(clean(reply))}
    return said.pop() if len(said) == 1 else None


def _prompt(one: Scored) -> str:
    question = one.question
    texts = (question.text, str(question.answer), one.answer.answer)
    text, gold, answer = (text.replace("<image>", "[image]") for text in texts)
    options = "".join(f"{letter}. {text}\n" for letter, text in question.lettered().items())
    return _PROMPT.format(question=text, options=options, gold=gold, answer=answer)
