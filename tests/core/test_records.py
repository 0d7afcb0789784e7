# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmai_xtuner.core import records
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import DataError
from gmai_xtuner.core.records import iter_raw


def record(number: int) -> dict:
    turns = [{"from": "human", "value": f"Q{number}?"}, {"from": "gpt", "value": "答"}]
    return {"id": f"r{number}", "conversations": turns}


RECORDS = [record(number) for number in range(3)]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path):
    return [parse_raw(raw, dataset="d") for raw in iter_raw(path, dataset="d")]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_all_file_forms_give_the_same_conversations(tmp_path, indent, mark):
    lines = "\r\n".join(json.dumps(item, ensure_ascii=False) for item in RECORDS)
    list_text = json.dumps(RECORDS, indent=indent, ensure_ascii=False)
    files = [
        write(tmp_path / "a.json", mark + list_text.encode()),
        write(tmp_path / "a.jsonl", mark + lines.encode()),
        write(tmp_path / "a.ndjson", mark + lines.encode() + b"\n\n"),
        tmp_path / "a.parquet",
    ]
    pq.write_table(pa.Table.from_pylist(RECORDS), files[3], row_group_size=2)
    found = [read(file) for file in files]
    assert [conversation.id for conversation in found[0]] == ["r0", "r1", "r2"]
    assert all(other == found[0] for other in found[1:])


def test_places_count_lines_and_positions(tmp_path):
    lines = write(tmp_path / "a.jsonl", '\n{"a": 1}\n  \n{"a": 2}\n')
    assert [(raw.where, raw.default_id) for raw in iter_raw(lines)] == [
        ("a.jsonl, line 2", "a.jsonl:2"),
        ("a.jsonl, line 4", "a.jsonl:4"),
    ]
    text = write(tmp_path / "a.json", '[\n{"a":\n1},\n\n{"a": 2}]')
    assert [(raw.where, raw.default_id, raw.payload) for raw in iter_raw(text)] == [
        ("a.json, record 1 (line 2)", "a.json:1", {"a": 1}),
        ("a.json, record 2 (line 5)", "a.json:2", {"a": 2}),
    ]


BAD_LINES = b'\n{"\xff\n{oops\n{"id": ' + b"1" * 5_000 + b"}\n" + b"[" * 100_000 + b"\n"


def test_one_broken_line_costs_that_line_only(tmp_path):
    good = json.dumps(RECORDS[0]).encode()
    raws = list(iter_raw(write(tmp_path / "a.jsonl", good + BAD_LINES + good)))
    assert len(raws) == 6
    reasons = []
    for raw in raws:
        try:
            parse_raw(raw, dataset="d")
        except DataError as error:
            reasons.append((raw.where, error.reason))
    assert reasons == [
        ("a.jsonl, line 2", "not_utf8"),
        *((f"a.jsonl, line {number}", "not_json") for number in (3, 4, 5)),
    ]


@pytest.mark.parametrize(
    ("name", "data", "reason", "words"),
    [
        ("a.json", '{"id": 1}', "bad_annotation_file", "holds an object"),
        ("a.json", "[]", "bad_annotation_file", "has no record"),
        ("a.json", "", "bad_annotation_file", "has no record"),
        ("a.jsonl", "\n \n", "bad_annotation_file", "has no record"),
        ("a.json", '"x"', "not_json", "a list was expected"),
        ("a.json", '[{"a": 1},\n{"a": }]', "not_json", "line 2, record 2"),
        ("a.json", '[{"a": 1},\n]', "not_json", "line 2, record 2"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "not_json", "line 2"),
        ("a.json", '[{"a": 1}', "not_json", "',' or ']'"),
        ("a.json", "[", "not_json", "line 1"),
        ("a.json", '[{"a": 1}]\n\nx', "not_json", "line 3"),
        ("a.json", "[" + "[" * 200_000, "not_json", "too deeply"),
        ("a.json", '[{"a": 1},\n{"id": ' + "1" * 5_000 + "}]", "not_json", "line 2, record 2"),
        ("a.json", b'[\n\n{"a": "\xff"}]', "not_utf8", "line 3"),
        ("a.json", '[{"a": 1}]'.encode("utf-16"), "not_utf8", "line 1"),
        ("a.csv", "id", "bad_annotation_file", "suffix '.csv'"),
        ("a.parquet", "no parquet", "bad_annotation_file", "Parquet"),
    ],
)
def test_hopeless_file_is_one_clear_error(tmp_path, name, data, reason, words):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        list(iter_raw(path, dataset="d"))
    assert caught.value.reason == reason
    assert caught.value.dataset == "d"
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.remedy


def test_a_parquet_file_of_countless_values_is_refused_by_what_it_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_VALUES", 1_000)
    table = pa.table({"conversations": ["x"] * 1_001, "other": [1] * 1_001})
    pq.write_table(table, tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert "1001 values" in records.large_row_group(file, ["conversations"])
        assert not records.large_row_group(file, ["none"])


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="can't be read"):
        list(iter_raw(tmp_path / "none.jsonl"))


def test_parquet_without_turns_names_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="it has text, label"):
        list(iter_raw(tmp_path / "a.parquet"))


def test_parquet_with_content_parts(tmp_path):
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}, "text": None},
        {"type": "text", "image_url": None, "text": "What?"},
    ]
    rows = [{"messages": [{"role": "user", "content": parts}], "extra": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (raw,) = iter_raw(tmp_path / "a.parquet")
    assert "extra" not in raw.payload
    with pytest.raises(DataError, match="last turn is the user's"):
        parse_raw(raw, dataset="d")


def test_lines_are_streamed(tmp_path):
    path = write(tmp_path / "a.jsonl", (json.dumps({"text": "x" * 1000}) + "\n") * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in iter_raw(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2_000_000 < path.stat().st_size


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES, min_size=1, max_size=5), st.sampled_from([None, 0, 1]))
def test_list_scanner_agrees_with_json(tmp_path_factory, values, indent):
    path = tmp_path_factory.getbasetemp() / "scan.json"
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    assert [raw.payload for raw in iter_raw(path)] == values
