# SPDX-License-Identifier: Apache-2.0

"""Nearness of questions, with values computed by hand, and what is noted of a conversation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.contamination.benchmark import Item
from data_tools.contamination.questions import Questions, TextIndex, grams, normalised
from gmai_xtuner.core.conversation import Conversation, Turn

QUESTION = "Which organ is enlarged in this patient?"


def item(answer: str, images: tuple[int, ...] = ()) -> Item:
    return Item("test.jsonl", 1, "1", (QUESTION,), answer, images, "")


def looked_at(found: Item, answer: str, *, images: frozenset[int] = frozenset()) -> Questions:
    questions = Questions([found], threshold=0.5)
    turns = (Turn("system", "Be brief."), Turn("user", QUESTION), Turn("assistant", answer))
    names = tuple(f"{number}.png" for number in images)
    questions.look_at(0, "chest", Conversation("a", turns, names), images)
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


def test_question_and_answer_are_the_whole_of_an_item_only_without_an_image() -> None:
    assert looked_at(item("Liver", images=(3,)), "liver").whole == []
    # An item of text alone, which a conversation about an image doesn't give away whole.
    assert looked_at(item("Liver"), "liver", images=frozenset({3})).whole == []
    seen = looked_at(item("Liver", images=(3,)), "liver", images=frozenset({3}))
    assert seen.whole == []
    assert seen.both[0].same_picture
    assert not looked_at(item("Liver", images=(3,)), "liver", images=frozenset({4})).both


# --- texts --------------------------------------------------------------------------------------


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Is there a  Pleural effusion?", "is there a pleural effusion"),
        ("<image>\nIs it <image 2> left-sided?", "is it left sided"),
        ("Ｔ２ weighted: ﬁne", "t2 weighted fine"),
        ("肝脏在哪里？", "肝 脏 在 哪 里"),
        ("CT显示T2高信号吗", "ct 显 示 t2 高 信 号 吗"),
        ("3.5 cm", "3 5 cm"),
        ("?!", ""),
    ],
)
def test_what_counts_of_a_text(text: str, same: str) -> None:
    assert normalised(text) == same


def test_grams_are_of_three_words_or_the_whole() -> None:
    assert grams("is there a pleural effusion") == {
        "is there a", "there a pleural", "a pleural effusion",
    }  # fmt: skip
    assert grams("肝 脏 在 哪 里") == {"肝 脏 在", "脏 在 哪", "在 哪 里"}
    assert grams("why not") == {"why not"}
    assert grams("") == frozenset()


def test_near_from_the_threshold_on() -> None:
    texts = [
        normalised(text) for text in ("Is there a pleural effusion here?", "Where is the heart?")
    ]
    asked = normalised("Is there a pleural effusion?")  # 3 of 4: 0.75
    assert TextIndex(texts).near(asked) == [(0, 0.75)]
    assert TextIndex(texts, threshold=0.75).near(asked) == [(0, 0.75)]
    assert TextIndex(texts, threshold=0.76).near(asked) == []
    assert TextIndex(texts).equal(normalised("WHERE is the heart")) == 1
    assert TextIndex(texts).equal(asked) is None
    assert TextIndex(texts).near("") == []


WORDS = ("is", "there", "a", "the", "left", "right", "lung", "mass", "in", "of")


@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), min_size=1, max_size=25),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=9),
    st.sampled_from([0.2, 0.3, 0.5, 0.7, 0.9, 1.0]),
)
def test_the_index_finds_what_comparing_with_all_finds(texts, asked, threshold) -> None:
    known = list(dict.fromkeys(" ".join(text) for text in texts))
    text = " ".join(asked)
    told = {
        number: jaccard(grams(text), grams(other))
        for number, other in enumerate(known)
        if jaccard(grams(text), grams(other)) >= threshold - 1e-12
    }
    assert dict(TextIndex(known, threshold=threshold).near(text)) == pytest.approx(told)
