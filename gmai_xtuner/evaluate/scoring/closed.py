"""Closed questions without options: yes or no, and the alternatives that a question itself names."""

from __future__ import annotations

import re

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring.choice import unnegated
from gmai_xtuner.evaluate.scoring.polarity import polarity, yes_or_no
from gmai_xtuner.evaluate.scoring.scorer import Scorer
from gmai_xtuner.evaluate.scoring.text import Mentions, clean, normalised, words

_QUESTION_WORD = re.compile(r"^(?:which|what|where|who|how)\b", re.IGNORECASE)
_SMALL = frozenset(
    {"a", "an", "the", "this", "that", "is", "are", "in", "of", "it", "its", "on", "to", "image"}
)


def is_closed(question: Question) -> bool:
    """As its authors say, and by the gold answer where they don't: yes or no."""
    kind = question.groups.get("answer_type", "").upper()
    if kind:
        return kind == "CLOSED"
    return question.answer is not None and polarity(question.answer) is not None


def has_polar_gold(question: Question) -> bool:
    """Whether the gold answer is yes or no, or is kept by the authors."""
    return question.answer is None or polarity(question.answer) is not None


def alternatives(question: str) -> list[tuple[str, ...]]:
    """What a question offers: "Which is bigger, kidney or liver?" -> kidney, liver; empty without an "or"."""
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


def _content(text: str) -> tuple[str, ...]:
    return tuple(word for word in normalised(text) if word not in _SMALL)


def _score_yes_no(question: Question, answer: str) -> Score:
    said = yes_or_no(answer)
    if question.answer is None:
        return Score(None, said)
    return Score(float(said is not None and said == polarity(question.answer)), said)


def score_closed(question: Question, answer: str) -> Score:
    """Yes or no where that is the gold answer; otherwise which of the offers of the question is named."""
    gold = question.answer
    if gold is None:
        return Score(None, " ".join(normalised(clean(answer))) or None)
    if polarity(gold) is not None:
        return _score_yes_no(question, answer)
    text = clean(answer)
    said = normalised(text)
    if not said:
        return Score(0.0, None)
    if said == normalised(gold):
        return Score(1.0, " ".join(said))
    offers = alternatives(question.text)
    gold_words = set(normalised(gold))
    meant = [offer for offer in offers if gold_words <= set(offer) or set(offer) <= gold_words]
    if (
        len(meant) != 1
    ):  # the question does not offer the gold answer: only the same words are right
        return Score(0.0, " ".join(said))
    chosen = _chosen(text, offers)
    if len(chosen) != 1:
        return Score(0.0, None)
    offer = chosen.pop()
    return Score(float(offer == meant[0]), " ".join(offer))


def _chosen(text: str, offers: list[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Offers that an answer names, by all their words or one that no other has; not the negated."""
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


YES_NO = Scorer(
    "yes_no",
    1,
    "yes or no as the answer's first word or declared",
    _score_yes_no,
    lambda question: not question.options and has_polar_gold(question),
)
CLOSED = Scorer(
    "closed",
    1,
    "yes or no, or the alternative of the question that the answer names",
    score_closed,
    lambda question: not question.options and is_closed(question),
)
