# SPDX-License-Identifier: Apache-2.0

"""Scorers on the answers of ``cases.txt``, and what a table of answers can't say.

The columns of other kits are what their own code gave, run by hand and not stored here: VLMEvalKit's
``can_infer`` at commit e8e78f05f3080fe28154f2130321f17951c3be94, HuatuoGPT-Vision's ``match_choice3`` at
f699d88d4d1eeb9f3e62fdb2da4e297bdacb67f0 (null where it raises), MMMU's ``parse_multi_choice_response``,
``parse_open_response`` and ``eval_open`` at bb0b95a945998d91dfef37e969e07d49d1139438 (null where it chooses
at random), LLaVA-Med's ``calculate_f1score`` and ``run_eval.py`` at b9a98a736d2ef05bcf5ff345be6403fb3a664eaf.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS
from gmai_xtuner.evaluate.scoring.free_text import alternatives
from gmai_xtuner.evaluate.scoring.mentions import yes_or_no
from gmai_xtuner.evaluate.scoring.peers import first_letter, infer, parse_choice

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from readings import OURS, outcome, readings

ORGANS = ("Liver", "Lung", "Kidney", "Spleen")


def section(name: str) -> list[list[Any]]:
    text = Path(__file__).with_name("cases.txt").read_text(encoding="utf-8")
    (part,) = [part for part in text.split("\n== ")[1:] if part.startswith(f"{name}:")]
    return [json.loads(line) for line in part.splitlines()[1:] if line]


def question(
    options: tuple[str, ...] = (), gold: str | None = None, kind: str = "", text: str = "?"
) -> Question:
    return Question(
        "1", text, options=options, answer=gold, groups={"answer_type": kind} if kind else {}
    )


def score(scorer: str, asked: Question, answer: str) -> Score:
    return SCORERS[scorer].score(asked, answer)


def chosen(options: tuple[str, ...], answer: str, scorer: str = "choice") -> str | None:
    return score(scorer, question(options, options[0]), answer).parsed


@pytest.mark.parametrize(("options", "answer", "letter"), section("choice"))
def test_the_option_that_an_answer_chooses(options: str, answer: str, letter: str | None) -> None:
    listed = tuple(options.split(" | "))
    assert score("choice", question(listed, listed[0]), answer) == Score(
        float(letter == "A"), letter
    )


@pytest.mark.parametrize(("answer", "said"), section("yes_no"))
def test_yes_or_no(answer: str, said: str | None) -> None:
    assert yes_or_no(answer) == said


@pytest.mark.parametrize(("text", "gold", "answer", "value", "understood"), section("closed"))
def test_closed(text: str, gold: str, answer: str, value: int, understood: bool) -> None:
    found = score("closed", question((), gold, "CLOSED", text), answer)
    assert (found.value, found.parsed is not None) == (value, understood)


@pytest.mark.parametrize(("gold", "answer", "exact", "recall", "f1"), section("open"))
def test_open(gold: str, answer: str, exact: float, recall: float, f1: float) -> None:
    found = [
        score(one, question((), gold), answer).value
        for one in ("exact_match", "token_recall", "token_f1")
    ]
    assert found == pytest.approx([exact, recall, f1], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "answer", "vlmevalkit", "huatuogpt", "mmmu", "choice"), section("peers")
)
def test_other_kits(
    options: str, answer: str, vlmevalkit: str, huatuogpt: str, mmmu: str, choice: str
) -> None:
    listed = tuple(options.split(" | "))
    lettered = dict(zip("ABCD", listed, strict=False))
    found = (infer(answer, lettered), first_letter(answer), parse_choice(answer, lettered))
    assert (*found, chosen(listed, answer)) == (vlmevalkit, huatuogpt, mmmu, choice)


@pytest.mark.parametrize(("kind", "gold", "answer", "value"), section("llava_med"))
def test_llava_med(kind: str, gold: str, answer: str, value: float) -> None:
    assert score("llava_med", question((), gold, kind), answer).value == value


@pytest.mark.parametrize(("gold", "answer", "right"), section("mmmu"))
def test_open_questions_of_mmmu(gold: str, answer: str, right: bool) -> None:
    assert score("mmmu", question((), gold), answer).value == float(right)


def test_a_mere_mention_counts_in_short_answers_only() -> None:
    assert chosen(ORGANS, "The kidney " + "is seen " * 15) == "C"
    assert chosen(ORGANS, "The kidney " + "is seen " * 30) is None
    assert chosen(ORGANS, "It is seen " * 30 + "The answer is kidney") == "C"


def test_letters_alone_and_texts_alone() -> None:
    found = [
        chosen(ORGANS, one, f"option_{by}") for by in ("letter", "text") for one in ("B", "Lung")
    ]
    assert found == ["B", None, None, "B"]


def test_gaps_equal_options_and_gold_answers_that_are_none() -> None:
    """Option C is missing in a file, D stays D; the HuatuoGPT-Vision collection writes "?" for no answer."""
    gaps = Question("1", "?", options=("Liver", "Lung", "Spleen"), answer="Spleen", letters="ABD")
    assert [score("choice", gaps, one) for one in "DC"] == [Score(1.0, "D"), Score(0.0, None)]
    twice = question(("CT", "MR", "CT"), "CT")
    assert [score("choice", twice, one).value for one in ("A", "C", "CT", "B")] == [1, 1, 1, 0]
    assert score("choice", question(ORGANS, "?"), "A") == Score(0.0, "A")
    assert score("huatuogpt", question(ORGANS, "?"), "A") == Score(0.0, "A")
    for scorer in ("choice", "vlmevalkit", "huatuogpt", "mmmu"):
        assert score(scorer, question(ORGANS), "B") == Score(None, "B")
    assert not SCORERS["choice"].applies(question())


def test_scores_of_other_kits() -> None:
    asked = question(ORGANS, "Lung")
    assert score("vlmevalkit", asked, "Lung") == Score(1.0, "B")
    assert score("vlmevalkit", asked, "Cannot determine the answer") == Score(0.0, "Z")
    assert score("huatuogpt", asked, "b") == Score(0.0, "b")
    assert score("mmmu", asked, "(B) or rather (A)") == Score(0.0, "A")


def test_yes_no_scores() -> None:
    assert score("yes_no", question((), "Yes"), "No") == Score(0.0, "no")
    assert score("yes_no", question((), "不包含"), "没有") == Score(1.0, "no")
    assert score("yes_no", question(), "no") == Score(None, "no")
    assert not SCORERS["yes_no"].applies(question((), "Lung"))


def test_what_a_question_offers() -> None:
    biggest = "Which is the biggest in this image,lung,liver or heart?"
    assert alternatives(biggest) == [("lung",), ("liver",), ("heart",)]
    assert alternatives("Is it hyperdense or hypodense?") == [("hyperdense",), ("hypodense",)]
    assert alternatives("Is there a liver?") == []


def test_several_gold_answers_and_empty_ones() -> None:
    asked = Question("1", "?", answer="renal cell carcinoma", answers=("RCC",))
    assert score("exact_match", asked, "RCC").value == 1
    assert score("token_recall", asked, "cell").value == pytest.approx(1 / 3)
    for scorer in ("exact_match", "token_recall", "token_f1", "rouge_l", "bleu", "meteor"):
        assert score(scorer, question((), "lung"), "<think> so").parsed is None
        assert score(scorer, question(), "lung") == Score(None, "lung")


def test_each_kind_of_question_by_its_own_scorer() -> None:
    """What the authors call a question counts; without their word the gold answer decides."""
    for scorer, value in (
        ("closed_or_recall", 1 / 2),
        ("closed_or_f1", 2 / 3),
        ("closed_or_exact", 0),
    ):
        assert score(scorer, question(ORGANS, "Lung"), "B") == Score(1.0, "B")
        assert score(scorer, question((), "No", "CLOSED"), "no") == Score(1.0, "no")
        assert score(scorer, question((), "Left Lung", "OPEN"), "lung").value == pytest.approx(
            value
        )
    assert score("closed_or_recall", question((), "Yes", "OPEN"), "maybe yes").value == 1
    assert score("closed_or_recall", question((), "Yes"), "maybe yes") == Score(0.0, None)


def test_reports_by_hand() -> None:
    """ROUGE-L: 3 of 4 words of the reference in 3 words said; BLEU and METEOR are 1 for the same words."""
    asked = question((), "no pleural effusion seen")
    assert score("rouge_l", asked, "no pleural effusion").value == pytest.approx(2 * 3 / 7)
    assert score("bleu", asked, "no pleural effusion seen").value == pytest.approx(1)
    assert score("meteor", asked, "no pleural effusions seen").value > 0.9  # stems
    for scorer in ("rouge_l", "bleu", "meteor"):
        assert score(scorer, asked, "cardiomegaly today").value < 0.1


# --- How often the rules agree with a reader, on the answers of ``answers.txt``, beside this file ---


@pytest.mark.parametrize(
    ("name", "misread", "unread"), [("answers", 0.0, 0.05), ("held_back", 0.006, 0.05)]
)
def test_the_rules_agree_with_a_reader(name: str, misread: float, unread: float) -> None:
    found = readings(Path(__file__).with_name(f"{name}.txt"))
    outcomes = [(outcome(OURS[one[0]], *one), one) for one in found]
    counts = Counter(said for said, _ in outcomes)
    readable = sum(reading != "-" for *_, reading in found)
    assert len(found) > 300
    assert counts["misread"] <= misread * len(found), outcomes_of("misread", outcomes)
    assert counts["unread"] <= unread * readable, outcomes_of("unread", outcomes)


def outcomes_of(name: str, outcomes: list[tuple[str, Any]]) -> str:
    return "\n".join(str(one) for said, one in outcomes if said == name)


BOX = Question("1", "?", answer="100\n50\n300\n150", groups={"width": "400", "height": "200"})


@pytest.mark.parametrize(
    ("scorer", "answer", "iou"),
    [
        ("box_pixels", "[100, 50, 300, 150]", 1),
        ("box_pixels", "The mass is at (100,50),(300,150).", 1),
        ("box_pixels", "<think>[1, 2, 3, 4]</think><box>[[100, 50, 200, 150]]</box>", 0.5),
        ("box_pixels", '```json\n[{"bbox_2d": [200, 50, 300, 150], "label": "mass"}]\n```', 0.5),
        ("box_pixels", '{"x": 100, "y": 50, "width": 200, "height": 100}', 1),
        ("box_pixels", '{"x1": 100, "y1": 50, "x2": 300, "y2": 100}', 0.5),
        ("box_pixels", "[300, 150, 400, 200]", 0),
        ("box_pixels", "[0.25, 0.25, 0.75, 0.75]", None),  # not in pixels
        ("box_pixels", "[300, 150, 100, 50]", None),
        ("box_pixels", "[100, 50, 300, 150] or [0, 0, 9, 9]", None),
        ("box_pixels", "in the middle", None),
        ("box_1000_pixels", "<|box_start|>(250,250),(750,750)<|box_end|>", 1),
        ("box_1000_pixels", "<box>250 250 750 500</box>", 0.5),
        ("box_1000_pixels", "[250, 250, 1750, 750]", None),
        ("box_unit_pixels", "[0.25, 0.25, 0.75, 0.75]", 1),
        ("box_unit_pixels", "[25, 25, 75, 75]", None),
    ],
)
def test_boxes_overlap(scorer: str, answer: str, iou: float | None) -> None:
    found, half = score(f"{scorer}_iou", BOX, answer), score(f"{scorer}_acc50", BOX, answer)
    assert (found.value, half.value) == (iou or 0, float((iou or 0) >= 0.5))
    assert (found.parsed is None) == (half.parsed is None) == (iou is None)


TWO_BOXES = "[0, 0, 100, 100]\n[200, 0, 300, 100]"


@pytest.mark.parametrize(
    ("answer", "iou", "acc50"),
    [
        ("[[200, 0, 300, 100], [0, 0, 100, 100]]", 1, 1),
        ("[0, 0, 100, 50] and [200, 0, 300, 100]", 3 / 4, 1),
        ("[0, 0, 100, 40] and [200, 0, 300, 100]", 0.7, 0),
        ("[0, 0, 100, 100]", 2 / 3, 0),  # one is missing
        ("[0, 0, 100, 100] [200, 0, 300, 100] [400, 0, 500, 100]", 4 / 5, 0),  # one is too many
        ("[0, 0, 100, 100] [0, 0, 100, 90]", 1 / 2, 0),  # both upon one: it counts once
        ("[0, 0, 100, 60] [0, 40, 100, 100]", 2 * 0.6 / 4, 0),
        ("[0, 0, 100, 100] [200, 0, 300, 0]", None, None),
        ("nowhere", None, None),
    ],
)
def test_several_boxes_are_matched_one_to_one(answer: str, iou: float, acc50: int) -> None:
    asked = question((), TWO_BOXES)
    found, half = (score(f"box_pixels_{one}", asked, answer) for one in ("iou", "acc50"))
    assert (found.value, half.value) == (pytest.approx(iou or 0), acc50 or 0)
    assert (found.parsed is None) == (half.parsed is None) == (iou is None)


def test_gold_boxes_are_matched_for_the_largest_sum() -> None:
    """Each box taking its best partner in turn would leave the second without one."""
    asked = question((), "[0, 0, 10, 10] [0, 4, 10, 14]")
    found = score("box_pixels_iou", asked, "[0, 2, 10, 12] [0, -1, 10, 1]")
    assert found.parsed is None  # outside
    found = score("box_pixels_iou", asked, "[0, 3, 10, 13] [0, 8, 10, 18]")
    assert found.value == pytest.approx((7 / 13 + 6 / 14) * 2 / 4)
    assert not SCORERS["box_pixels_iou"].applies(question((), "[0, 0, 10, 10] [0, 4, 10]"))
    for gold in ("none", "2 nodules: [0, 0, 10, 10], [4, 14, 9]"):
        assert not SCORERS["box_pixels_iou"].applies(question((), gold))


def test_boxes_are_of_the_declared_unit() -> None:
    assert not SCORERS["box_unit_iou"].applies(BOX)  # the gold box is in pixels
    assert not SCORERS["box_1000_pixels_iou"].applies(question((), "100 50 300 150"))  # of no size
    assert (
        score("box_1000_iou", question((), "[0, 0, 500, 1000]"), "[0, 0, 1000, 1000]").value == 0.5
    )


@pytest.mark.parametrize(
    ("scorer", "asked", "answer", "expected"),
    [
        ("medevalkit", question(ORGANS, "Lung"), "**Answer**: lung", Score(1.0, "B")),
        ("medevalkit", question(ORGANS, "Lung"), "\\boxed{C}", Score(0.0, "C")),
        # Its judge apart, nothing is unparsed: of the four, Spleen is the most similar to this.
        ("medevalkit", question(ORGANS, "Lung"), "speechless", Score(0.0, "D")),
        ("medevalkit", question(gold="No"), "Normal", Score(1.0, "normal")),
        ("medevalkit", question(gold="No"), "Yes and no", Score(0.0, None)),
        ("lmms_eval", question(ORGANS, "Liver"), "Vitamin A helps", Score(1.0, "A")),
        ("lmms_eval", question(ORGANS, "Lung"), "(B), not (C)", Score(0.0, "C")),
        ("lmms_eval", question(ORGANS, "Lung"), "it is in the upper left lung", Score(1.0, "B")),
        ("lmms_eval", question(ORGANS, "Lung"), "lung", Score(0.0, None)),
        ("lmms_eval", question(gold="Yes", kind="CLOSED"), "Yeah.", Score(1.0, "yes")),
        ("lmms_eval", question(gold="X-Ray", kind="OPEN"), "xray (chest)", Score(1.0, "xray")),
    ],
)
def test_medevalkit_and_lmms_eval(scorer: str, asked: Question, answer: str, expected: Score):
    assert score(scorer, asked, answer) == expected
