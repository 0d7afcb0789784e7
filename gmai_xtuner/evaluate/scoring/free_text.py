# SPDX-License-Identifier: Apache-2.0

"""Questions without options: closed ones by what they offer, open ones by the words in common, reports."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.choice import CUES
from gmai_xtuner.evaluate.scoring.mentions import affirmed, mentions, polarity, yes_or_no
from gmai_xtuner.evaluate.scoring.text import (
    TABLES,
    Words,
    clean,
    declared,
    numerals,
    patterns,
    plain,
    quantity,
    same_quantity,
    stems,
    words,
)

RULES = patterns("free_text")
_SMALL = frozenset(TABLES["small_words"])
_CUES = "|".join(CUES[name] for name in ("the answer is", "answer:", "答案是"))
_DECLARED = re.compile(rf"(?i)(?:{_CUES})\s*(.+?)\s*(?:$|\n)")


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
    if len(listed) > 1 and RULES["question_word"].match(parts[0]):
        listed = listed[1:]
    elif listed:
        listed[0] = listed[0][-max(len(final), 1) :]
    return [offer for offer in (*listed, final) if offer]


def _content(text: str) -> Words:
    return tuple(word for word in stems(text) if word not in _SMALL)


def _yes_no(question: Question, answer: str) -> Score:
    said = yes_or_no(answer, question.text)
    return Score(float(said is not None and said == polarity(question.answer or "")), said)


def _closed(question: Question, answer: str) -> Score:
    """Score yes or no where that is the gold answer; otherwise the offer of the question that is named."""
    text = clean(answer)
    said = stems(text)
    parsed = " ".join(words(text)) or None
    if question.answer is None:
        return Score(None, parsed)
    if polarity(question.answer) is not None:
        return _yes_no(question, answer)
    gold = stems(question.answer)
    if not said or said == gold:
        return Score(float(bool(said)), parsed)
    offers = alternatives(question.text)
    meant = [offer for offer in offers if set(gold) <= set(offer) or set(offer) <= set(gold)]
    if len(meant) != 1:  # the gold answer is not offered: only the same words are right
        return Score(0.0, parsed)
    chosen = _chosen(text, offers)
    if len(chosen) != 1:
        return Score(0.0, None)
    offer = chosen.pop()
    return Score(float(offer == meant[0]), " ".join(offer))


def _chosen(text: str, offers: list[Words]) -> set[Words]:
    """Return the offers that an answer names by all their words, or by one that no other has."""
    names: dict[Words, tuple[Words, ...]] = {}
    for offer in offers:
        others = {word for other in offers if other != offer for word in other}
        names[offer] = (offer, *((word,) for word in set(offer) - others))
    declared = [match[1] for match in _DECLARED.finditer(text)]
    found: set[Words] = set()
    for part in (*declared[-1:], text):
        found = found or affirmed(part, mentions(part, names))
    if not found:  # "kidney" for "right kidney", where no other offer has the word
        said = set(stems(text)) - _SMALL
        within = [offer for offer in offers if said and said <= set(offer)]
        found = set(within) if len(within) == 1 else set()
    return found


def _golds(question: Question) -> tuple[str, ...]:
    return () if question.answer is None else (question.answer, *question.answers)


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
        said = words(clean(answer))
        best = max((measure(said, words(gold)) for gold in _golds(question)), default=None)
        return Score(best, " ".join(said) or None)

    return score


def _exact(question: Question, answer: str) -> Score:
    """Score 1 if the answer, or what it declares ("the answer is X"), is a gold answer word by word."""

    def is_right(text: str) -> bool:
        behind = [match[1].rstrip(".。") for match in _DECLARED.finditer(text)]
        said = () if text.startswith("?") else (text, *behind[-1:])
        return any(_is_gold(one, gold) for one in said for gold in _golds(question))

    right = all(map(is_right, declared(answer)))
    return Score(float(right), " ".join(words(clean(answer))) or None)


def _is_gold(said: str, gold: str) -> bool:
    """Compare words; numbers however written; a single letter also where labelled ("structure A")."""
    if stems(gold) and stems(gold) in (stems(said), stems(RULES["placed"].sub("", said, count=1))):
        return True
    if len(gold.strip()) == 1 and gold.strip().isalpha():
        label = RULES["labelled"].fullmatch(said.strip())
        return label is not None and label[1].upper() == gold.strip().upper()
    if quantity(gold) is None or RULES["denial"].search(said):
        return False
    numbers = RULES["number"].findall(plain(said)) or [
        word for word in words(said) if word.isdigit()
    ]
    return same_quantity(said, gold) or (len(numbers) == 1 and same_quantity(numbers[0], gold))


def _asks_yes_or_no(question: Question) -> bool:
    said = question.answer
    return not question.options and (said is None or polarity(said) is not None)


_FIRST = "yes or no as the answer's first word or declared"
YES_NO = Scorer("yes_no", 5, _FIRST, _yes_no, _asks_yes_or_no)
CLOSED = Scorer(
    *("closed", 5, "yes or no, or the alternative of the question that the answer names", _closed),
    lambda question: not question.options and is_closed(question),
)
_WORDS = "the gold answer's words in their order, without articles, case and punctuation"
EXACT_MATCH = Scorer("exact_match", 5, _WORDS, _exact)
_SHARE = "share of the gold answer's words that were said"
TOKEN_RECALL = Scorer("token_recall", 5, _SHARE, _by(recall))
TOKEN_F1 = Scorer("token_f1", 5, "F1 over the words of answer and gold answer", _by(f1))


# Reports against a reference report, by well-kept packages

_WORD = re.compile(r"\w+|[^\w\s]")


class _NoSynonyms:
    """Stands for WordNet, whose files nltk would fetch: words and their stems count, synonyms do not."""

    def synsets(self, word: str) -> list[Any]:
        return []


@cache
def _measure(name: str) -> Any:
    try:
        if name == "rouge_l":
            from rouge_score.rouge_scorer import RougeScorer

            rouge = RougeScorer(["rougeL"], use_stemmer=True)
            return lambda said, gold: rouge.score(gold, said)["rougeL"].fmeasure
        if name == "bleu":
            from sacrebleu import sentence_bleu

            return lambda said, gold: sentence_bleu(said, [gold]).score / 100
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise EvaluationError(
            f"the scorer {name} needs a package that is not installed: pip install -e .[evaluate]"
        ) from error
    words = lambda text: _WORD.findall(text.lower())  # noqa: E731
    return lambda said, gold: single_meteor_score(words(gold), words(said), wordnet=_NoSynonyms())


def _report_scorer(name: str, description: str) -> Scorer:
    def score(question: Question, answer: str) -> Score:
        said = clean(answer).strip()
        golds = (question.answer or "", *question.answers)
        best = max(_measure(name)(said, numerals(plain(gold))) for gold in golds) if said else 0.0
        return Score(min(1.0, max(0.0, best)), said or None)

    return Scorer(name, 3, description, score, lambda question: not question.options)


ROUGE_L = _report_scorer("rouge_l", "ROUGE-L's F measure, with stems (rouge-score)")
BLEU = _report_scorer(
    "bleu", "mean of the sentences' BLEU-4, smoothed (sacrebleu); not BLEU of the corpus"
)
METEOR = _report_scorer("meteor", "METEOR by words and stems, without WordNet's synonyms (nltk)")
