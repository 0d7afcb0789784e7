"""Questions without options: closed ones by what they offer, open ones by the words in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.choice import unnegated
from gmai_xtuner.evaluate.scoring.text import (
    Mentions,
    clean,
    normalised,
    polarity,
    words,
    yes_or_no,
)

Words = tuple[str, ...]

_QUESTION_WORD = re.compile(r"^(?:which|what|where|who|how)\b", re.IGNORECASE)
_SMALL = frozenset(
    {"a", "an", "the", "this", "that", "is", "are", "in", "of", "it", "its", "on", "to", "image"}
)
_DECLARED = re.compile(
    r"(?:\banswer(?:\s+(?:is|would\s+be)|\s*:)|答案(?:是|为|[:：])+)\s*:?\s*(.+?)\s*(?:$|\n)",
    re.IGNORECASE,
)


def is_closed(question: Question) -> bool:
    """Follow the authors' own division; without one, a gold answer of yes or no makes a question closed."""
    kind = question.groups.get("answer_type", "").upper()
    if kind:
        return kind == "CLOSED"
    return question.answer is not None and polarity(question.answer) is not None


def alternatives(question: str) -> list[Words]:
    """Return what a question offers: "Which is bigger, kidney or liver?" -> kidney, liver.

    The list is empty without an "or".
    """
    sentence = question.strip().rstrip("?？ ")
    head, found, last = sentence.rpartition(" or ")
    if not found:
        return []
    parts = [part for part in re.split(r"\s*,\s*", head) if part.strip()]
    final = _content(last)
    listed = [_content(part) for part in parts]
    # a first part that asks ("which organ is abnormal") offers nothing; another ends in an alternative
    if len(listed) > 1 and _QUESTION_WORD.match(parts[0]):
        listed = listed[1:]
    elif listed:
        listed[0] = listed[0][-max(len(final), 1) :]
    return [offer for offer in (*listed, final) if offer]


def _content(text: str) -> Words:
    return tuple(word for word in normalised(text) if word not in _SMALL)


def _yes_no(question: Question, answer: str) -> Score:
    said = yes_or_no(answer)
    return Score(float(said is not None and said == polarity(question.answer or "")), said)


def _closed(question: Question, answer: str) -> Score:
    """Score yes or no where that is the gold answer; otherwise the offer of the question that is named."""
    text = clean(answer)
    said = normalised(text)
    parsed = " ".join(said) or None
    if question.answer is None:
        return Score(None, parsed)
    if polarity(question.answer) is not None:
        return _yes_no(question, answer)
    gold = normalised(question.answer)
    if not said or said == gold:
        return Score(float(bool(said)), parsed)
    offers = alternatives(question.text)
    meant = [offer for offer in offers if set(gold) <= set(offer) or set(offer) <= set(gold)]
    if (
        len(meant) != 1
    ):  # the question does not offer the gold answer: only the same words are right
        return Score(0.0, parsed)
    chosen = _chosen(text, offers)
    if len(chosen) != 1:
        return Score(0.0, None)
    offer = chosen.pop()
    return Score(float(offer == meant[0]), " ".join(offer))


def _chosen(text: str, offers: list[Words]) -> set[Words]:
    """Return the offers that an answer names by all their words, or by one that no other has.

    Negated ones do not count.
    """
    mentions = Mentions(text)
    places = []
    for offer in offers:
        others = {word for other in offers if other != offer for word in other}
        for needle in (offer, *((word,) for word in set(offer) - others)):
            places += [(*place, offer) for place in mentions.of(needle)]
    named = unnegated(places)
    if not named:  # "kidney" for "right kidney", where no other offer has the word
        said = set(words(text)) - _SMALL
        within = [offer for offer in offers if said and said <= set(offer)]
        named = set(within) if len(within) == 1 else set()
    return named


def _golds(question: Question) -> list[Words]:
    """Return the words of every gold answer."""
    answers = () if question.answer is None else (question.answer, *question.answers)
    return [normalised(text) for text in answers]


def recall(said: Words, gold: Words) -> float:
    """Return the share of the gold words that were said; a repeated word counts as often as gold has it."""
    common = (Counter(said) & Counter(gold)).total()
    return common / len(gold) if gold else 0.0


def f1(said: Words, gold: Words) -> float:
    """Return the harmonic mean of recall and precision."""
    common = (Counter(said) & Counter(gold)).total()
    return 2 * common / (len(said) + len(gold)) if said and gold else 0.0


def _by(measure: Callable[[Words, Words], float]) -> Callable[[Question, str], Score]:
    def score(question: Question, answer: str) -> Score:
        said = normalised(clean(answer))
        best = max((measure(said, gold) for gold in _golds(question)), default=None)
        return Score(best, " ".join(said) or None)

    return score


def _exact(question: Question, answer: str) -> Score:
    """Score 1 if the answer, or what it declares ("the answer is X"), is a gold answer word by word."""
    text = clean(answer)
    said = [text, *(match[1].rstrip(".。") for match in _DECLARED.finditer(text))]
    right = any(normalised(one) == gold for one in said for gold in _golds(question) if gold)
    return Score(float(right), " ".join(normalised(text)) or None)


YES_NO = Scorer(
    "yes_no",
    1,
    "yes or no as the answer's first word or declared",
    _yes_no,
    lambda question: (
        not question.options and (question.answer is None or polarity(question.answer) is not None)
    ),
)
CLOSED = Scorer(
    "closed",
    1,
    "yes or no, or the alternative of the question that the answer names",
    _closed,
    lambda question: not question.options and is_closed(question),
)
EXACT_MATCH = Scorer(
    "exact_match",
    1,
    "the gold answer's words in their order, without articles, case and punctuation",
    _exact,
)
TOKEN_RECALL = Scorer(
    "token_recall", 1, "share of the gold answer's words that were said", _by(recall)
)
TOKEN_F1 = Scorer("token_f1", 1, "F1 over the words of answer and gold answer", _by(f1))
