"""The rules of LLaVA-Med's evaluation of VQA-RAD, SLAKE and PathVQA, for comparison with scores made by it.

Written anew from what ``run_eval.py`` and ``eval_metrics`` do:
https://github.com/microsoft/LLaVA-Med/blob/b9a98a736d2ef05bcf5ff345be6403fb3a664eaf/llava/eval/run_eval.py

Closed: right if the answer has "yes" or "no" anywhere, even within a word ("normal"), and has the gold
answer as a substring; a closed question with another gold answer ("Lung") is right only if the answer has
"yes" or "no" as well. Open: recall in which a repeated word counts each time, so that "lung lung lung"
has 3/4 of "left lung"; our ``token_recall`` counts it once.
"""

from __future__ import annotations

import re
from collections import Counter

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring.closed import is_closed
from gmai_xtuner.evaluate.scoring.scorer import Scorer

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't
shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd
something'll that's there'd there're there's they'd they'll they're they've wasn't we've weren't
what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll
why're why's won't would've wouldn't you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_PERIODS_AT_ONCE = re.UNICODE.value  # they pass the flag as the count of `sub`


def normalise(text: str) -> str:
    """Their ``normalize_word``, but for contractions of three words."""
    stripped = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text or _COMMA_IN_NUMBER.search(text)
        stripped = stripped.replace(sign, "" if beside_space else " ")
    stripped = _PERIOD.sub("", stripped, count=_PERIODS_AT_ONCE)
    kept = (_NUMBERS.get(word, word) for word in stripped.lower().split())
    kept = (_CONTRACTIONS.get(word, word) for word in kept if word not in ("a", "an", "the"))
    return " ".join(kept).replace(",", "")


def open_recall(answer: str, gold: str) -> float:
    """Their ``recall``: occurrences of gold words in the answer, over these and the gold words it lacks."""
    said = Counter(normalise(normalise(answer.lower())).split())
    expected = Counter(normalise(normalise(gold.lower())).split())
    hit = sum(said[word] for word in said if word in expected)
    missed = sum(count for word, count in expected.items() if word not in said)
    return hit / (hit + missed) if said and expected and hit else 0.0


def _score(question: Question, answer: str) -> Score:
    said = normalise(answer.lower())
    parsed = said or None
    if question.answer is None:
        return Score(None, parsed)
    if not is_closed(question):
        return Score(open_recall(answer, question.answer), parsed)
    gold = normalise(question.answer.lower())
    answers = "yes" in said or "no" in said
    return Score(float(answers and gold in said), said if answers else None)


LLAVA_MED = Scorer(
    "llava_med",
    1,
    "the rules of LLaVA-Med: substring for closed questions, recall with repetitions for open ones",
    _score,
    lambda question: not question.options,
)
