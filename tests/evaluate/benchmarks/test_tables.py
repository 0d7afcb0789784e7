# SPDX-License-Identifier: Apache-2.0

"""GMAI-MMBench and the tables of VLMEvalKit: images stay in the file until they are asked for."""

import io
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from openpyxl import load_workbook
from PIL import Image

from gmai_xtuner.core.errors import ImageError, Unusable
from gmai_xtuner.evaluate.benchmarks import BenchmarkError, load_benchmark, rows
from gmai_xtuner.evaluate.benchmarks.rows import Base64Image
from gmai_xtuner.evaluate.benchmarks.submission import write_submission
from gmai_xtuner.evaluate.questions import StoredImage, load_image
from tests.evaluate.files import (
    GMAI_HEADER,
    base64_png,
    find_protocol,
    gmai_row,
    gmai_test_part,
    image_file,
    png,
    tsv_file,
)

VLM = ("index", "image", "question", "A", "B", "C", "D", "answer", "category", "split")


def test_gmai_mmbench_val(tmp_path: Path) -> None:
    path = tsv_file(
        tmp_path / "GMAI_mm_bench_VAL.tsv",
        GMAI_HEADER,
        [
            gmai_row(7, 10),
            gmai_row(8, 20, question='A "quoted"\ttab\nand line', answer="C", category="None"),
            gmai_row(9, 30, answer="D", category="NA"),
        ],
    )
    benchmark = load_benchmark("gmai_mmbench", tmp_path)

    first, second, third = benchmark.questions
    assert first.id == "7"
    assert first.options == ("MR", "MR angiography", "None", "NA")
    assert first.answer == "MR angiography"
    assert first.groups == {
        "clinical VQA task": "Disease Diagnosis",
        "department": "Ophthalmology",
        "perceptual granularity": "Image level",
        "modality": "Fundus photography",
    }
    assert second.text == 'A "quoted"\ttab\nand line'
    # options that pandas would read as missing
    assert (second.answer, third.answer) == ("None", "NA")
    assert [load_image(question.images[0]) for question in benchmark.questions] == [
        png(10),
        png(20),
        png(30),
    ]
    assert isinstance(first.images[0], StoredImage)
    assert pickle.loads(pickle.dumps(first)) == first
    assert benchmark.source[0].path == path
    assert benchmark.source[0].size == path.stat().st_size
    assert (
        pd.read_csv(path, sep="\t").image.map(len).min() > 64
    )  # the file is one that pandas reads


def test_images_are_not_in_memory(tmp_path: Path) -> None:
    pixels = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(pixels, "PNG")
    import base64

    text = base64.b64encode(pixels.getvalue()).decode()
    path = tsv_file(
        tmp_path / "GMAI_mm_bench_VAL.tsv",
        GMAI_HEADER,
        [gmai_row(number, image=text) for number in range(30)],
    )
    benchmark = load_benchmark("gmai_mmbench", path)
    held = sum(len(pickle.dumps(question)) for question in benchmark.questions)
    assert path.stat().st_size > 4_000_000
    assert held < 60_000
    assert load_image(benchmark.questions[29].images[0]) == pixels.getvalue()
    assert sys.getsizeof(benchmark.questions[0].images[0]) < 200


def test_gmai_mmbench_test_has_parts_and_no_answers(tmp_path: Path) -> None:
    for part, index in ((10, 3), (2, 2), (1, 1)):
        gmai_test_part(tmp_path, part, index)
    benchmark = load_benchmark("gmai_mmbench", tmp_path, variant="test")
    assert [question.id for question in benchmark.questions] == ["1", "2", "3"]
    assert {question.answer for question in benchmark.questions} == {None}
    # `category` is the gold answer's text and must not reach anyone
    assert "category" not in benchmark.questions[0].groups
    assert benchmark.counted_problems() == {"missing_part": 8}
    asked = find_protocol("gmai_mmbench", variant="test")
    assert asked.score(benchmark.questions[0], "B").value is None


def test_answers_of_the_test_set_are_not_read_even_if_a_file_has_them(tmp_path: Path) -> None:
    tsv_file(tmp_path / "GMAI_mm_bench_TEST_part_1.tsv", GMAI_HEADER, [gmai_row(1)])
    (question,) = load_benchmark("gmai_mmbench", tmp_path, variant="test").questions
    assert question.answer is None


def write_test_parts(folder: Path) -> None:
    for part in range(1, 12):
        gmai_test_part(folder, part, 10 * part, 10 * part + 1)


def test_submission(tmp_path: Path) -> None:
    write_test_parts(tmp_path / "data")
    benchmark = load_benchmark("gmai_mmbench", tmp_path / "data", variant="test")
    answers = {question.id: f"={question.id} is A" for question in benchmark.questions}

    file = write_submission(tmp_path / "out", "my model/7B", benchmark=benchmark, answers=answers)

    assert file == tmp_path / "out" / "my-model-7B_GMAI-MMBench_TEST.xlsx"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file.name]
    table = pd.read_excel(file, dtype=str, keep_default_na=False)
    assert list(table.columns) == [
        *("index", "question", "A", "B", "C", "D", "E", "category", "clinical vqa task"),
        *("department", "perceptual granularity", "modality", "prediction"),
    ]
    assert len(table) == 22
    assert list(table["index"])[:3] == ["10", "11", "20"]
    assert list(table["prediction"])[-1] == "=111 is A"
    assert table["C"].iloc[0] == "None"
    sheet = load_workbook(file).active
    assert {cell.data_type for row in sheet.iter_rows(min_row=2) for cell in row if cell.value} == {
        "s"
    }


def test_a_submission_is_whole_or_not_written(tmp_path: Path) -> None:
    write_test_parts(tmp_path / "data")
    benchmark = load_benchmark("gmai_mmbench", tmp_path / "data", variant="test")
    answers = {question.id: "A" for question in benchmark.questions}

    def refused(message: str, changed: dict[str, str]) -> None:
        with pytest.raises(BenchmarkError, match=message):
            write_submission(tmp_path / "out", "m", benchmark=benchmark, answers=changed)
        assert not (tmp_path / "out").exists()

    refused(
        "1 of 22 questions have no answer, the first is 20",
        {key: value for key, value in answers.items() if key != "20"},
    )
    refused("an Excel cell holds 32767", {**answers, "20": "A" * 40_000})
    refused(r"control character '\\x07'", {**answers, "20": "\a"})
    part = tmp_path / "data" / "GMAI_mm_bench_TEST_part_4.tsv"
    part.write_bytes(part.read_bytes() + b"\n")
    refused("part_4.tsv' has changed", answers)
    part.unlink()
    benchmark = load_benchmark("gmai_mmbench", tmp_path / "data", variant="test")
    refused(r"some can't be asked \(1 missing_part\)", answers)
    tsv_file(tmp_path / "val" / "VAL.tsv", GMAI_HEADER, [gmai_row(1)])
    benchmark = load_benchmark("gmai_mmbench", tmp_path / "val")
    refused("only GMAI-MMBench TEST is submitted", answers)


def test_a_table_of_vlmevalkit(tmp_path: Path) -> None:
    """Images as base64, as a list, as the index of another row; a hint; a gap in the letters."""
    both = f"['{base64_png(1)}', '{base64_png(2)}']"
    doubled = f'["{base64_png(3)}", "{base64_png(4)}"]'
    path = tsv_file(
        tmp_path / "OmniMedVQA.tsv",
        (*VLM, "Hint", "Question_Type"),
        [
            ["0", base64_png(1), "One?", "a", "b", "", "d", "D", "x", "test", "", "Lesion Grading"],
            ["1", "0", "Same image?", "yes", "no", "", "", "A", "x", "test", "Look.", ""],
            ["2", both, "<image 2> or <image 1>?", "yes", "no", "", "", "no", "x", "test", "", ""],
            ["3", doubled, "Both?", "yes", "no", "", "", "A", "x", "test", "", ""],
            ["4", "77", "Whose?", "yes", "no", "", "", "A", "x", "test", "", ""],
            ["5", base64_png(1), "One option?", "yes", "", "", "", "A", "x", "test", "", ""],
            ["6", "", "No image?", "yes", "no", "", "", "A", "x", "test", "", ""],
            ["7", base64_png(1), "<image> <image>?", "yes", "no", "", "", "A", "x", "test", "", ""],
        ],
    )
    benchmark = load_benchmark("omnimedvqa", path)

    one, same, several, listed = benchmark.questions
    assert (one.letters, one.answer, one.gold_letters()) == ("ABD", "d", {"D"})
    assert one.groups == {"category": "x", "question_type": "Lesion Grading", "split": "test"}
    assert same.text == "Hint: Look.\nSame image?"
    assert same.images == one.images
    assert several.text == "<image> or <image>?"
    assert several.answer == "no"
    assert [load_image(image) for image in several.images] == [png(2), png(1)]
    assert [load_image(image) for image in listed.images] == [png(3), png(4)]
    assert [(problem.reason, problem.record) for problem in benchmark.problems] == [
        ("missing_image", "4"),
        ("one_option", "5"),
        ("no_image", "6"),
        ("image_marks", "7"),
    ]


def test_image_paths_of_a_table(tmp_path: Path) -> None:
    path = tsv_file(
        tmp_path / "PathVQA_TEST.tsv",
        ("index", "image_path", "question", "answer"),
        [
            ["0", "a.png", "Is it benign?", "Yes"],
            ["1", "['b.png', 'a.png']", "What?", "a polyp"],
            ["2", "['b.png'", "What?", "a polyp"],
            ["3", "gone.png", "What?", "a polyp"],
        ],
    )
    a = image_file(tmp_path / "images" / "PathVQA_TEST" / "a.png")
    b = image_file(tmp_path / "b.png")
    benchmark = load_benchmark("path_vqa", path)
    assert [question.images for question in benchmark.questions] == [(a,), (b, a)]
    assert benchmark.counted_problems() == {"bad_image_path": 1, "missing_image": 1}
    # a table without answer_type: yes and no are closed
    assert len(find_protocol("path_vqa", "closed-3362").select(benchmark.questions)) == 1


def test_mmmu_in_a_table(tmp_path: Path) -> None:
    rows = [
        ["0", base64_png(1), "<image 1>?", "a", "b", "", "", "B", "Pharmacy", "validation"],
        ["1", base64_png(1), "<image 1>?", "a", "b", "", "", "B", "Pharmacy", "dev"],
        ["2", base64_png(1), "<image 1>?", "a", "b", "", "", "B", "Art", "validation"],
    ]
    tsv_file(tmp_path / "MMMU_DEV_VAL.tsv", VLM, rows)
    benchmark = load_benchmark("mmmu_health", tmp_path)
    assert [question.id for question in benchmark.questions] == ["0"]
    assert benchmark.questions[0].groups["subject"] == "Pharmacy"
    dev = load_benchmark("mmmu_health", tmp_path, variant="dev")
    assert [question.id for question in dev.questions] == ["1"]


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tsv_file(
        tmp_path / "slake.tsv", VLM, [["0", base64_png(5), "Q?", "a", "b", "", "", "A", "x", ""]]
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    question = load_benchmark("slake", path).questions[0]
    assert question.answer == "a"
    assert load_image(question.images[0]) == png(5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"index\timage\tquestion\n0\t1\n", "line 2: 2 fields, the header has 3"),
        (b'index\timage\tquestion\n0\t1\t"open\n', "line 2: unexpected end of data"),
        (b"index\timage\tquestion\n0\t1\t\xff\n", "line 2: not UTF-8"),
        (b"index\tquestion\n0\t1\n", "has no column 'image'"),
    ],
)
def test_broken_tables(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "slake.tsv"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark("slake", path)


def test_a_file_that_changes_under_its_images(tmp_path: Path) -> None:
    path = tsv_file(tmp_path / "GMAI_mm_bench_VAL.tsv", GMAI_HEADER, [gmai_row(1)])
    image = load_benchmark("gmai_mmbench", path).questions[0].images[0]
    assert isinstance(image, Base64Image)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(
        ImageError, match=f"had {size} bytes when it was read, it has {size + 1} now"
    ):
        image.read()
    path.unlink()
    with pytest.raises(ImageError, match="can't be read"):
        image.read()
    path.write_bytes(b"#" * size)
    with pytest.raises(ImageError, match="not base64"):
        image.read()


def test_columns_of_other_lengths_are_a_damaged_file(monkeypatch):
    """As pyarrow reads some files of which one bit has changed."""

    class Damaged:
        num_row_groups = 1

        def read_row_group(self, group: int, columns: list[str], **_: bool) -> pa.Table:
            return pa.table({columns[0]: ["x"] * (2 if columns == ["question"] else 1)})

    monkeypatch.setattr(rows, "_parquet", lambda path: nullcontext(Damaged()))
    monkeypatch.setattr(rows, "large_row_group", lambda *_: "")
    with pytest.raises(Unusable, match="column 'image' has 1 rows, others have 2"):
        list(rows._groups(Path("x.parquet"), ["question"], ["image"]))
