"""The rules of MMMU's own evaluation, for comparison with scores made by it.

Written anew from what ``parse_multi_choice_response``, ``parse_open_response`` and ``eval_open`` do:
https://github.com/MMMU-Benchmark/MMMU/blob/bb0b95a945998d91dfef37e969e07d49d1139438/mmmu/utils/eval_utils.py

Multiple choice: "(B)" anywhere, else " B " between spaces, else, in an answer of more than five words, an
option text as a substring; of several the last in the text. Open: a gold text within the part of the
answer behind "is", "so", "answer" and the like, or an equal number. What is not understood becomes a
random option there; here it is not understood.
"""

from __future__ import annotations

import re

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring.scorer import Scorer

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_choice(answer: str, options: dict[str, str]) -> str | None:
    """The letter that their parser takes; None where it takes a random one."""
    text = answer
    for sign in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(sign)
    text = f" {text} "
    lowered = text.lower()
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in options}
        if any(place >= 0 for place in places.values()):
            return max(places, key=lambda letter: places[letter])
    if len(text.split()) > 5:
        places = {letter: lowered.rfind(option.lower()) for letter, option in options.items()}
        if any(place >= 0 for place in places.values()):
            return max(places, key=lambda letter: places[letter])
    return None


def parse_open(answer: str) -> set[str | float]:
    """Texts and numbers that their parser finds in an answer to an open question."""
    # the answer is in lower case by then, so their split before a capital never happens
    parts = answer.strip().strip(".").lower().split("\n")
    found: list[str] = []
    keys = list(_KEYS)
    for number, part in enumerate(parts):
        if number == len(parts) - 1:
            keys.append("=")
        behind = [part.split(key)[-1].strip() for key in keys if key in part]
        shortest = min(behind, key=len, default="")
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    found = found or [answer.strip().strip(".").lower()]
    numbers = [number for text in found for form in _NUMBERS for number in form.findall(text)]
    return {one for text in (*found, *numbers) for one in normalise(text)}


def normalise(text: str) -> tuple[str | float, ...]:
    """A number rounded to two decimals, or the text in lower case; one sign alone twice, beside a space."""
    text = text.strip()
    try:
        return (round(float(text.replace(",", "")), 2),)
    except ValueError:
        pass
    text = text.lower()
    return (f" {text}", f"{text} ") if len(text) == 1 else (text,)


def _score(question: Question, answer: str) -> Score:
    if question.options:
        letter = parse_choice(answer, question.lettered())
        if question.answer is None:
            return Score(None, letter)
        return Score(
            float(letter is not None and letter == min(question.gold_letters(), default="")), letter
        )
    said = parse_open(answer)
    parsed = " | ".join(sorted(str(one) for one in said)) or None
    if question.answer is None:
        return Score(None, parsed)
    golds = [one for text in (question.answer, *question.answers) for one in normalise(text)]
    right = any(
        any(isinstance(gold, str) and gold in one for gold in golds)
        if isinstance(one, str)
        else one in golds
        for one in said
    )
    return Score(float(right), parsed)


MMMU = Scorer(
    "mmmu",
    1,
    "the rules of MMMU's own evaluation, without its random choice",
    _score,
    lambda _: True,
)
