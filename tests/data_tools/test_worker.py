# SPDX-License-Identifier: Apache-2.0

"""What a worker makes of a record."""

from __future__ import annotations

import pickle

import msgspec

from data_tools import job as jobs
from data_tools import pipeline
from data_tools.checks import CheckOptions
from data_tools.command import Bar
from data_tools.forms import FORM_VERSIONS, MakeOptions
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
    """Where the wordings are used up, another text would be one of them again."""
    found = written(record(Label("edema"), department="None"), 0, text_single=9)
    texts = [made for _, made in found]
    assert len(set(texts)) == len(texts) <= 9


class Stages(Bar):
    """Notes how many records each stage of making has to do."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.to_make = 0

    def stage(self, name: str, *, total: int | None = None) -> None:
        if name.startswith("making "):
            self.to_make += total or 0


def test_conversations_are_made_again_for_a_new_version_and_for_nothing_else(
    classes, make_job, monkeypatch
):
    job = jobs.load(make_job({}, make={"dialogue": 0}))

    def made() -> int:
        stages = Stages()
        pipeline.run(job, pipeline.Selection(), progress=stages)
        return stages.to_make

    assert (made(), made()) == (6, 0)
    monkeypatch.setitem(FORM_VERSIONS, "caption", 99)
    assert (made(), made()) == (6, 0)
    monkeypatch.setitem(FORM_VERSIONS, "dialogue", 99)  # a form that the job doesn't make
    assert made() == 0
    monkeypatch.setattr(pipeline, "CHECK_VERSION", 99)
    assert (made(), made()) == (6, 0)


def test_answers_are_asked_for_again_for_a_new_version_of_the_prompts_or_checks(
    classes, make_job, monkeypatch
):
    job = jobs.load(make_job({}, writer={"name": "openai", "model": "m"}))
    context = SourceContext("tissue", "Tissue", ("NORM",))

    def answers() -> bytes | None:
        return pipeline.recipe_of(job, context, grounded=True).answers

    found = [answers(), answers()]
    monkeypatch.setattr("data_tools.writers.prompts.PROMPT_VERSION", 99)
    found.append(answers())
    monkeypatch.setattr(pipeline, "CHECK_VERSION", 99)
    found.append(answers())
    assert None not in found
    assert found[0] == found[1]
    assert len(set(found)) == 3
