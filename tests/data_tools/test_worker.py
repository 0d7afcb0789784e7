"""What a worker makes of a record."""

from __future__ import annotations

import pickle

import msgspec

from data_tools.checks import CheckOptions
from data_tools.forms import MakeOptions
from data_tools.items import Conversation, SourceContext
from data_tools.store import StoredRecord, encode
from data_tools.worker import Recipe, make
from tests.data_tools.forms.test_forms import Label, record


def written(of, seed: int, **forms: float) -> list[tuple[str, Conversation]]:
    none = dict.fromkeys(
        ("caption", "region_caption", "instruction", "dialogue", "perception", "text_single", "text_multi"), 0
    )  # fmt: skip
    context = SourceContext("toy", "Toy", ("edema", "nodule"))
    recipe = Recipe(
        MakeOptions(**none | {"chinese": 0} | forms), CheckOptions(), seed, None, context, None
    )
    (items,) = make(pickle.dumps(recipe), [StoredRecord(of.id, encode(of))])
    return [
        (item.suffix, msgspec.json.decode(item.conversation, type=Conversation)) for item in items
    ]


def test_no_two_conversations_of_a_record_are_the_same():
    of = record(Label("edema"))
    for seed in range(30):
        found = written(of, seed, caption=4, instruction=4, dialogue=3)
        assert len({made for _, made in found}) == len(found) == 11
    assert written(of, 0, caption=4) == written(of, 0, caption=4)


def test_what_has_no_other_words_is_made_once():
    """Two wordings of the one fact: a third would be one of them again."""
    found = written(record(Label("edema"), department="None"), 0, text_single=9)
    texts = [made for _, made in found]
    assert len(set(texts)) == len(texts) == 2
