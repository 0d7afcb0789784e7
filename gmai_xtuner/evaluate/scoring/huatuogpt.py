"""The rule of HuatuoGPT-Vision's scorer, for comparison with scores made by it.

Written anew from what ``match_choice3`` and ``test_mmlu`` do:
https://github.com/FreedomIntelligence/HuatuoGPT-Vision/blob/f699d88d4d1eeb9f3e62fdb2da4e297bdacb67f0/scorer.py

The first letter from A to N, of either case, that stands alone is the answer, but for an "a" before a
space (taken for an article). It is compared with the upper-case gold letter, so a lower-case letter is
wrong, and so is the "I" of "I think it is B". An answer without such a letter makes their scorer raise
and abort the run; here it is not understood.
"""

from __future__ import annotations

import re

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring.choice import has_options
from gmai_xtuner.evaluate.scoring.scorer import Scorer

_FIRST_LETTER = re.compile(r"(?:is |[是为]|\W|^)(?![aA] )([a-nA-N])(?:\W|$)")


def first_letter(answer: str) -> str | None:
    """The letter that their scorer takes, in its case; None where it raises."""
    match = _FIRST_LETTER.search(answer)
    return match[1] if match else None


def _score(question: Question, answer: str) -> Score:
    letter = first_letter(answer)
    if question.answer is None:
        return Score(None, letter)
    # `options.index(answer)`: of options that read the same, the first
    return Score(
        float(letter is not None and letter == min(question.gold_letters(), default="")), letter
    )


HUATUOGPT = Scorer(
    "huatuogpt",
    1,
    "the rule of HuatuoGPT-Vision's scorer: the first letter that stands alone",
    _score,
    has_options,
)
