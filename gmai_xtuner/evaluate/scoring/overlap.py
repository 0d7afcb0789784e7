"""Open questions: the same words, or how many of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring.scorer import Scorer
from gmai_xtuner.evaluate.scoring.text import clean, normalised

_DECLARED = re.compile(
    r"(?:\banswer(?:\s+(?:is|would\s+be)|\s*:)|答案(?:是|为|[:：])+)\s*:?\s*(.+?)\s*(?:$|\n)",
    re.IGNORECASE,
)


def golds(question: Question) -> tuple[tuple[str, ...], ...]:
    """Words of every gold answer."""
    if question.answer is None:
        return ()
    return tuple(normalised(text) for text in (question.answer, *question.answers))


def same_words(question: Question, answer: str) -> bool:
    """Whether an answer, or what it declares ("the answer is X"), is a gold answer, word by word."""
    text = clean(answer)
    said = [text, *(match[1].rstrip(".。") for match in _DECLARED.finditer(text))]
    return any(normalised(one) == gold for one in said for gold in golds(question) if gold)


def recall(said: tuple[str, ...], gold: tuple[str, ...]) -> float:
    """Share of the gold words that were said; a repeated word counts as often as gold has it."""
    common = (Counter(said) & Counter(gold)).total()
    return common / len(gold) if gold else 0.0


def f1(said: tuple[str, ...], gold: tuple[str, ...]) -> float:
    """Harmonic mean of recall and precision."""
    common = (Counter(said) & Counter(gold)).total()
    return 2 * common / (len(said) + len(gold)) if said and gold else 0.0


def _by(
    measure: Callable[[tuple[str, ...], tuple[str, ...]], float],
) -> Callable[[Question, str], Score]:
    def score(question: Question, answer: str) -> Score:
        said = normalised(clean(answer))
        parsed = " ".join(said) or None
        if question.answer is None:
            return Score(None, parsed)
        return Score(max(measure(said, gold) for gold in golds(question)), parsed)

    return score


def _exact(question: Question, answer: str) -> Score:
    parsed = " ".join(normalised(clean(answer))) or None
    if question.answer is None:
        return Score(None, parsed)
    return Score(float(same_words(question, answer)), parsed)


def _any(_: Question) -> bool:
    return True


EXACT_MATCH = Scorer(
    "exact_match",
    1,
    "the gold answer's words in their order, without articles, case and punctuation",
    _exact,
    _any,
)
TOKEN_RECALL = Scorer(
    "token_recall", 1, "share of the gold answer's words that were said", _by(recall), _any
)
TOKEN_F1 = Scorer("token_f1", 1, "F1 over the words of answer and gold answer", _by(f1), _any)
