# SPDX-License-Identifier: Apache-2.0

"""Each check by itself, on the smallest conversation that shows it."""

import dataclasses

import pytest

from data_tools import taxonomy
from data_tools.checks import LEAKS, REFUSALS, CheckOptions, check, check_translation
from data_tools.checks.terms import TermFinder, words_of
from data_tools.items import Item, SourceContext, Task, Turn
from data_tools.records import Label, Provenance, Record

TAXONOMY = taxonomy.load()
CONTEXT = SourceContext(
    "blood", "Blood", ("platelet", "red blood cell", "white blood cell"),
    {"white blood cell": ("leukocyte",)}, {"platelet": "血小板", "red blood cell": "红细胞"},
)  # fmt: skip
RECORD = Record(
    "2d#det#x", "images/x.png", 1000, 500, "Microscopy", "Hematology", None, "2D detection",
    (Label("platelet", (100, 50, 200, 100)), Label("red blood cell", (500, 250, 1000, 500))), {},
    Provenance("blood", "Blood", "MIT", "", "x.png", "0" * 64, {}, "blood/x"),
)  # fmt: skip
ASKED = "<image>\nDescribe this image."
GOOD = "A platelet lies near red blood cells under the microscope."


def reasons(
    *texts, form="caption", language="en", focus=None, options=None, grounded=True, record=RECORD
):
    turns = tuple(Turn(("human", "gpt")[at % 2], text) for at, text in enumerate(texts))
    task = Task(Item(f"{RECORD.id}#{form}", form, language, focus=focus), record, CONTEXT)
    problems = check(turns, task, TAXONOMY, options or CheckOptions(), grounded=grounded)
    return [problem.reason for problem in problems]


def test_a_good_caption_is_accepted():
    assert reasons(ASKED, GOOD) == []


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ((), "turns don't alternate"),
        ((ASKED,), "turns don't alternate"),
        ((ASKED, GOOD, "And?"), "turns don't alternate"),
        ((ASKED, "  "), "empty turn"),
        (("<image>", GOOD), "empty turn"),
        (("Describe this image.", GOOD), "wrong number of image marks"),
        (("<image>\n<image>\nDescribe.", GOOD), "wrong number of image marks"),
        (("Describe\n<image>", GOOD), "image mark isn't first"),
        ((ASKED, "A platelet."), "answer too short"),
        ((ASKED, GOOD + " word" * 400), "answer too long"),
        ((ASKED, "图像中可见血小板和红细胞，染色清晰。"), "wrong language"),
        ((ASKED, f"{GOOD} {GOOD}"), "sentence repeated"),
        ((ASKED, f"{GOOD} The bounding box is small."), "speaks of the annotation"),
        ((ASKED, f"According to the annotation, {GOOD}"), "speaks of the annotation"),
        ((ASKED, f"{GOOD} I’m sorry, no more."), "the model refused"),
        ((ASKED, "Nothing of note is in this field."), "label not named"),
        ((ASKED, f"{GOOD} A leukocyte is near."), "another label claimed"),
        ((ASKED, f"{GOOD} It is an ultrasound."), "another modality claimed"),
        ((ASKED, f"{GOOD} It lies at [1, 2, 3, 4]."), "coordinates are not the region's"),
        ((ASKED, f"{GOOD} It lies at [10, 2, 3, 4]."), "coordinates make no box"),
    ],
)
def test_reason(texts, reason):
    assert reason in reasons(*texts)


PLATELET, REGION = (
    "The platelet lies at [{}] in this field.",
    {"form": "region_caption", "focus": 0},
)
FILLS = "Red blood cells fill this part of the field."


@pytest.mark.parametrize(
    ("texts", "keys", "expected"),
    [
        ((ASKED, f"{GOOD} It lies at [100, 100, 200, 200]."), {}, []),
        ((ASKED, PLATELET.format("100, 100, 200, 200")), REGION, []),
        (
            (ASKED, PLATELET.format("500, 500, 1000, 1000")),
            REGION,
            ["coordinates are not the region's"],
        ),
        # a region has to be named itself
        ((ASKED, FILLS), REGION, ["label not named"]),
        ((ASKED, FILLS), REGION | {"focus": 1}, []),
        # an option's letter is enough for perception, and a wrong one claims
        (("<image>\nWhich? A. platelet B. white blood cell", "A"), {"form": "perception"}, []),
        (("<image>\nIs there a white blood cell?", "No."), {"form": "perception"}, []),
        (
            ("<image>\nWhich cell?", "white blood cell"),
            {"form": "perception"},
            ["another label claimed"],
        ),
        (("What is a platelet?", "A platelet is a small cell part."), {"form": "text_single"}, []),
        (("<image>\nWhat?", GOOD), {"form": "text_single"}, ["wrong number of image marks"]),
    ],
)
def test_what_a_form_wants(texts, keys, expected):
    assert reasons(*texts, **keys) == expected


def test_without_the_annotation_only_the_wording_decides():
    text = "An ultrasound of a leukocyte at [1, 2, 3, 4] is shown."
    assert reasons(ASKED, text, grounded=False) == []
    assert reasons(ASKED, f"{text} The bounding box is small.", grounded=False) == [
        "speaks of the annotation"
    ]


@pytest.mark.parametrize("name", ["agreement", "modality", "boxes", "leaks"])
def test_each_check_can_be_switched_off(name):
    text = "The bounding box in this ultrasound at [1, 2, 3, 4] holds a leukocyte."
    everything = reasons(ASKED, text)
    assert len(reasons(ASKED, text, options=CheckOptions(**{name: False}))) < len(everything)


def test_a_record_of_both_sides_is_not_held_to_one():
    sides = {"side": "left"}, {"side": "right"}
    labels = tuple(Label("platelet", None, None, side) for side in sides)
    for known, expected in ((labels, []), (labels[:1], ["side contradicted"])):
        record = dataclasses.replace(RECORD, labels=known)
        text = "A platelet of the right side is shown."
        assert reasons(ASKED, text, record=record) == expected


def test_a_term_within_another_english_word_is_none():
    finder = TermFinder({"CT": "CT", "X光": "X-ray"})
    chinese = finder.find_chinese("行ECT治疗，CTA，CT与X光。")
    assert [hit.meaning for hit in chinese] == ["CT", "X-ray"]
    assert [hit.meaning for hit in finder.find(words_of("An ECT, a CTA, and a CT."))] == ["CT"]


@pytest.mark.parametrize("phrase", LEAKS + REFUSALS)
def test_every_phrase_is_found_in_its_language(phrase):
    expected = "speaks of the annotation" if phrase in LEAKS else "the model refused"
    text = f"{GOOD} {phrase.upper()}." if phrase.isascii() else f"{GOOD}{phrase}。"
    assert expected in reasons(ASKED, text)


def test_phrases_can_be_allowed_and_added():
    text, leak = f"{GOOD} The bounding box is small.", ["speaks of the annotation"]
    assert reasons(ASKED, text, options=CheckOptions(allowed_phrases=("Bounding box",))) == []
    more = CheckOptions(further_leaks=("Under the microscope",))
    assert reasons(ASKED, GOOD, options=more) == leak


ENGLISH = (
    Turn("human", "<image>\nHow many?"),
    Turn("gpt", "Yes, three platelets at [1, 2, 30, 40]; no red blood cell."),
)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("是的，3个血小板位于[1, 2, 30, 40]；未见红细胞。", None),
        ("是的，三个血小板位于[1, 2, 30, 40]；未见红细胞。", None),
        ("是的，4个血小板位于[1, 2, 30, 40]；未见红细胞。", "translation changes a number"),
        ("是的，3个血小板位于[1, 2, 30, 41]；未见红细胞。", "translation changes a number"),
        ("是的，3个血小板位于[1, 2, 30, 40]；可见红细胞。", "translation changes a finding"),
        ("是的，3个位于[1, 2, 30, 40]；未见红细胞。", "translation changes a finding"),
        ("不，3个血小板位于[1, 2, 30, 40]；未见红细胞。", "translation turns yes into no"),
    ],
)
def test_what_a_translation_may_not_lose(answer, reason):
    chinese = (Turn("human", "<image>\n有多少？"), Turn("gpt", answer))
    problems = [problem.reason for problem in check_translation(chinese, ENGLISH, CONTEXT)]
    assert problems == ([reason] if reason else [])


def test_a_translation_has_the_same_turns():
    problems = check_translation(ENGLISH[:1], ENGLISH, CONTEXT)
    assert [problem.reason for problem in problems] == ["translation has other turns"]


def test_the_name_of_a_department_claims_no_modality():
    ct = dataclasses.replace(RECORD, modality="CT")
    told = "A platelet lies near red blood cells. It belongs to {}."
    for name, wrong in (("Laboratory Medicine and Pathology", False), ("pathology", True)):
        found = reasons(ASKED, told.format(name), record=ct)
        assert ("another modality claimed" in found) is wrong


def test_an_irregular_plural_names_its_label():
    (hit,) = TermFinder({"tooth": "tooth"}).find(words_of("Several teeth are visible."))
    assert hit.meaning == "tooth"
