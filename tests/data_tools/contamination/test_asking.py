from __future__ import annotations

import pytest

from data_tools.contamination.asking import Questions
from data_tools.contamination.benchmark import Item
from data_tools.contamination.records import Conversation, Turn

QUESTION = "Which organ is enlarged in this patient?"


def item(answer: str, images: tuple[int, ...] = ()) -> Item:
    return Item("test.jsonl", 1, "1", (QUESTION,), answer, images, "")


def looked_at(found: Item, answer: str, *, pictures: frozenset[int] = frozenset()) -> Questions:
    questions = Questions([found], threshold=0.5)
    images = tuple(f"{number}.png" for number in pictures)
    conversation = Conversation("a", (Turn(QUESTION, answer),), images, 0)
    questions.look_at(0, "chest", conversation, pictures)
    return questions


@pytest.mark.parametrize(
    ("answer", "said", "same"),
    [
        ("Liver", "the liver", False),
        ("Liver", "LIVER.", True),
        ("Liver", "spleen", False),
        ("", "", False),  # neither is answered: that is no answer given away
        ("Liver", "", False),
        ("", "liver", False),
    ],
)
def test_answered_alike(answer: str, said: str, same: bool) -> None:
    questions = looked_at(item(answer), said)
    (hits,) = questions.hits.values()
    (example,) = hits.examples
    assert (hits.equal, example.jaccard, example.same_answer) == (1, 1.0, same)
    assert questions.whole == ([(0, "a")] if same else [])


def test_question_and_answer_are_the_whole_of_an_item_only_without_a_picture() -> None:
    assert looked_at(item("Liver", images=(3,)), "liver").whole == []
    # An item of text alone, which a conversation about a picture doesn't give away whole.
    assert looked_at(item("Liver"), "liver", pictures=frozenset({3})).whole == []
    seen = looked_at(item("Liver", images=(3,)), "liver", pictures=frozenset({3}))
    assert seen.whole == []
    assert seen.both[0].same_picture
    assert not looked_at(item("Liver", images=(3,)), "liver", pictures=frozenset({4})).both
