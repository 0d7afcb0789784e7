# SPDX-License-Identifier: Apache-2.0

"""Closed questions without options; SLAKE's own questions where an alternative is named."""

from __future__ import annotations

import pytest

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS
from gmai_xtuner.evaluate.scoring.free_text import alternatives
from gmai_xtuner.evaluate.scoring.yes_no import yes_or_no

BIGGEST = "Which is the biggest in this image,lung,liver or heart?"
PLANE = "Which plane is the image scanned, transverse plane or coronal plane?"
WEIGHTED = "Is this a T1 weighted or T2 weighted MRI image?"
SMALLER = "Which is smaller in this image,liver or right kidney?"
BIGGER = "Which is bigger in this image, kidney or spleen?"
PLACE = "Where is the heart in this image,left,top or upper left?"
SIDE = "Which side of lung is abnormal in this image,left or right?"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("**Yes**", "yes"),
        ("Yes, it is", "yes"),
        ("The answer is No", "no"),
        ("Answer: yes", "yes"),
        ("是的", "yes"),
        ("不是", "no"),
        ("没有。", "no"),
        ("答案是：不是", "no"),
        ("yes and no", None),
        ("yes/no", None),
        ("No. The answer is yes.", None),
        ("There is no effusion", None),  # no, if the question was whether there is one; who knows
        ("No abnormality is seen", None),
        ("The answer is no evidence", None),
        ("No it is not", "no"),
        ("normal", None),
        ("I know", None),
        ("Nope", "no"),
        ("不正常", None),
        ("", None),
    ],
)
def test_yes_or_no(answer: str, said: str | None) -> None:
    assert yes_or_no(answer) == said


def test_yes_no_scores() -> None:
    asked = Question("1", "Is it?", answer="Yes")
    score = SCORERS["yes_no"].score
    assert score(asked, "yes, clearly") == Score(1.0, "yes")
    assert score(asked, "No") == Score(0.0, "no")
    assert score(asked, "maybe") == Score(0.0, None)
    assert score(Question("1", "图中是吗?", answer="不包含"), "没有") == Score(1.0, "no")
    assert score(Question("1", "Is it?"), "no") == Score(None, "no")
    assert not SCORERS["yes_no"].applies(Question("1", "Which?", answer="Lung"))


def test_what_a_question_offers() -> None:
    assert alternatives(BIGGEST) == [("lung",), ("liver",), ("heart",)]
    assert alternatives(PLANE) == [("transverse", "plane"), ("coronal", "plane")]
    assert alternatives("Is the abnormality hyperdense or hypodense?") == [
        ("hyperdense",),
        ("hypodense",),
    ]
    assert alternatives("Is there a liver?") == []


@pytest.mark.parametrize(
    ("text", "gold", "answer", "value", "understood"),
    [
        (BIGGEST, "Lung", "lung", 1, True),
        (BIGGEST, "Lung", "The lung is the biggest", 1, True),
        (BIGGEST, "Lung", "The liver", 0, True),
        (BIGGEST, "Lung", "lung or liver", 0, False),
        (BIGGEST, "Lung", "spleen", 0, False),
        (PLANE, "Coronal Plane", "coronal", 1, True),
        (PLANE, "Coronal Plane", "transverse plane", 0, True),
        (PLANE, "Coronal Plane", "plane", 0, False),
        (WEIGHTED, "T2", "T2 weighted", 1, True),
        (WEIGHTED, "T2", "T1", 0, True),
        (SMALLER, "Right Kidney", "kidney", 1, True),
        (PLACE, "Top", "top", 1, True),
        (PLACE, "Top", "upper left", 0, True),
        (SIDE, "Right", "not the left, the right", 1, True),
        (SIDE, "Right", "the right side of the lung", 1, True),
        # the gold answer is not offered (it is so in SLAKE): the same words alone are right
        (BIGGER, "Liver", "liver", 1, True),
        (BIGGER, "Liver", "spleen", 0, True),
        ("Does it?", "Yes", "Yes.", 1, True),
        ("Does it?", "Yes", "", 0, False),
        ("图像的扫描平面是什么？", "横断面", "横断面", 1, True),
    ],
)
def test_alternatives(text: str, gold: str, answer: str, value: int, understood: bool) -> None:
    question = Question("1", text, answer=gold, groups={"answer_type": "CLOSED"})
    score = SCORERS["closed"].score(question, answer)
    assert (score.value, score.parsed is not None) == (value, understood)
