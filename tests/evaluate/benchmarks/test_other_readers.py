# SPDX-License-Identifier: Apache-2.0

"""PMC-VQA (CSV), MMMU and PathVQA (Parquet), PathVQA (pickle)."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.evaluate.benchmarks import BenchmarkError, find_protocol, load_benchmark
from gmai_xtuner.evaluate.benchmarks.mmmu import SUBJECTS
from gmai_xtuner.evaluate.benchmarks.parquet import ParquetImage
from gmai_xtuner.evaluate.questions import load_image
from tests.evaluate.files import (
    csv_file,
    image_file,
    mmmu_row,
    parquet_file,
    png,
    stored,
)

CLEAN = (
    *("Figure_path", "Question", "Answer", "Choice A", "Choice B", " Choice C", " Choice D"),
    "Answer_label",
)
TEST_2 = (
    *("index", "Figure_path", "Caption", "Question"),
    *("Choice A", "Choice B", "Choice C", "Choice D", "Answer", "split"),
)


def test_pmc_vqa_clean(tmp_path: Path) -> None:
    choices = [" A:None ", " B: Ratio A:B", "C:NA", " D:  3"]
    csv_file(
        tmp_path / "test_clean.csv",
        CLEAN,
        [
            ["PMC1_F1.jpg", " What, exactly? ", "Ratio A:B", *choices, "B"],
            ["PMC1_F1.jpg", "What?", " A:None", *choices, " A"],
            ["PMC1_F1.jpg", "What?", "NA", *choices, "D"],
            ["PMC1_F1.jpg", "What?", "x", *choices, "E"],
            ["PMC1_F1.jpg", "What?", "None", " A:None", "B:", "C:x", "D:y", "A"],
            ["gone.jpg", "What?", "None", *choices, "A"],
        ],
    )
    image = image_file(tmp_path / "images" / "PMC1_F1.jpg")
    benchmark = load_benchmark("pmc_vqa", tmp_path)
    first, second, third = benchmark.questions
    assert first.text == "What, exactly?"
    assert first.options == ("None", "Ratio A:B", "NA", "3")
    assert (first.answer, first.images) == ("Ratio A:B", (image,))
    assert second.answer == "None"
    assert third.answer == "3"
    assert [
        (problem.reason, problem.record, problem.left_out) for problem in benchmark.problems
    ] == [
        ("answer_disagrees", "2", False),
        ("bad_answer", "3", True),
        ("bad_options", "4", True),
        ("missing_image", "5", True),
    ]


def test_pmc_vqa_test_2(tmp_path: Path) -> None:
    csv_file(
        tmp_path / "test_2.csv",
        TEST_2,
        [
            [
                "17",
                "PMC1_F1.jpg",
                "A cap,\ntion",
                "What?",
                " A:x",
                " B:y",
                " C:z",
                " D:w",
                "C",
                "test",
            ]
        ],
    )
    image = image_file(tmp_path / "figures" / "PMC1_F1.jpg")
    benchmark = load_benchmark("pmc_vqa", tmp_path, variant="test_2")
    (question,) = benchmark.questions
    assert (question.id, question.answer, question.images) == ("17", "z", (image,))
    # one file says itself which it is, and is not taken for the other
    assert load_benchmark("pmc_vqa", tmp_path / "test_2.csv").variant == "test_2"
    with pytest.raises(BenchmarkError, match="is a file of pmc_vqa test_2"):
        load_benchmark("pmc_vqa", tmp_path / "test_2.csv", variant="test_clean")


def test_broken_csv(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "test_clean.csv", CLEAN, [["a", "b"]])
    with pytest.raises(BenchmarkError, match="line 2: 2 fields, the header has 8"):
        load_benchmark("pmc_vqa", path)


def write_mmmu(folder: Path) -> None:
    """Two questions a subject; in Pharmacy what is special."""
    for subject in SUBJECTS:
        rows = [
            mmmu_row("validation", subject, number, image_1=stored(number)) for number in (1, 2)
        ]
        if subject == "Pharmacy":
            rows += [
                mmmu_row(
                    "validation",
                    subject,
                    3,
                    question="Compare <image 2> with <image 1>.",
                    options="['<image 1>', '<image 2>']",
                    answer="B",
                    image_1=stored(31),
                    image_2=stored(32),
                ),
                mmmu_row(
                    "validation",
                    subject,
                    4,
                    options="[]",
                    question_type="open",
                    answer="2",
                    image_1=stored(4),
                ),
                mmmu_row(
                    "validation",
                    subject,
                    5,
                    options="[]",
                    question_type="open",
                    answer="['RCC', 'renal cell carcinoma']",
                    image_1=stored(5),
                ),
                mmmu_row("validation", subject, 6, options="['a', 'b'", image_1=stored(6)),
                mmmu_row("validation", subject, 7, options="__import__('os').getcwd()"),
                mmmu_row("validation", subject, 8, question="<image 2>?", image_1=stored(8)),
                mmmu_row("validation", subject, 9, answer="E", image_1=stored(9)),
            ]
        parquet_file(folder / subject / "validation-00000-of-00001.parquet", rows)
        parquet_file(
            folder / subject / "dev-00000-of-00001.parquet",
            [mmmu_row("dev", subject, 1, image_1=stored(1), image_2=stored(2), question="?")],
        )
    parquet_file(
        folder / "Art" / "validation-00000-of-00001.parquet",
        [mmmu_row("validation", "Art", 1, image_1=stored(1), image_2=stored(2))],
    )


def test_mmmu(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    benchmark = load_benchmark("mmmu_health", tmp_path)
    by_id = {question.id.removeprefix("validation_"): question for question in benchmark.questions}

    assert len(by_id) == 5 * 2 + 3
    plain = by_id["Public_Health_2"]
    assert plain.text == "<image> What is shown?"
    assert plain.options == ("Liver", "Lung", "Crohn's disease", "None")
    assert plain.answer == "Crohn's disease"
    assert plain.groups["subject"] == "Public_Health"
    assert [load_image(image) for image in plain.images] == [png(2)]
    several = by_id["Pharmacy_3"]
    assert several.text == "Compare <image> with <image>."
    assert several.options == ("<image>", "<image>")
    assert [load_image(image) for image in several.images] == [png(32), png(31), png(31), png(32)]
    assert by_id["Pharmacy_4"].answer == "2"
    assert (by_id["Pharmacy_5"].answer, by_id["Pharmacy_5"].answers) == (
        "RCC",
        ("renal cell carcinoma",),
    )
    assert [(problem.reason, problem.record[-1]) for problem in benchmark.problems] == [
        ("bad_options", "6"),
        ("bad_options", "7"),
        ("missing_image", "8"),
        ("bad_answer", "9"),
    ]
    closed, full = (
        find_protocol("mmmu_health", "closed-145"),
        find_protocol("mmmu_health", "full-150"),
    )
    assert len(closed.select(benchmark.questions)) == 11
    assert len(full.select(benchmark.questions)) == 13
    assert full.score(by_id["Pharmacy_4"], "The answer is 2.").value == 1
    assert full.score(by_id["Pharmacy_4"], "12").value == 0
    assert full.score(plain, "C").value == 1


def test_options_that_are_only_images_keep_their_letters(tmp_path: Path) -> None:
    """Both read ``<image>`` once marked: B is right, A is not."""
    write_mmmu(tmp_path)
    question = next(
        question
        for question in load_benchmark("mmmu_health", tmp_path).questions
        if question.id == "validation_Pharmacy_3"
    )
    asked = find_protocol("mmmu_health", "closed-145")
    assert asked.score(question, "B").value == 1
    assert asked.score(question, "A").value == 0


def test_unnamed_images_come_first(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    (dev, *_) = load_benchmark("mmmu_health", tmp_path, variant="dev").questions
    assert dev.text == "?"
    assert [load_image(image) for image in dev.images] == [png(1), png(2)]


def test_subjects_may_share_a_file(tmp_path: Path) -> None:
    rows = [
        mmmu_row("validation", subject, number, image_1=stored(number))
        for subject in (*SUBJECTS, "Art")
        for number in (1, 2)
    ]
    parquet_file(tmp_path / "data" / "validation-00000-of-00001.parquet", rows)
    assert len(load_benchmark("mmmu_health", tmp_path).questions) == 10


def test_a_missing_subject_is_told(tmp_path: Path) -> None:
    parquet_file(
        tmp_path / "Pharmacy" / "validation-0.parquet",
        [
            mmmu_row("validation", "Pharmacy", 1, image_1=stored(1)),
            mmmu_row("validation", "Pharmacy", 2, image_1=stored(1)),
        ],
    )
    benchmark = load_benchmark("mmmu_health", tmp_path)
    assert benchmark.counted_problems() == {"missing_subject": 4}


def test_path_vqa_on_the_hub(tmp_path: Path) -> None:
    rows = [
        {"image": stored(1), "question": "is it benign?", "answer": "Yes"},
        {"image": stored(2), "question": "what is it?", "answer": "a polyp"},
        {"image": None, "question": "what is it?", "answer": "a polyp"},
    ]
    folder = tmp_path / "path-vqa" / "data"
    parquet_file(folder / "test-00000-of-00002.parquet", rows)
    parquet_file(folder / "test-00001-of-00002.parquet", rows[:1])
    parquet_file(folder / "train-00000-of-00001.parquet", rows)
    benchmark = load_benchmark("path_vqa", tmp_path)
    assert [question.id for question in benchmark.questions] == ["0", "1", "3"]
    assert [load_image(question.images[0]) for question in benchmark.questions] == [
        png(1),
        png(2),
        png(1),
    ]
    assert [question.groups["answer_type"] for question in benchmark.questions] == [
        "CLOSED",
        "OPEN",
        "CLOSED",
    ]
    assert benchmark.counted_problems() == {"no_image": 1}
    image = benchmark.questions[0].images[0]
    assert isinstance(image, ParquetImage)
    (folder / "test-00000-of-00002.parquet").write_bytes(b"version https://git-lfs")
    with pytest.raises(ImageError, match=r"row 0 of group 0, column 'image': can't be read"):
        image.read()
    with pytest.raises(BenchmarkError, match="is no file of a benchmark"):
        load_benchmark("path_vqa", folder / "test-00000-of-00002.parquet")


def test_vqa_rad_on_the_hub(tmp_path: Path) -> None:
    rows = [{"image": stored(1), "question": "is it?", "answer": "no"}] * 2
    parquet_file(tmp_path / "vqa-rad" / "data" / "test-00000-of-00001.parquet", rows)
    benchmark = load_benchmark("vqa_rad", tmp_path)
    assert len(find_protocol("vqa_rad").select(benchmark.questions)) == 2


def test_path_vqa_of_its_authors(tmp_path: Path) -> None:
    records = [
        {"image": "test_0001", "question": "Is it benign?", "answer": "no"},
        {"image": "test_0002", "question": "What is it?", "answer": "a polyp"},
        {"image": "test_0003", "question": "What is it?", "answer": "a polyp"},
    ]
    path = tmp_path / "pvqa" / "qas" / "test" / "test_qa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(records, protocol=2))
    one = image_file(tmp_path / "pvqa" / "images" / "test" / "test_0001.jpg")
    image_file(tmp_path / "pvqa" / "images" / "test" / "test_0002.jpg")
    for folder in (tmp_path, tmp_path / "pvqa", path):
        benchmark = load_benchmark("path_vqa", folder)
        assert [question.id for question in benchmark.questions] == ["0", "1"]
        assert benchmark.questions[0].images == (one,)
        assert benchmark.counted_problems() == {"missing_image": 1}


class _Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("payload", [[_Malicious()], OrderedDict(a=1)])
def test_a_pickle_runs_no_code(
    tmp_path: Path, payload: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "test_qa.pkl"
    path.write_bytes(pickle.dumps(payload))
    with pytest.raises(BenchmarkError, match=r"no pickled list of plain records \(it asks for"):
        load_benchmark("path_vqa", path)
    assert capsys.readouterr().out == ""
    path.write_bytes(b"\x80\x04")
    with pytest.raises(BenchmarkError, match="no pickled list of plain records"):
        load_benchmark("path_vqa", path)
