"""Question and answer text -> score, by named rules; nothing is asked of a model, nothing guessed.

``SCORERS["choice"].score(question, "The answer is (B).")``
"""

from __future__ import annotations

from collections.abc import Mapping

from gmai_xtuner.evaluation.scoring.scorer import Scorer

SCORERS: Mapping[str, Scorer] = {}
"""Scorers by name."""

__all__ = ["SCORERS", "Scorer"]
