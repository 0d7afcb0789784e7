# SPDX-License-Identifier: Apache-2.0

"""Question and answer text -> score, by named rules; nothing is asked of a model, nothing guessed.

``SCORERS["choice"].score(question, "The answer is (B).")``
"""

from __future__ import annotations

from collections.abc import Mapping

from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.choice import CHOICE, OPTION_LETTER, OPTION_TEXT
from gmai_xtuner.evaluate.scoring.free_text import (
    BLEU,
    CLOSED,
    EXACT_MATCH,
    METEOR,
    ROUGE_L,
    TOKEN_F1,
    TOKEN_RECALL,
    YES_NO,
)
from gmai_xtuner.evaluate.scoring.peers import HUATUOGPT, LLAVA_MED, MMMU, VLMEVALKIT
from gmai_xtuner.evaluate.scoring.text import plain, without_thoughts


def _closed_or(name: str, words: str, open_scorer: Scorer) -> Scorer:
    """Score sets with several kinds of questions, each kind by its own scorer."""

    def score(question: Question, answer: str) -> Score:
        scorers = (CHOICE, CLOSED, open_scorer)
        scorer = next(one for one in scorers if one.applies(question))
        if scorer is MMMU:  # its rule knows neither thoughts nor the sign U+2212
            answer = without_thoughts(plain(answer))
        return scorer.score(question, answer)

    description = f"choice or closed where the question is that, {words} otherwise"
    return Scorer(f"closed_or_{name}", 2, description, score)


SCORERS: Mapping[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        CHOICE,
        OPTION_LETTER,
        OPTION_TEXT,
        YES_NO,
        CLOSED,
        EXACT_MATCH,
        TOKEN_RECALL,
        TOKEN_F1,
        _closed_or("recall", "token recall", TOKEN_RECALL),
        _closed_or("f1", "token F1", TOKEN_F1),
        _closed_or("exact", "exact match", EXACT_MATCH),
        _closed_or("mmmu", "MMMU's rule for open questions", MMMU),
        VLMEVALKIT,
        HUATUOGPT,
        LLAVA_MED,
        MMMU,
        ROUGE_L,
        BLEU,
        METEOR,
    )
}
"""Scorers by name."""
