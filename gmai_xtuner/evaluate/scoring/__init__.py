"""Question and answer text -> score, by named rules; nothing is asked of a model, nothing guessed.

``SCORERS["choice"].score(question, "The answer is (B).")``
"""

from __future__ import annotations

from collections.abc import Mapping

from gmai_xtuner.evaluate.scoring.choice import CHOICE, OPTION_LETTER, OPTION_TEXT
from gmai_xtuner.evaluate.scoring.closed import CLOSED, YES_NO
from gmai_xtuner.evaluate.scoring.huatuogpt import HUATUOGPT
from gmai_xtuner.evaluate.scoring.llava_med import LLAVA_MED
from gmai_xtuner.evaluate.scoring.mixed import CLOSED_OR_EXACT, CLOSED_OR_F1, CLOSED_OR_RECALL
from gmai_xtuner.evaluate.scoring.mmmu import MMMU
from gmai_xtuner.evaluate.scoring.overlap import EXACT_MATCH, TOKEN_F1, TOKEN_RECALL
from gmai_xtuner.evaluate.scoring.scorer import Scorer
from gmai_xtuner.evaluate.scoring.vlmevalkit import VLMEVALKIT

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
        CLOSED_OR_RECALL,
        CLOSED_OR_F1,
        CLOSED_OR_EXACT,
        VLMEVALKIT,
        HUATUOGPT,
        LLAVA_MED,
        MMMU,
    )
}
"""Scorers by name."""

__all__ = ["SCORERS", "Scorer"]
