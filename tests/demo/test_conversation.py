# SPDX-License-Identifier: Apache-2.0

"""Which turns and images each model gets."""

import pytest
from PIL import Image

from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.demo.conversation import Session
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.demo.studies import Frames, Limits, View, photograph


def photo(level: int) -> Frames:
    return photograph(Image.new("RGB", (4, 4), (level, 0, 0)))


def session(models=1, **limits) -> Session:
    return Session(models, Limits(**limits))


def ask(one: Session, question: str, *answers: str | None):
    """As the page does it; None is an answer that failed."""
    exchange = one.ask(question)
    one.exchanges.append(exchange)
    for attached in one.tray:
        attached.send = False
    for answer, text in zip(exchange.answers, answers, strict=True):
        answer.text, answer.state = text or "", "failed" if text is None else "done"
    one.finish(exchange)
    return exchange


def levels(images) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in images]


def test_images_go_along_once_and_again_when_they_are_turned():
    one = session()
    volume = one.attach(photo(10))
    one.attach(photo(20))
    ask(one, "What is shown?", "A chest.")
    second = ask(one, "And the heart?", "Normal.")
    assert second.turn.text == "And the heart?"
    volume.turn_to(View(channel=3))
    third = ask(one, "And here?", "The same.")
    turns, images = one.history(0, third)
    assert [turn.text for turn in turns] == [
        "<image>\n<image>\nWhat is shown?",
        "A chest.",
        "And the heart?",
        "Normal.",
        "<image>\nAnd here?",
    ]
    assert levels(images) == [10, 20, 10]
    assert [shown.number for shown in one.seen(third)] == [2, 1]


def test_marks_say_where_images_belong():
    one = session()
    one.attach(photo(10))
    one.attach(photo(20))
    assert one.ask("Is <image> newer than <image>?").turn.text == "Is <image> newer than <image>?"
    with pytest.raises(PageError) as error:
        one.ask("What does <image> show?")
    assert (error.value.key, error.value.values) == ("marks", {"marks": 1, "images": 2})


def test_each_model_hears_its_own_answers():
    one = session(models=2)
    one.attach(photo(10))
    ask(one, "What?", "CT", "MR")
    last = one.ask("Sure?")
    assert [turn.text for turn in one.history(0, last)[0]] == ["<image>\nWhat?", "CT", "Sure?"]
    assert [turn.text for turn in one.history(1, last)[0]] == ["<image>\nWhat?", "MR", "Sure?"]


def test_a_failed_answer_is_no_part_of_it_and_its_image_goes_along_again():
    one = session(models=2)
    attached = one.attach(photo(10))
    ask(one, "What?", "CT", None)
    assert attached.send
    last = one.ask("Again?")
    assert [turn.text for turn in one.history(1, last)[0]] == ["<image>\nAgain?"]
    assert levels(one.history(1, last)[1]) == [10]
    assert levels(one.history(0, last)[1]) == [10, 10]


@pytest.mark.parametrize(
    ("state", "text"), [("stopped", ""), ("stopped", " \n"), ("done", ""), ("failed", "CT")]
)
def test_a_question_without_an_answer_was_not_asked(state, text):
    """Such as one that was stopped in the queue: no empty turn of the assistant goes to the model."""
    one = session()
    attached = one.attach(photo(10))
    exchange = one.ask("What?")
    one.exchanges.append(exchange)
    attached.send, attached.sent = False, True
    exchange.answers[0].state, exchange.answers[0].text = state, text
    one.finish(exchange)
    assert (attached.send, attached.sent) == (True, False)
    turns, images = one.history(0, one.ask("Again?"))
    assert turns == (Turn("user", "<image>\nAgain?"),)
    assert levels(images) == [10]


def test_what_was_said_before_a_stop_stays():
    one = session()
    attached = one.attach(photo(10))
    exchange = ask(one, "What?", "A che")
    exchange.answers[0].state = "stopped"
    one.finish(exchange)
    assert not attached.send
    assert [turn.text for turn in one.history(0, one.ask("Go on"))[0]] == [
        "<image>\nWhat?",
        "A che",
        "Go on",
    ]


def test_a_system_text_comes_first():
    one = session()
    one.settings.system = "You are a radiologist."
    assert one.history(0, one.ask("Hello"))[0] == (
        Turn("system", "You are a radiologist."),
        Turn("user", "Hello"),
    )


def test_the_tray_and_the_question_have_limits():
    one = session(images=2, question_characters=10)
    one.attach(photo(1))
    removed = one.attach(photo(2))
    with pytest.raises(PageError, match="At most 2 images"):
        one.attach(photo(3))
    one.remove(removed.number)
    assert one.attach(photo(3)).number == 3, "numbers are never given twice"
    with pytest.raises(PageError, match="11 characters; at most 10"):
        one.ask("x" * 11)
    with pytest.raises(PageError, match="Write a question"):
        one.ask("  \n")


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", None), ("top_p", 0), ("max_new_tokens", 0), ("seed", -1)],
)
def test_settings_out_of_range_are_refused(name, value):
    one = session()
    setattr(one.settings, name, value)
    with pytest.raises(PageError, match="is expected") as error:
        one.settings.checked()
    assert error.value.values["name"] == name


def test_a_new_conversation_is_about_the_same_images():
    one = session()
    one.attach(photo(10))
    ask(one, "What?", "CT")
    one.restart()
    assert one.ask("What?").images[0].number == 1
    assert not one.exchanges
