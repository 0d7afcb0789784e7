# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from data_tools.items import FORMS, Problem
from data_tools.output.files import CorpusFiles, conversation_line, rejected_line
from data_tools.records import Label
from data_tools.store import StoredConversation
from gmai_xtuner.core.errors import CorpusError
from tests.data_tools.output.fake_store import item, kept, record, rejected

ODD = 'quote " slash \\ line\nbreak tab\t 中文 \u202e\u2028 é \x00 𝄞'


def test_a_conversation_has_the_authors_keys_and_nothing_else():
    line = conversation_line(kept(record(7), "caption"))
    assert line == {
        "id": "2d#det#microscopy#blood#cell_7.png#caption",
        "image": "images/07/blood_7.png",
        "width": 64,
        "height": 48,
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is seen?"},
            {"from": "gpt", "value": "A Microscopy picture that shows red blood cell, platelet."},
        ],
    }
    assert list(conversation_line(kept(record(7), "text_single"))) == ["id", "conversations"]


def test_a_record_says_what_is_known_of_it_with_its_names_and_boxes(tmp_path):
    labels = (Label("a", (0, 0, 1, 1)), Label("a"), Label(ODD, area=0))
    with CorpusFiles(tmp_path) as files:
        files["records.jsonl"].write(record(labels=labels, part={"slice": 40}).to_json())
        files["dropped.jsonl"].write(record(labels=labels[1:]).to_json())
    first, second = (json.loads((tmp_path / name).read_bytes()) for name in files)
    assert first["labels"] == [
        {"name": "a", "box": [0, 0, 1, 1]},
        {"name": "a"},
        {"name": ODD, "area": 0},
    ]
    assert (first["label"], first["bbox"], first["provenance"]["part"]) == (
        ["a", ODD],
        [[0, 0, 1, 1]],
        {"slice": 40},
    )
    assert second["bbox"] is None


def test_forms_and_sides_go_to_their_files(tmp_path):
    with CorpusFiles(tmp_path) as files:
        for number, form in enumerate(FORMS):
            files.write(kept(record(number), form), held_out=False)
        files.write(kept(record(9), "perception"), held_out=True)
    files.write_parquet()
    lines = {name: file["lines"] for name, file in files.contents().items()}
    assert lines == {
        "caption.jsonl": 2,
        "instruct.jsonl": 2,
        "percept.jsonl": 1,
        "text_single.jsonl": 1,
        "text_multi.jsonl": 1,
        "held_out/percept.jsonl": 1,
    }
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert names == set(lines) | {name.replace("jsonl", "parquet") for name in lines}
    for name in lines:
        path = tmp_path / name
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert pq.read_table(path.with_suffix(".parquet")).to_pylist() == rows


def test_odd_texts_come_back_as_they_were(tmp_path):
    with CorpusFiles(tmp_path) as files:
        files.write(kept(record(), answer=ODD), held_out=False)
    (line,) = (tmp_path / "caption.jsonl").read_bytes().splitlines()
    assert json.loads(line)["conversations"][1]["value"] == ODD


def test_a_text_that_is_no_unicode_is_an_error_that_names_it(tmp_path):
    broken = record(id="2d#det#a\udcff.png")
    with (
        CorpusFiles(tmp_path) as files,
        pytest.raises(CorpusError, match=r"caption\.jsonl: .*udcff"),
    ):
        files.write(kept(broken), held_out=False)


def test_a_rejected_answer_keeps_reason_record_prompt_and_answer():
    one = record()
    line = rejected_line(rejected(one, "a refusal", detail="sorry", answer="I'm sorry."))
    assert (line["reason"], line["prompt"], line["answer"]) == (
        "a refusal",
        "Describe it.",
        "I'm sorry.",
    )
    assert line["problems"] == (Problem("a refusal", "sorry"),)
    assert line["record"]["id"] == one.id
    assert line["conversations"] == []


def test_a_rejected_conversation_that_could_be_read_is_kept_beside_the_answer():
    one = kept(record())
    what = item(one.record), one.record
    line = rejected_line(StoredConversation(*what, one.conversation, (Problem("too short"),)))
    assert line["conversations"] == conversation_line(one)["conversations"]
    line = rejected_line(StoredConversation(*what, None))
    assert line["reason"] == "no conversation"
