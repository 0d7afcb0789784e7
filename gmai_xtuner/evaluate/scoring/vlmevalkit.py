"""The rules of VLMEvalKit's ``can_infer``, for comparison with scores made by it without a judge.

Written anew from what the function does:
https://github.com/open-compass/VLMEvalKit/blob/e8e78f05f3080fe28154f2130321f17951c3be94/vlmeval/utils/matching_util.py

Where it differs from a reader's view, and from our ``choice``: a lower-case letter is none; a letter
counts only among the last four words; an option text counts as a substring, so "12" names 2 and "MR
angiography" names both MR and MR angiography; a letter of the options as a word anywhere ("A large mass")
is a choice if it is the only one; refusals are "Z", which is no option and wrong. What it does not
understand goes to a judge there and, after three failures, to a random choice; here it is not understood.
"""

from __future__ import annotations

import re

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring.choice import has_options
from gmai_xtuner.evaluate.scoring.scorer import Scorer

REFUSED = "Z"

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILED = "Failed to obtain answer via API"
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_FROM_THE_END = 5


def infer(answer: str, options: dict[str, str]) -> str | None:
    """What ``can_infer`` returns: a letter, ``Z`` for a refusal, None where it says False."""
    return _letter(answer, options) or _text(answer, options)


def _letter(answer: str, options: dict[str, str]) -> str | None:
    if _API_FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_PUNCTUATION).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1:
        if words.index(present[0]) > len(words) - _FROM_THE_END:
            return present[0]
    elif not present and REFUSED in words:
        return REFUSED
    match = _ANSWER_IS.search(answer)
    if match and match[1].upper() in options:
        return match[1].upper()
    return None


def _text(answer: str, options: dict[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(option) for option in options.values()):
        return None
    present = [letter for letter, option in options.items() if option.lower() in answer]
    return present[0] if len(present) == 1 else None


def _score(question: Question, answer: str) -> Score:
    letter = infer(answer, question.lettered())
    if question.answer is None:
        return Score(None, letter)
    gold = question.gold_letters()
    # they compare with the one letter of the file; the first of options that read the same
    return Score(float(letter is not None and letter == min(gold, default="")), letter)


VLMEVALKIT = Scorer(
    "vlmevalkit",
    1,
    "the rules of VLMEvalKit's can_infer, without judge and random choice",
    _score,
    has_options,
)
