# SPDX-License-Identifier: Apache-2.0

"""Answers on disk survive a stop, and are never mixed up with those of another run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.store import Answer, AnswerStore, Identity, Job

IDENTITY = Identity(
    "slake", "en", "sha256:one", "one", {"decoding": "greedy"}, {"test.json": "ab" * 32}
)


def answer(number: int, **changes) -> Answer:
    made = Answer(
        f"q{number}",
        f"What is {number}?\nAnswer, bitte: 中",
        f"answer {number}\nmore ☃",
        0.25,
        "sha256:one",
        "full-1061/1",
        {"decoding": "greedy", "max_new_tokens": 8},
    )
    return replace(made, **changes)


def test_what_was_added_is_read_with_all_it_depends_on(tmp_path):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    with store.writer(0) as first, store.writer(1) as second:
        first([answer(0), answer(1)])
        second([answer(2)])
    found = AnswerStore(tmp_path, IDENTITY).read()
    assert list(found.values()) == [answer(0), answer(1), answer(2)]
    assert found[Job("q1", answer(1).prompt, (), 8, "p/1").key].answer == "answer 1\nmore ☃"
    line = json.loads((tmp_path / "answers-1.jsonl").read_text())
    assert set(line) == set(Answer.__dataclass_fields__)


def test_the_same_question_in_other_words_or_of_another_length_is_another(tmp_path):
    keys = [Job("q", *one, "p/1").key for one in (("a", (), 8), ("b", (), 8), ("a", (), 16))]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_line_that_a_stop_has_cut_off_is_asked_again(tmp_path, cut):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    with store.writer() as write:
        write([answer(0), answer(1)])
    file = tmp_path / "answers-0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert [one.id for one in store.read().values()] == ["q0"]
    with store.writer() as write:
        write([answer(1)])
    assert list(store.read().values()) == [answer(0), answer(1)]


def test_a_damaged_line_is_named(tmp_path):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    (tmp_path / "answers-0.jsonl").write_text('{"id": "q0"}\n')
    with pytest.raises(EvaluationError, match=r"answers-0\.jsonl, line 1 is not an answer"):
        store.read()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "sha256:two"}, 'model: "sha256:one" there, "sha256:two" now'),
        ({"generation": {"decoding": "sampled"}}, '"greedy"} there, {"decoding": "sampled"} now'),
        ({"variant": "zh"}, 'variant: "en" there, "zh" now'),
        ({"source": {"test.json": "cd" * 32}}, "source: "),
    ],
)
def test_a_store_of_another_run_is_refused(tmp_path, changes, told):
    AnswerStore(tmp_path, IDENTITY).create()
    with pytest.raises(EvaluationError) as caught:
        AnswerStore(tmp_path, replace(IDENTITY, **changes))
    assert told in str(caught.value)
    assert "Give another --out" in str(caught.value)


def test_the_same_weights_under_another_name_go_on(tmp_path):
    AnswerStore(tmp_path, IDENTITY).create()
    AnswerStore(tmp_path, replace(IDENTITY, model_name="elsewhere"))


def test_answers_of_nobody_are_refused(tmp_path):
    (tmp_path / "answers-0.jsonl").write_text("")
    with pytest.raises(EvaluationError, match=r"has answers but no run\.json"):
        AnswerStore(tmp_path, IDENTITY)


def test_a_file_of_another_model_put_among_them_is_found(tmp_path):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    with store.writer(3) as write:
        write([answer(0, model="sha256:two")])
    with pytest.raises(EvaluationError, match="Answers of several models were put together"):
        store.read()


def test_two_runs_do_not_write_to_one_store(tmp_path):
    store, other = AnswerStore(tmp_path, IDENTITY), AnswerStore(tmp_path, IDENTITY)
    with (
        store.locked(),
        pytest.raises(EvaluationError, match="another evaluation writes to"),
        other.locked(),
    ):
        pass
    with other.locked():
        pass
