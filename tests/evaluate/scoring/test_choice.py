# SPDX-License-Identifier: Apache-2.0

"""Which option an answer chooses: every case is decided by hand."""

from __future__ import annotations

import pytest

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS

ORGANS = ("Liver", "Lung", "Kidney", "Spleen")
SCANS = ("MR", "MR angiography", "CT", "Ultrasound")
COUNTS = ("2", "4", "12", "1")
LUNGS = ("肺", "肝", "肾", "脾")


def question(options: tuple[str, ...], gold: str | None = None, letters: str = "") -> Question:
    return Question("1", "?", options=options, answer=gold, letters=letters)


def parsed(options: tuple[str, ...], answer: str, scorer: str = "choice") -> str | None:
    return SCORERS[scorer].score(question(options, options[0]), answer).parsed


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("b)", "B"),
        ("[B]", "B"),
        ("Ｂ", "B"),
        ("（B）", "B"),
        ("**B**", "B"),
        ("\\boxed{B}", "B"),
        ("<think>A looks right, or C?</think>\nB", "B"),
        ("<think>So the answer is B", None),
        ("<answer>B</answer>", "B"),
        ('"B"', "B"),
        ("'b'", "B"),
        ("e.g. B", None),
        ("E", None),
        ("", None),
        ("  \n", None),
    ],
)
def test_a_letter_alone(answer: str, letter: str | None) -> None:
    assert parsed(ORGANS, answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A. Liver", "A"),
        ("A.Liver", "A"),
        ("A: Liver", "A"),
        ("a. liver", "A"),
        ("(A) Liver", "A"),
        ("A Liver", "A"),
        ("A\n\nThe liver is seen.", "A"),
        ("B, because it is aerated", "B"),
        ("A. The liver is shown", "A"),
        ("A. Lung", None),
        ("B. Lung. The answer is C.", None),
        ("A. Liver\nB. Lung\nC. Kidney\nD. Spleen", None),
    ],
)
def test_a_letter_before_text(answer: str, letter: str | None) -> None:
    assert parsed(ORGANS, answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is (B).", "B"),
        ("The correct answer is **B**. Here's why: A is a gland.", "B"),
        ("Answer: C", "C"),
        ("answer is c.", "C"),
        ("The answer is B. Lung", "B"),
        ("The answer is lung", "B"),
        ("Option C is correct", "C"),
        ("A is right", "A"),
        ("The answer is A because it is large", "A"),
        ("C is the correct answer.", "C"),
        ("I would choose option B", "B"),
        ("I'd say A", "A"),
        ("It's A", "A"),
        ("The best choice is A because the image shows the liver, not the spleen.", "A"),
        ("Looking at the image, the answer is A", "A"),
        ("Let me think. Liver is plausible, lung too.\nB", "B"),
        ("答案是B", "B"),
        ("答案：C。", "C"),
        ("选D", "D"),
        ("应选择 B 选项", "B"),
        ("正确答案为(A)", "A"),
        ("B是正确的", "B"),
        ("The answer is not A, it is B", "B"),
        ("不是A，是B", "B"),
        ("不选A，选B", "B"),
        ("选A错误，选C", "C"),
        ("A is incorrect. The answer is D.", "D"),
        ("The answer is not A", None),
        ("It is not A", None),
        ("The answer is B (liver)", None),
        ("The answer is A lung", None),
        ("The answer is a large mass in the liver", "A"),
        ("Hepatitis B", None),
        ("Hepatitis B is most likely", None),
        ("A 45-year-old man with a cough", None),
        ("I don't know", None),
    ],
)
def test_a_declared_letter(answer: str, letter: str | None) -> None:
    assert parsed(ORGANS, answer) == letter


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        # answers of real models, from MMMU's and MMMU-Pro's own repository
        (("B", "C", "D", "A"), "C. D", "C"),
        (("(A) = 1 D, (B) = 2 D", "(A) = 2 D, (B) = 1 D"), "B. (A) = 2 D, (B) = 1 D", "B"),
        (ORGANS, "(a) The preload is 7522 lb. (b) The force is 1643 lb.", None),
        (
            ORGANS,
            "Let's examine each option:\n\nA. Liver - No.\n\nB. Lung - Yes.\n\nAnswer: B",
            "B",
        ),
        (ORGANS, "so I think it is hard.\n\nAnswer: D", "D"),
        (ORGANS, "D is most likely extinct. The answer is (C).", "C"),
        (ORGANS, "The correct choice is C.\n\nAnswer: A", None),
        (("True", "False"), "False. \n\nThe chromatic scale beginning on B is wrong.", "B"),
        (
            ("A", "B", "C", "D", "E", "F", "G", "H", "I"),
            "We have it way too stressed, so I don't know.\nAnswer: E",
            "E",
        ),
    ],
)
def test_what_real_models_say(options: tuple[str, ...], answer: str, letter: str | None) -> None:
    assert parsed(options, answer) == letter


@pytest.mark.parametrize(
    "answer",
    [
        "A and B",
        "A, B",
        "A or B",
        "Both A and C are correct",
        "The answer is A or B",
        "Answer: A and B",
        "The answer is A. The answer is B.",
        "答案是A和B",
        "liver and kidney",
    ],
)
def test_two_options_are_never_one(answer: str) -> None:
    assert SCORERS["choice"].score(question(ORGANS, "Liver"), answer) == Score(0.0, None)


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (SCANS, "MR angiography", "B"),
        (SCANS, "MR", "A"),
        (SCANS, "mr ANGIOGRAPHY.", "B"),
        (SCANS, "This is an MR angiography image.", "B"),
        (SCANS, "It is an MR image", "A"),
        (SCANS, "MR and CT", None),
        (COUNTS, "12", "C"),
        (COUNTS, "2", "A"),
        (COUNTS, "two", "A"),
        (COUNTS, "2.0", "A"),
        (COUNTS, "There are 12 lesions", "C"),
        (COUNTS, "2.5", None),
        (COUNTS, "2.5e3 mm", None),
        (COUNTS, "T2", None),
        (ORGANS, "The image shows the liver.", "A"),
        (ORGANS, "not the liver", None),
        (ORGANS, "It is not the liver but the kidney", "C"),
        (ORGANS, "It is the lung rather than the liver", "B"),
        (ORGANS, "A large mass is seen in the kidney", "C"),
        (("Yes", "No"), "No, there is none", "B"),
        (("Yes", "No"), "Yes and no", None),
        (("Yes", "No"), "No mass is seen", None),
        (("Yes", "No"), "The answer is yes", "A"),
        (("yes", "no"), "B. no", "B"),
        (("No abnormality", "Pneumonia"), "There is no abnormality seen", "A"),
        (("No abnormality", "Pneumonia"), "no abnormality and pneumonia", None),
        (("Pneumonia", "No pneumonia"), "no pneumonia is seen", "B"),
        (("None", "NA", "Mild", "Severe"), "None", "A"),
        (("None", "NA", "Mild", "Severe"), "NA", "B"),
        (("t1", "T1"), "T1", "B"),
        (("E. coli", "S. aureus"), "S. aureus", "B"),
        (("E. coli", "S. aureus"), "The culture shows E. coli.", "A"),
        (("removal of the spleen", "biopsy"), "It shows removal of spleen", "A"),
        (LUNGS, "是肺。", "A"),
        (LUNGS, "图中是肝的影像", "B"),
        (LUNGS, "肺炎", None),
        (LUNGS, "不是肺，是肝", "B"),
    ],
)
def test_the_text_of_an_option(options: tuple[str, ...], answer: str, letter: str | None) -> None:
    assert parsed(options, answer) == letter


def test_a_mere_mention_counts_in_short_answers_only() -> None:
    assert parsed(ORGANS, "The kidney " + "is seen " * 15) == "C"
    assert parsed(ORGANS, "The kidney " + "is seen " * 30) is None
    assert parsed(ORGANS, "It is seen " * 30 + "The answer is kidney") == "C"


def test_letters_alone_and_texts_alone() -> None:
    assert parsed(ORGANS, "B", "option_letter") == "B"
    assert parsed(ORGANS, "Lung", "option_letter") is None
    assert parsed(ORGANS, "Lung", "option_text") == "B"
    assert parsed(ORGANS, "B", "option_text") is None


def test_the_letters_of_the_file() -> None:
    """Option C is missing in the file, D stays D."""
    gaps = question(("Liver", "Lung", "Spleen"), "Spleen", letters="ABD")
    assert SCORERS["choice"].score(gaps, "D") == Score(1.0, "D")
    assert SCORERS["choice"].score(gaps, "C") == Score(0.0, None)


def test_either_of_two_options_that_read_the_same_is_right() -> None:
    twice = question(("CT", "MR", "CT"), "CT")
    assert SCORERS["choice"].score(twice, "A") == Score(1.0, "A")
    assert SCORERS["choice"].score(twice, "C") == Score(1.0, "C")
    assert SCORERS["choice"].score(twice, "CT") == Score(1.0, "A")


def test_a_gold_answer_that_is_no_option_makes_every_answer_wrong() -> None:
    """The HuatuoGPT-Vision collection writes "?" there."""
    assert SCORERS["choice"].score(question(ORGANS, "?"), "A") == Score(0.0, "A")


def test_without_a_gold_answer_the_choice_is_kept() -> None:
    assert SCORERS["choice"].score(question(ORGANS), "A. Liver") == Score(None, "A")
    assert SCORERS["choice"].score(question(ORGANS), "A or B") == Score(None, None)


def test_it_is_for_questions_with_options() -> None:
    assert SCORERS["choice"].applies(question(ORGANS))
    assert not SCORERS["choice"].applies(Question("1", "?"))
