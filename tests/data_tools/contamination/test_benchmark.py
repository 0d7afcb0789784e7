# SPDX-License-Identifier: Apache-2.0

"""Benchmarks in the shapes that their authors ship, read without knowing which they are."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.contamination import rows as columns
from data_tools.contamination.benchmark import Benchmark
from data_tools.contamination.hashing import ImageSource
from gmai_xtuner.core.errors import CorpusError, DataError
from tests.data_tools.contamination.sides import (
    as_base64,
    as_bytes,
    picture,
    write_lines,
    write_tsv,
)


def read(path: Path, **options) -> tuple[Benchmark, list[ImageSource]]:
    benchmark = Benchmark(path, **options)
    return benchmark, list(benchmark.read())


def test_slake_and_its_training_part(tmp_path: Path) -> None:
    (tmp_path / "imgs" / "xmlab1").mkdir(parents=True)
    picture(0).save(tmp_path / "imgs" / "xmlab1" / "source.jpg")
    picture(1).save(tmp_path / "imgs" / "xmlab1" / "mask.png")
    row = {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "在哪？",
        "answer": "左",
        "qid": 7,
    }
    for name in ("test", "train"):
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    benchmark, pictures = read(tmp_path)
    assert [one.source for one in pictures] == [tmp_path / "imgs" / "xmlab1" / "source.jpg"]
    assert benchmark.files == {"test.json": 1, "train.json": 1}
    assert any(
        "train.json looks like the benchmark's training part" in note for note in benchmark.notes
    )
    assert benchmark.unnamed == 1
    alone, _ = read(tmp_path, only=["test*"])
    assert alone.files == {"test.json": 1}
    assert alone.notes == []
    assert (alone.items[0].id, alone.items[0].texts, alone.items[0].answer) == (
        "7",
        ("在哪？",),
        "左",
    )
    with pytest.raises(CorpusError, match=r"no question file of .* fits --only valid\.json"):
        read(tmp_path, only=["valid.json"])


def test_a_vlmevalkit_table_with_references_to_another_rows_picture(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    one, other = (as_base64(tmp_path / name) for name in ("a.png", "b.png"))
    rows = [
        {"index": 3, "image": "5", "question": "What?", "A": "left", "B": "right", "answer": "B"},
        {"index": 5, "image": one, "question": "Where?", "A": "l", "B": "r", "answer": "A"},
        {"index": 6, "image": "5", "question": "Why?", "A": "l", "B": "r", "answer": "A"},
        {"index": 7, "image": other, "question": "How?", "A": "l", "B": "", "answer": "A"},
        {"index": 8, "image": "99", "question": "Who?", "A": "l", "B": "", "answer": "A"},
    ]  # fmt: skip
    write_tsv(tmp_path / "bench.tsv", rows)
    benchmark, pictures = read(tmp_path / "bench.tsv")
    assert len(pictures) == 2
    assert all(isinstance(one.source, bytes) for one in pictures)
    assert [item.images for item in benchmark.items] == [(0,), (0,), (0,), (1,), ()]
    assert benchmark.not_found == [("99", "bench.tsv: no row has this index")]
    assert benchmark.items[0].texts == ("What?", "What? A. left B. right")
    assert benchmark.items[0].answer == "right"


def test_parquet_with_pictures_inside_and_options_as_text(tmp_path: Path) -> None:
    rows = {
        "id": ["a", "b"],
        "question": ["See <image 1>?", "And?"],
        "options": ["['T1', 'T2']", "['no', \"it's\"]"],
        "answer": ["A", "B"],
        "image_1": [
            {"bytes": as_bytes(picture(0)), "path": "x.png"},
            {"bytes": as_bytes(picture(0)), "path": "y.png"},
        ],
        "image_2": [{"bytes": as_bytes(picture(1)), "path": None}, None],
    }
    pq.write_table(pa.table(rows), tmp_path / "val.parquet")
    benchmark, pictures = read(tmp_path)
    assert len(pictures) == 2  # the same bytes are one picture
    assert [item.images for item in benchmark.items] == [(0, 1), (0,)]
    assert [item.answer for item in benchmark.items] == ["T1", "it's"]


def test_pmc_vqa_omnimedvqa_huatuo_and_vqa_rad(tmp_path: Path) -> None:
    (tmp_path / "deep" / "figures").mkdir(parents=True)
    picture(0).save(tmp_path / "deep" / "figures" / "PMC1_F2.jpg")
    (tmp_path / "test_clean.csv").write_text(
        "Figure_path,Question,Answer,Choice A,Choice B,Answer_label\n"
        "PMC1_F2.jpg,What is it?,Lung,A:Liver,B:Lung,B\n"
    )
    (tmp_path / "omni.json").write_text(json.dumps([{
        "dataset": "d", "question_id": "q", "question": "Which?", "gt_answer": "CT",
        "image_path": "deep/figures/PMC1_F2.jpg", "option_A": "MR", "option_B": "CT",
    }]))  # fmt: skip
    (tmp_path / "huatuo.json").write_text(json.dumps({"SLAKE_test": [{
        "question": "Is it?", "options": ["yes", "no"], "answer": "no", "image": ["PMC1_F2.jpg"],
    }]}))  # fmt: skip
    (tmp_path / "rad.json").write_text(json.dumps([
        {"qid": 1, "image_name": "synpic1.jpg", "question": "A b c?", "question_rephrase": "C b a?",
         "phrase_type": "freeform", "answer": 3},
        {"qid": 2, "image_name": "PMC1_F2.jpg", "question": "A b c?", "question_rephrase": "NULL",
         "phrase_type": "test_freeform", "answer": "x"},
    ]))  # fmt: skip
    benchmark, pictures = read(tmp_path)
    assert benchmark.files == {"huatuo.json": 1, "omni.json": 1, "rad.json": 2, "test_clean.csv": 1}
    assert len(pictures) == 1
    assert benchmark.not_found == [("synpic1.jpg", "no such file")]
    told = {item.file: item for item in benchmark.items}
    assert told["test_clean.csv"].texts[1] == "What is it? A. Liver B. Lung"
    assert told["test_clean.csv"].answer == "Lung"
    assert told["omni.json"].answer == "CT"
    assert told["huatuo.json"].images == (0,)
    assert any(
        "rad.json holds several parts (freeform, test_freeform)" in note for note in benchmark.notes
    )
    assert any(
        note.endswith("--where, such as --where phrase_type=test_freeform.")
        for note in benchmark.notes
    )
    tested, _ = read(tmp_path, where={"phrase_type": "test_*"}, only=["rad.json"])
    assert [item.id for item in tested.items] == ["2"]
    assert tested.left_out == 1
    assert tested.items[0].texts == ("A b c?",)


def test_conversations_as_a_benchmark(tmp_path: Path) -> None:
    record = {
        "id": 1,
        "conversations": [
            {"from": "human", "value": "<image>\nWhere?"},
            {"from": "gpt", "value": "x"},
        ],
    }
    write_lines(tmp_path / "b.jsonl", [record])
    benchmark, _ = read(tmp_path)
    assert benchmark.items[0].texts == ("<image>\nWhere?",)


def test_a_name_that_two_files_bear_is_not_guessed(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture(0).save(tmp_path / folder / "a.png")
    (tmp_path / "q.csv").write_text("question,image\nWhat?,a.png\nWhere?,two/a.png\n")
    benchmark, pictures = read(tmp_path)
    assert benchmark.not_found == [("a.png", "2 files have this name")]
    assert [one.source for one in pictures] == [tmp_path / "two" / "a.png"]


def test_a_damaged_question_file_is_an_error_and_a_settings_file_is_passed_over(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "q.jsonl").write_text('{"question": "What?"}\n{"question": \n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 2: not valid JSON"):
        read(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question": "What?"}\n')
    assert dict(read(tmp_path)[0].passed_over)["config.json"].startswith("no column of questions")


def test_a_row_with_another_number_of_cells_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("question,answer\nWhat?,lung\nIs it left, or right?,left\n")
    with pytest.raises(CorpusError, match=r"q\.csv, line 3: 3 cells, the header has 2"):
        read(tmp_path)
    (tmp_path / "q.csv").write_text("question,answer,answer\nWhat?,lung,liver\n")
    with pytest.raises(CorpusError, match=r"q\.csv has two columns of one name"):
        read(tmp_path / "q.csv")


def test_names_of_columns() -> None:
    assert columns.plain("Figure_path") == columns.plain("figure path") == "figurepath"
    assert columns.options({"choicea": " A:Liver ", "choiceb": "B. Lung"}) == {
        "A": "Liver",
        "B": "Lung",
    }
    assert columns.options({"options": {"A": "x", "B": None}}) == {"A": "x"}
