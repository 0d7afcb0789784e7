# SPDX-License-Identifier: Apache-2.0

"""Question and answer text -> score, by named rules; nothing is asked of a model, nothing guessed.

``SCORERS["choice"].score(question, "The answer is (B).")``
"""

from __future__ import annotations

from collections.abc import Mapping

from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring import boxes, choice, peers
from gmai_xtuner.evaluate.scoring import free_text as free
from gmai_xtuner.evaluate.scoring.text import plain, without_thoughts


def _closed_or(name: str, words: str, open_scorer: Scorer) -> Scorer:
    """Score sets with several kinds of questions, each kind by its own scorer."""

    def score(question: Question, answer: str) -> Score:
        scorers = (choice.CHOICE, free.CLOSED, open_scorer)
        scorer = next(one for one in scorers if one.applies(question))
        if scorer is peers.MMMU:  # its rule knows neither thoughts nor the sign U+2212
            answer = without_thoughts(plain(answer))
        return scorer.score(question, answer)

    description = f"choice or closed where the question is that, {words} otherwise"
    return Scorer(f"closed_or_{name}", 5, description, score)


_ALL = (
    *(choice.CHOICE, choice.OPTION_LETTER, choice.OPTION_TEXT),
    *(free.YES_NO, free.CLOSED, free.EXACT_MATCH, free.TOKEN_RECALL, free.TOKEN_F1),
    _closed_or("recall", "token recall", free.TOKEN_RECALL),
    _closed_or("f1", "token F1", free.TOKEN_F1),
    _closed_or("exact", "exact match", free.EXACT_MATCH),
    _closed_or("mmmu", "MMMU's rule for open questions", peers.MMMU),
    *(peers.VLMEVALKIT, peers.HUATUOGPT, peers.LLAVA_MED, peers.MMMU),
    *(peers.MEDEVALKIT, peers.LMMS_EVAL),
    *(free.ROUGE_L, free.BLEU, free.METEOR),
    *boxes.BOXES,
)
SCORERS: Mapping[str, Scorer] = {scorer.name: scorer for scorer in _ALL}
"""Scorers by name."""
