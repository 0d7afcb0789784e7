# SPDX-License-Identifier: Apache-2.0

"""What a model is told, and what is made of its answers."""

import json

import pytest

from data_tools import taxonomy
from data_tools.checks import CheckOptions
from data_tools.items import FORMS, Item, Problem, SourceContext, Task, Turn
from data_tools.records import Label, Provenance, Record
from data_tools.writers.prompts import Prompts

PROMPTS = {
    grounded: Prompts(CheckOptions(), taxonomy.load(), grounded=grounded)
    for grounded in (True, False)
}
CONTEXT = SourceContext(
    "hospital-a", "Hospital A blood", ("platelet", "red blood cell"), chinese={"platelet": "血小板"},
    known=("platelet", "red blood cell"),
)  # fmt: skip
RECORD = Record(
    "2d#det#microscopy#hospital-a#Doe_John.png", "images/ab/ab.png", 1000, 500, "Microscopy",
    "Hematology", None, "2D detection",
    (Label("platelet", (100, 50, 200, 100)), Label("red blood cell", (500, 250, 1000, 500))),
    {"stain": "Giemsa"},
    Provenance(
        "hospital-a", "Hospital A blood", "MIT", "http://a", "Doe_John.png", "0" * 64, {}, "hospital-a/Doe"
    ),
)  # fmt: skip
read_answer = PROMPTS[True].read_answer
ASKED_OF_A_MODEL = [form for form in FORMS if form != "perception"]


def task(form, language="en", record=RECORD, kind=""):
    focus = 0 if form == "region_caption" else None
    return Task(Item(f"{RECORD.id}#{form}", form, language, kind, focus), record, CONTEXT)


def prompt(form, *, grounded=True, language="en", problems=()):
    return PROMPTS[grounded].build(task(form, language), problems=problems)


@pytest.mark.parametrize("form", ASKED_OF_A_MODEL)
@pytest.mark.parametrize("grounded", [True, False])
def test_nothing_that_tells_whose_picture_it_is(form, grounded):
    asked = prompt(form, grounded=grounded)
    for secret in ("Doe", "Hospital A", "hospital-a", "http://a", "2d#"):
        assert secret not in asked.system + asked.user


@pytest.mark.parametrize("form", ASKED_OF_A_MODEL)
def test_facts_are_in_it_only_when_grounded(form):
    assert "platelet" in prompt(form).user
    assert "Hematology" in prompt(form).user
    blind = prompt(form, grounded=False).user
    assert "platelet" not in blind
    assert "Hematology" not in blind
    assert "Giemsa" not in blind


def test_the_region_is_given_by_words_and_coordinates():
    user = prompt("region_caption").user
    assert "platelet, in the upper left part of the image, at [100, 100, 200, 200]" in user
    assert "red blood cell" not in user
    assert "[100, 100, 200, 200]" in prompt("region_caption", grounded=False).user


def test_only_a_region_may_be_drawn_in_and_text_forms_send_no_picture():
    assert [form for form in ASKED_OF_A_MODEL if prompt(form).box_image] == ["region_caption"]
    assert prompt("caption").image == RECORD.image
    assert prompt("text_single").image is None
    assert "[" not in prompt("text_single").user.split("Write")[0]


def test_chinese_names_are_given():
    assert "platelet (血小板)" in prompt("caption", language="zh").user
    assert "Simplified Chinese" in prompt("caption", language="zh").user


def test_earlier_problems_are_told():
    user = prompt("caption", problems=[Problem("label not named", "it has to name platelet")]).user
    assert "- label not named: it has to name platelet" in user


def test_many_regions_are_counted():
    labels = tuple(Label("platelet", (i, 0, i + 1, 1)) for i in range(30))
    record = Record(
        **{name: getattr(RECORD, name) for name in RECORD.__slots__} | {"labels": labels}
    )
    user = PROMPTS[True].build(task("caption", record=record)).user
    assert user.count("- region: ") == 12
    assert "30 of platelet" in user


@pytest.mark.parametrize("count", [2, 30])
def test_a_model_is_told_of_what_was_left_out(count):
    labels = tuple(Label("platelet", (i, 0, i + 1, 1)) for i in range(count))
    fields = {name: getattr(RECORD, name) for name in RECORD.__slots__}
    record = Record(**fields | {"labels": labels, "incomplete": ("platelet",)})
    user = PROMPTS[True].build(task("caption", record=record)).user
    assert "never say how many" in user
    assert "30 of platelet" not in user
    region = PROMPTS[True].build(task("region_caption", record=record)).user
    assert "how many" not in region


def test_a_caption_is_read_bare_and_fenced():
    text = json.dumps({"caption": "A platelet."})
    for answer in (text, f"```json\n{text}\n```"):
        conversation = read_answer(answer, task("caption"))
        assert conversation == (
            Turn("human", "<image>\nDescribe this image."),
            Turn("gpt", "A platelet."),
        )


def test_a_dialogue_is_read_in_its_order():
    turns = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    conversation = read_answer(json.dumps({"turns": turns}), task("dialogue"))
    assert [turn.text for turn in conversation] == ["<image>\nq0", "a0", "q1", "a1", "q2", "a2"]
    assert read_answer(json.dumps({"turns": turns}), task("text_multi"))[0].text == "q0"


def test_the_region_comes_into_the_question():
    conversation = read_answer('{"caption": "A platelet."}', task("region_caption"))
    asked = "<image>\nDescribe the region [100, 100, 200, 200] of this image."
    assert conversation == (Turn("human", asked), Turn("gpt", "A platelet."))


def test_as_many_turns_as_the_item_says():
    assert "of 5 questions" in PROMPTS[True].build(task("dialogue", kind="5")).user


@pytest.mark.parametrize(
    ("form", "answer", "reason"),
    [
        ("caption", "A platelet.", "answer isn't JSON"),
        ("caption", '{"caption": "A pl', "answer isn't JSON"),
        ("caption", '{"caption": ' + "1" * 5_000 + "}", "answer has another form"),
        ("caption", "[" * 100_000, "answer has another form"),
        ("caption", '{"caption": "A \\ud83d platelet."}', "answer isn't JSON"),
        ("caption", "[1]", "answer has another form"),
        ("caption", "{}", "answer has another form"),
        ("caption", '{"caption": 3}', "answer has another form"),
        ("caption", '{"caption": " "}', "answer has another form"),
        ("caption", '{"caption": "<image> x"}', "answer has an image mark"),
        ("instruction", '{"question": "x"}', "answer has another form"),
        ("dialogue", '{"question": "x", "answer": "y"}', "answer has another form"),
        ("dialogue", '{"turns": []}', "answer has another form"),
        ("dialogue", '{"turns": {"question": "x", "answer": "y"}}', "answer has another form"),
        ("dialogue", '{"turns": ["x"]}', "answer has another form"),
    ],
)
def test_nothing_is_guessed(form, answer, reason):
    assert read_answer(answer, task(form)).reason == reason


def test_a_translation_is_asked_with_the_terms_and_read_as_turns():
    english = (Turn("human", "<image>\nDescribe."), Turn("gpt", "A platelet."))
    asked = PROMPTS[True].translate(english, task("caption", "zh"))
    assert "- platelet: 血小板" in asked.user
    assert "- Microscopy: 显微镜" in asked.user
    assert '{"turns": [{"question": "Describe.", "answer": "A platelet."}]}' in asked.user
    made = read_answer(
        '{"turns": [{"question": "描述。", "answer": "血小板。"}]}', task("caption", "zh")
    )
    assert made == (Turn("human", "<image>\n描述。"), Turn("gpt", "血小板。"))
