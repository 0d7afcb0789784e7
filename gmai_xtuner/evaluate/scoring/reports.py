# SPDX-License-Identifier: Apache-2.0

"""Reports against a reference report: ROUGE-L, BLEU and METEOR of well-kept packages."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.text import clean

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


def _scorer(name: str, description: str) -> Scorer:
    def score(question: Question, answer: str) -> Score:
        said = clean(answer).strip()
        golds = (question.answer or "", *question.answers)
        best = max(_measure(name)(said, gold) for gold in golds) if said else 0.0
        return Score(min(1.0, max(0.0, best)), said or None)

    return Scorer(name, 1, description, score, lambda question: not question.options)


ROUGE_L = _scorer("rouge_l", "ROUGE-L's F measure, with stems (rouge-score)")
BLEU = _scorer(
    "bleu", "mean of the sentences' BLEU-4, smoothed (sacrebleu); not BLEU of the corpus"
)
METEOR = _scorer("meteor", "METEOR by words and stems, without WordNet's synonyms (nltk)")
