# SPDX-License-Identifier: Apache-2.0

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmai_xtuner.core import members
from gmai_xtuner.core.conversation import Conversation, Turn, parse_raw
from gmai_xtuner.core.errors import DataError
from gmai_xtuner.core.records import RawRecord, iter_raw


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
        (
            "a.json",
            '[{"a": 1},\n{"a": {"b": 1, "b": 2}}]',
            "not_json",
            "the key 'b' is there twice",
        ),
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
    monkeypatch.setattr(members, "_MAX_VALUES", 1_000)
    table = pa.table({"conversations": ["x"] * 1_001, "other": [1] * 1_001})
    pq.write_table(table, tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert "1001 values" in members.large_row_group(file, ["conversations"])
        assert not members.large_row_group(file, ["none"])


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


# --- conversations ---


def llava(*turns, **fields):
    return {"id": "r1", "conversations": [{"from": a, "value": b} for a, b in turns], **fields}


def openai(*turns, **fields):
    return {"id": "r1", "messages": [{"role": a, "content": b} for a, b in turns], **fields}


def parse(record, **keys):
    return parse_raw(RawRecord("line 12", "", record), dataset="d", **keys)


def refused(record) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(record)
    assert caught.value.dataset == "d"
    assert "line 12" in caught.value.record
    assert caught.value.remedy
    return caught.value


def test_llava_form_becomes_turns_and_images_word_for_word():
    record = llava(
        ("human", "<image>\nWhat is seen? "),
        ("gpt", "肺炎。"),
        ("human", "Sure?"),
        ("gpt", "Yes."),
        image="a/b.png",
        width=10,
        height=10,
    )
    assert parse(record) == Conversation(
        "r1",
        (
            Turn("user", "<image>\nWhat is seen? "),
            Turn("assistant", "肺炎。"),
            Turn("user", "Sure?"),
            Turn("assistant", "Yes."),
        ),
        ("a/b.png",),
    )


def test_openai_parts_and_llava_marks_give_the_same_conversation():
    expected = Conversation(
        "r1",
        (
            Turn("system", "Be brief."),
            Turn("user", "<image>\nand\n<image>\nDiffer?"),
            Turn("assistant", "Yes."),
        ),
        ("a.png", "b.png"),
    )
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "and"},
        {"type": "image", "path": "b.png"},
        {"type": "text", "text": "Differ?"},
    ]
    system, answer = ("system", "Be brief."), ("assistant", "Yes.")
    assert parse(openai(system, ("user", parts), answer)) == expected
    question = ("user", "<image>\nand\n<image>\nDiffer?")
    assert parse(openai(system, question, answer, images=["a.png", "b.png"])) == expected
    assert parse(llava(system, question, ("gpt", "Yes."), image=["a.png", "b.png"])) == expected


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png", "image": None},  # as Parquet fills missing keys
    ],
)
def test_every_spelling_of_an_image_part(part):
    conversation = parse(openai(("user", [part]), ("assistant", "An eye.")))
    assert conversation.images == ("a.png",)
    assert conversation.turns[0].text == "<image>"


def test_image_part_without_source_takes_the_listed_image():
    record = openai(("user", [{"type": "image"}]), ("assistant", "An eye."), images=["a.png"])
    assert parse(record).images == ("a.png",)


def test_text_alone_and_null_image():
    for missing in (None, "", float("nan")):
        assert parse(llava(("human", "Hi"), ("gpt", "Hello"), image=missing)).images == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": "x"}, "x"),
        ({"id": 7}, "7"),
        ({"id": 0}, "0"),
        ({"id": None, "question_id": "q"}, "q"),
        ({"id": None}, "line 12"),
    ],
)
def test_ids(fields, expected):
    assert parse(llava(("human", "Hi"), ("gpt", "Hello"), **fields)).id == expected


ANSWER = ("gpt", "Yes.")


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ([1], "not_an_object", "list"),
        ({"id": "r1"}, "empty_conversation", "neither"),
        ({"id": "r1", "conversations": [], "image": None}, "empty_conversation", "empty"),
        ({"conversations": "Hi"}, "bad_turn", "list of turns"),
        ({**llava(("human", "Hi"), ANSWER), "messages": []}, "bad_turn", "conversations and"),
        (llava(("doctor", "Hi"), ANSWER), "unknown_role", "'doctor'"),
        (llava((["human"], "Hi"), ANSWER), "unknown_role", "human"),
        (llava(("human", "Hi")), "bad_turn_order", "no answer"),
        (llava(("human", "Hi"), ("human", "Hi"), ANSWER), "bad_turn_order", "turn 2"),
        (llava(("gpt", "Hi"), ("human", "Hi"), ANSWER), "bad_turn_order", "turn 1"),
        (llava(("system", "Be brief.")), "bad_turn_order", "no answer"),
        (llava(("human", "Hi"), ANSWER, ("system", "x"), ANSWER), "bad_turn_order", "turn 3"),
        (llava(("human", "Hi"), ("gpt", " \n")), "empty_turn", "turn 2"),
        (llava(("human", ""), ANSWER), "empty_turn", "turn 1"),
        (llava(("human", None), ANSWER), "empty_turn", "null"),
        (llava(("human", 3), ANSWER), "bad_turn", "int"),
        (openai(("user", [{"type": "audio"}]), ("assistant", "a")), "bad_turn", "'audio'"),
        (llava(("human", "Hi"), ("gpt", "<image> Yes"), image="a"), "misplaced_image_mark", "2"),
        (llava(("human", "<image><image>"), ANSWER, image="a.png"), "image_count", "2 <image>"),
        (llava(("human", "Hi"), ANSWER, image="a.png"), "image_count", "0 <image>"),
        (llava(("human", "<image>"), ANSWER), "image_count", "0 image(s)"),
        (llava(("human", "<image>"), ANSWER, image=" "), "bad_image", "' '"),
        (llava(("human", "<image>"), ANSWER, image=""), "image_count", "0 image(s)"),
        (llava(("human", "<image>"), ANSWER, image=[None]), "bad_image", "null"),
        (llava(("human", "<image>"), ANSWER, image={"bytes": "x"}), "bad_image", "dict"),
        (llava(("human", "<image>"), ANSWER, image="a\0b"), "bad_image", "\\x00"),
        (llava(("human", "<image>"), ANSWER, image="a", images=["a"]), "bad_image", "both"),
        (llava(("human", "<image>"), ANSWER, image="http://x/a.png"), "remote_image", "http"),
        (llava(("human", "<image>"), ANSWER, image="data:image/png;base64,"), "bad_image", "empty"),
        (llava(("human", "<image>"), ANSWER, image="/etc/a.png"), "path_outside_root", "/etc"),
        (llava(("human", "<image>"), ANSWER, image="../a.png"), "path_outside_root", ".."),
        (llava(("human", "<image>"), ANSWER, image="a/../../b.png"), "path_outside_root", "leaves"),
        (llava(("human", "<image>"), ANSWER, image="C:\\a.png"), "path_outside_root", "leaves"),
        (llava(("human", "<image>"), ANSWER, image="..\\a.png"), "path_outside_root", "leaves"),
        (llava(("human", "Hi \ud83d"), ANSWER), "bad_text", "character 4"),
        (llava(("human", "Hi"), ANSWER, id=True), "bad_id", "True"),
        (llava(("human", "Hi"), ANSWER, id=""), "bad_id", "''"),
    ],
)  # fmt: skip
def test_bad_record_is_one_clear_error(record, reason, words):
    error = refused(record)
    assert error.reason == reason
    assert words in str(error)


def test_count_error_has_both_numbers_and_the_id():
    error = refused(llava(("human", "<image><image><image>"), ANSWER, image=["a", "b"]))
    assert str(error) == (
        "dataset 'd', record r1 (line 12): 3 <image> mark(s) in the text, but 2 image(s). "
        "Write one <image> for each image, where it belongs."
    )


def test_images_listed_and_inside_messages_are_ambiguous():
    part = {"type": "image_url", "image_url": "a.png"}
    error = refused(openai(("user", [part]), ("assistant", "x"), images=["b.png"]))
    assert error.reason == "bad_image"


def test_path_that_stays_inside_its_root_is_kept_normalised():
    record = llava(("human", "<image>"), ANSWER, image="./a/../2d#cls/b c.png")
    assert parse(record).images == ("2d#cls/b c.png",)


def test_an_absolute_path_inside_the_root_is_one_below_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scans")
    record = llava(("human", "<image>?"), ANSWER, image=str(tmp_path / "scans" / "x" / "a.png"))
    for root in ("scans", "link"):  # also where the root is a link to the folder that is named
        found = parse(record, image_root=tmp_path / root)
        assert found.images == ("x/a.png",)
    with pytest.raises(DataError, match="or an absolute one inside of it"):
        parse(record, image_root=tmp_path / "scan")


def test_images_of_a_text_without_marks_stand_first_where_the_mixture_says_so():
    system, turns = ("system", "Be brief."), (("human", "Differ?"), ANSWER)
    record = llava(system, *turns, image=["a.png", "b.png"])
    with pytest.raises(DataError, match="image_marks: first"):
        parse(record)
    found = parse(record, images_first=True)
    assert [turn.text for turn in found.turns] == [
        "Be brief.",
        "<image>\n<image>\nDiffer?",
        ANSWER[1],
    ]
    one_mark = llava(("human", "<image> and?"), ANSWER, image=["a.png", "b.png"])
    with pytest.raises(DataError, match=r"1 <image> mark\(s\) in the text, but 2"):
        parse(one_mark, images_first=True)


@pytest.mark.parametrize(
    "extra",
    [
        {"image_path": "a.png"},
        {"img": ["a/b.JPEG"]},
        {"imageFile": "x.nii.gz"},
        {"inputImages": ["https://x.org/1"]},
        {"picture": {"bytes": "AAAA"}},
        {"image": "", "image_path": "a.png"},
    ],
)
def test_a_key_that_looks_like_the_images_is_asked_about(extra):
    with pytest.raises(DataError, match="would be trained as text alone") as caught:
        parse(llava(("human", "What?"), ANSWER, **extra))
    assert caught.value.reason == "unread_image_key"
    assert parse(llava(("human", "What?"), ANSWER, **{**extra, "image": None})).images == ()


def test_an_image_beside_the_text_of_a_turn_is_asked_about():
    record = llava(("human", "What?"), ANSWER)
    record["conversations"][0]["image"] = "a.png"
    with pytest.raises(DataError, match="'image' is not read there"):
        parse(record)


@pytest.mark.parametrize(
    "extra",
    [
        {"image_id": "17"},
        {"num_images": 2},
        {"imagery": "a.png"},
        {"image_path": None},
        {"source": "a.png"},
    ],
)
def test_other_keys_are_left_alone(extra):
    assert parse(llava(("human", "What?"), ANSWER, **extra)).images == ()


def test_a_column_of_a_table_that_looks_like_the_images_is_asked_about(tmp_path):
    turns = llava(("human", "What?"), ANSWER)["conversations"]
    table = pa.table({"conversations": [turns], "image_path": ["a.png"], "size": [3]})
    pq.write_table(table, tmp_path / "t.parquet")
    (raw,) = iter_raw(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'image_path' is not read there"):
        parse_raw(raw, dataset="d")
