# SPDX-License-Identifier: Apache-2.0

"""The rules of other evaluators: what their own code gave for these answers, run by hand, not stored here.

VLMEvalKit ``can_infer`` at commit e8e78f05f3080fe28154f2130321f17951c3be94, HuatuoGPT-Vision
``match_choice3`` at f699d88d4d1eeb9f3e62fdb2da4e297bdacb67f0 (None where it raises), MMMU
``parse_multi_choice_response``, ``parse_open_response`` and ``eval_open`` at
bb0b95a945998d91dfef37e969e07d49d1139438 (None where it chooses at random), LLaVA-Med
``calculate_f1score`` and ``run_eval.py`` at b9a98a736d2ef05bcf5ff345be6403fb3a664eaf. The last column is
our own scorer, decided by hand.
"""

from __future__ import annotations

import pytest

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS
from gmai_xtuner.evaluate.scoring.peers import first_letter, infer, open_recall, parse_choice

ORGANS = ("Liver", "Lung", "Kidney", "Spleen")
SCANS = ("MR", "MR angiography", "CT", "Ultrasound")
COUNTS = ("2", "4", "12", "1")
EVEN = ("2", "4", "6", "8")
YES_NO = ("Yes", "No")


@pytest.mark.parametrize(
    ("options", "answer", "vlmevalkit", "huatuogpt", "mmmu", "choice"),
    [
        (ORGANS, "B", "B", "B", "B", "B"),
        (ORGANS, "b", None, "b", None, "B"),
        (ORGANS, "(B)", "B", "B", "B", "B"),
        (ORGANS, "B.", "B", "B", "B", "B"),
        (ORGANS, "B. Lung", "B", "B", None, "B"),
        (ORGANS, "A. Lung", "A", "A", None, None),
        (ORGANS, "A", "A", "A", "A", "A"),
        (ORGANS, "A is right", "A", None, "A", "A"),
        (ORGANS, "The answer is A because it is large", "A", None, "A", "A"),
        (ORGANS, "The answer is b.", "B", "b", None, "B"),
        (ORGANS, "The correct answer is **B**. Here's why: A is a gland.", "B", "B", "A", "B"),
        (ORGANS, "A and B", None, "B", "B", None),
        (ORGANS, "The answer is A or B", "A", "B", "B", None),
        (ORGANS, "The answer is not A, it is B", None, "A", "B", "B"),
        (ORGANS, "答案是B", None, "B", None, "B"),
        (ORGANS, "选B。", None, None, None, "B"),
        (ORGANS, "B是正确的", None, None, None, "B"),
        (ORGANS, "lung", "B", None, None, "B"),
        (ORGANS, "The image shows the lung.", "B", None, None, "B"),
        (ORGANS, "The image shows the liver and the lung in one view.", None, None, "B", None),
        (ORGANS, "It is not the liver, it is the lung", None, None, "B", "B"),
        (ORGANS, "I think it is B", "B", "I", "B", "B"),
        (ORGANS, "I'd say B", "B", "I", "B", "B"),
        (ORGANS, "It's B", "B", "B", "B", "B"),
        (ORGANS, "Both A and C are possible", None, "C", "C", None),
        (ORGANS, "Hepatitis B is seen", "B", "B", "B", None),
        (ORGANS, "A large mass is seen in the lung", "B", None, "A", "B"),
        (ORGANS, "B, as the image shows aerated tissue on both sides", None, "B", None, "B"),
        (ORGANS, "# B", "B", "B", "B", "B"),
        (ORGANS, "<think>A?</think>B", None, "A", None, "B"),
        (ORGANS, "I don't know", None, "I", None, None),
        (ORGANS, "Cannot determine the answer", "Z", None, None, None),
        (ORGANS, "Z", "Z", None, None, None),
        (ORGANS, "", None, None, None, None),
        (ORGANS, "Dr. D. thinks so (C)", None, "D", "C", "C"),
        (ORGANS, "e.g. C", "C", "e", "C", None),
        (SCANS, "MR angiography", None, None, None, "B"),
        (SCANS, "MR", "A", None, None, "A"),
        (SCANS, "This is an MR angiography image.", None, None, "A", "B"),
        (COUNTS, "12", None, None, None, "C"),
        (COUNTS, "2", "A", None, None, "A"),
        (EVEN, "12", "A", None, None, None),
        (COUNTS, "There are 12 lesions", None, None, None, "C"),
        (YES_NO, "No", "B", None, None, "B"),
        (YES_NO, "No, I know", "B", "I", None, "B"),
    ],
)
def test_letters(
    options: tuple[str, ...],
    answer: str,
    vlmevalkit: str | None,
    huatuogpt: str | None,
    mmmu: str | None,
    choice: str | None,
) -> None:
    lettered = dict(zip("ABCD", options, strict=False))
    question = Question("1", "?", options=options, answer=options[0])
    assert infer(answer, lettered) == vlmevalkit
    assert first_letter(answer) == huatuogpt
    assert parse_choice(answer, lettered) == mmmu
    assert SCORERS["choice"].score(question, answer).parsed == choice


def test_scores_of_letters() -> None:
    question = Question("1", "?", options=ORGANS, answer="Lung")
    assert SCORERS["vlmevalkit"].score(question, "Lung") == Score(1.0, "B")
    assert SCORERS["vlmevalkit"].score(question, "b") == Score(0.0, None)
    assert SCORERS["vlmevalkit"].score(question, "Cannot determine the answer") == Score(0.0, "Z")
    assert SCORERS["huatuogpt"].score(question, "B") == Score(1.0, "B")
    assert SCORERS["huatuogpt"].score(question, "b") == Score(0.0, "b")
    assert SCORERS["huatuogpt"].score(question, "Lung") == Score(0.0, None)
    assert SCORERS["mmmu"].score(question, "(B) or rather (A)") == Score(0.0, "A")
    hidden = Question("1", "?", options=ORGANS)
    for scorer in ("vlmevalkit", "huatuogpt", "mmmu"):
        assert SCORERS[scorer].score(hidden, "B") == Score(None, "B")
    wrong_whatever = Question("1", "?", options=ORGANS, answer="?")
    assert SCORERS["huatuogpt"].score(wrong_whatever, "A") == Score(0.0, "A")


@pytest.mark.parametrize(
    ("gold", "answer", "recall"),
    [
        ("left lung", "lung lung lung", 0.75),
        ("left lung", "the left lung", 1.0),
        ("left lung", "left; lung", 1.0),
        ("isn't seen", "isnt seen", 1.0),
        ("2", "two", 1.0),
        ("2", "12", 0.0),
        ("0", "none", 1.0),
        ("x-ray", "X ray", 1.0),
        ("1,200", "1200", 1.0),
        ("Lung, Spinal Cord", "spinal cord and lung", 1.0),
    ],
)
def test_open_recall_of_llava_med(gold: str, answer: str, recall: float) -> None:
    assert open_recall(answer, gold) == recall
    question = Question("1", "?", answer=gold, groups={"answer_type": "OPEN"})
    assert SCORERS["llava_med"].score(question, answer).value == recall


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("Yes", "yes", 1.0),
        ("No", "normal", 1.0),
        ("No", "I know", 1.0),
        ("Yes", "yes or no", 1.0),
        ("Lung", "lung", 0.0),
        ("Lung", "yes, the lung", 1.0),
    ],
)
def test_closed_questions_of_llava_med(gold: str, answer: str, value: float) -> None:
    question = Question("1", "?", answer=gold, groups={"answer_type": "CLOSED"})
    assert SCORERS["llava_med"].score(question, answer).value == value


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("C", "The answer is C", True),
        ("C", "vitamin C.", True),
        ("2", "The result is 2.", True),
        ("2", "12", False),
        ("2", "so the value is 2.004", True),
        ("1,200", "1200 mm", True),
        ("Transformation", "It is a transformation", True),
        ("A", "a", True),
        ("A", "The letter A stands there", True),
        ("0.25", "x = 0.25", True),
        ("2", "Two", False),
    ],
)
def test_open_questions_of_mmmu(gold: str, answer: str, right: bool) -> None:
    assert SCORERS["mmmu"].score(Question("1", "?", answer=gold), answer).value == float(right)
