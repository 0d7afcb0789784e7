# SPDX-License-Identifier: Apache-2.0

"""Exact match, token recall and F1 of open questions, computed by hand."""

from __future__ import annotations

import pytest

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS


def value(scorer: str, gold: str, answer: str, *more: str) -> float | None:
    return SCORERS[scorer].score(Question("1", "?", answer=gold, answers=more), answer).value


@pytest.mark.parametrize(
    ("gold", "answer", "exact", "recall", "f1"),
    [
        ("Left Lung", "the left lung.", 1, 1, 1),
        ("Left Lung", "lung", 0, 1 / 2, 2 / 3),
        ("Left Lung", "lung lung lung", 0, 1 / 2, 2 / 5),  # a repeated word wins nothing
        ("Left Lung", "in the left lower lung", 0, 1, 2 * 2 / 6),
        ("2", "12", 0, 0, 0),
        ("2", "two", 1, 1, 1),
        ("2", "2.0", 1, 1, 1),
        ("2", "There are 2", 1, 1, 1 / 2),
        ("2", "The answer is 2.", 1, 1, 2 / 4),
        ("1,200", "1200", 1, 1, 1),
        ("A", "a", 1, 1, 1),  # an article alone is the answer
        ("C", "vitamin C", 0, 1, 2 / 3),
        ("X-Ray", "x-ray", 1, 1, 1),
        ("None", "no", 0, 0, 0),
        ("Lung, Spinal Cord", "Spinal cord and lung", 0, 1, 6 / 7),
        ("右肺, 左侧", "右肺", 0, 1 / 2, 2 / 3),
        ("右肺", "右肺。", 1, 1, 1),
    ],
)
def test_scores(gold: str, answer: str, exact: float, recall: float, f1: float) -> None:
    assert value("exact_match", gold, answer) == exact
    assert value("token_recall", gold, answer) == pytest.approx(recall)
    assert value("token_f1", gold, answer) == pytest.approx(f1)


def test_the_best_of_several_gold_answers_counts() -> None:
    assert value("exact_match", "renal cell carcinoma", "RCC", "RCC") == 1
    assert value("token_recall", "renal cell carcinoma", "cell", "RCC") == pytest.approx(1 / 3)


def test_an_empty_answer_is_not_understood() -> None:
    question = Question("1", "?", answer="lung")
    for scorer in ("exact_match", "token_recall", "token_f1"):
        assert SCORERS[scorer].score(question, " ... ") == Score(0.0, None)
        assert SCORERS[scorer].score(Question("1", "?"), "lung") == Score(None, "lung")


def test_each_kind_of_question_by_its_own_scorer() -> None:
    choice = Question("1", "?", options=("Liver", "Lung"), answer="Lung")
    closed = Question("2", "Is it?", answer="No", groups={"answer_type": "CLOSED"})
    open_ = Question("3", "Where?", answer="Left Lung", groups={"answer_type": "OPEN"})
    for scorer, value_ in (
        ("closed_or_recall", 1 / 2),
        ("closed_or_f1", 2 / 3),
        ("closed_or_exact", 0),
    ):
        score = SCORERS[scorer].score
        assert score(choice, "B") == Score(1.0, "B")
        assert score(closed, "no") == Score(1.0, "no")
        assert score(open_, "lung") == Score(pytest.approx(value_), "lung")


def test_an_open_question_whose_gold_is_yes_stays_open() -> None:
    """What the authors call it counts; without their word the gold answer decides."""
    said_open = Question("1", "?", answer="Yes", groups={"answer_type": "OPEN"})
    assert SCORERS["closed_or_recall"].score(said_open, "maybe yes").value == 1
    assert SCORERS["closed_or_recall"].score(
        Question("1", "?", answer="Yes"), "maybe yes"
    ) == Score(0.0, None)
