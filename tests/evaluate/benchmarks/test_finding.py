# SPDX-License-Identifier: Apache-2.0

"""Which benchmark a file is, and what is said of the wrong one."""

from pathlib import Path

import pytest

from gmai_xtuner.evaluate.benchmarks import BenchmarkError, find_benchmarks, load_benchmark, survey
from tests.evaluate.benchmarks.test_authors_files import CLEAN
from tests.evaluate.files import (
    GMAI_HEADER,
    SUBJECTS,
    base64_png,
    csv_file,
    gmai_row,
    gmai_test_part,
    huatuo_record,
    image_file,
    json_file,
    mmmu_row,
    omnimedvqa_record,
    parquet_file,
    slake_record,
    stored,
    tsv_file,
    vqa_rad_record,
)
from tests.evaluate.sets import write_vqa_rad
from tests.tables import tables

TABLES = tables(__file__)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One question or two of each benchmark, as somebody's folder of downloads has them."""
    folder = tmp_path_factory.mktemp("downloads")
    json_file(folder / "VQA-RAD" / "VQA_RAD Dataset Public.json", [vqa_rad_record(0)])
    image_file(folder / "VQA-RAD" / "VQA_RAD Image Folder" / "synpic54610.jpg")
    json_file(folder / "Slake1.0" / "test.json", [slake_record(1), slake_record(2, "zh")])
    image_file(folder / "Slake1.0" / "imgs" / "xmlab1" / "source.jpg")
    csv_file(
        folder / "PMC-VQA" / "test_clean.csv",
        CLEAN,
        [["f.jpg", "What?", "x", " A:x", " B:y", " C:z", " D:w", "A"]],
    )
    image_file(folder / "PMC-VQA" / "images" / "f.jpg")
    omni = folder / "OmniMedVQA"
    json_file(omni / "QA_information" / "Open-access" / "ACRIMA.json", [omnimedvqa_record("A_0")])
    json_file(omni / "QA_information" / "Open-access" / "OCT.json", [omnimedvqa_record("O_0")])
    image_file(omni / "Images" / "ACRIMA" / "Im553_g_ACRIMA.png")
    tsv_file(folder / "GMAI" / "GMAI_mm_bench_VAL.tsv", GMAI_HEADER, [gmai_row(1)])
    for part in (1, 2):
        gmai_test_part(folder / "GMAI", part, part)
    for subject in (*SUBJECTS, "Art"):
        rows = [mmmu_row("validation", subject, n, image_1=stored(1)) for n in (1, 2)]
        parquet_file(folder / "MMMU" / subject / "validation-00000-of-00001.parquet", rows)
    pair = {"image": stored(1), "question": "is it?", "answer": "no"}
    parquet_file(folder / "path-vqa" / "data" / "test-00000-of-00001.parquet", [pair])
    json_file(folder / "huatuo" / "medical_multimodel_evaluation_data.json", [huatuo_record()])
    image_file(folder / "huatuo" / "images" / "synpic1.jpg")
    tsv_file(
        folder / "LMUData" / "SLAKE.tsv",
        ("index", "image", "question", "answer"),
        [["0", base64_png(1), "Is it?", "Yes"]],
    )
    json_file(folder / "Slake1.0" / "train.json", [slake_record(3)] * 3)
    json_file(folder / "notes.json", {"not": "a list"})
    (folder / "readme.csv").write_text("a,b\n")
    (folder / "broken.parquet").write_bytes(b"no")
    return folder


def test_everything_in_one_folder(everything: Path) -> None:
    found = find_benchmarks(everything)
    places = [(one.name, one.variant, str(one.data.relative_to(everything))) for one in found]
    assert places == [
        ("gmai_mmbench", "val", "GMAI/GMAI_mm_bench_VAL.tsv"),
        ("gmai_mmbench", "test", "GMAI"),
        ("huatuo", "all", "huatuo/medical_multimodel_evaluation_data.json"),
        ("mmmu_health", "validation", "MMMU"),
        ("omnimedvqa", "open-access", "OmniMedVQA"),
        ("path_vqa", "test", "path-vqa/data"),
        ("pmc_vqa", "test_clean", "PMC-VQA/test_clean.csv"),
        ("slake", "en", "Slake1.0/test.json"),
        ("slake", "zh", "Slake1.0/test.json"),
        ("vqa_rad", "test", "VQA-RAD/VQA_RAD Dataset Public.json"),
    ]
    counts = [
        len(load_benchmark(one.name, one.data, variant=one.variant).questions) for one in found
    ]
    assert counts == [1, 2, 1, 10, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("name", "file", "message"), TABLES["a_file_of_another_benchmark"])
def test_a_file_of_another_benchmark(everything: Path, name: str, file: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark(name, everything / file)


def test_a_folder_of_another_benchmark(everything: Path, tmp_path: Path) -> None:
    row = {"index": "0", "image": base64_png(1), "question": "?", "A": "a", "B": "b", "answer": "A"}
    path = tsv_file(tmp_path / "MedXpertQA_MM.tsv", [*row], [[*row.values()]])
    for name, place, variant, told in (
        ("pmc_vqa", path, None, r"known .* A benchmark of your own needs a column map"),
        (
            "vqa_rad",
            everything / "Slake1.0",
            None,
            r"in .* There is: .*test.json' is a file of slake",
        ),
        ("pmc_vqa", everything, "test_2", "nothing of pmc_vqa test_2"),
    ):
        with pytest.raises(BenchmarkError, match=told):
            load_benchmark(name, place, variant=variant)


def test_wrong_names() -> None:
    with pytest.raises(
        BenchmarkError,
        match=r"no benchmark is called 'mnist'\. There are gmai_mmbench, .*your own is named by its file",
    ):
        load_benchmark("mnist", Path())
    with pytest.raises(BenchmarkError, match=r"slake has no variant 'de'\. There are en, zh"):
        load_benchmark("slake", Path(), variant="de")
    with pytest.raises(BenchmarkError, match="is no folder"):
        find_benchmarks(Path("absent"))


def test_two_copies_are_not_chosen_between(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        json_file(tmp_path / copy / "test.json", [slake_record(1)])
    with pytest.raises(
        BenchmarkError, match=r"more than once: .*a/test.json'.*b/test.json'. Name the"
    ):
        load_benchmark("slake", tmp_path)
    assert "slake en in" in survey(tmp_path).notes[0]


def test_a_language_that_the_file_lacks(tmp_path: Path) -> None:
    json_file(tmp_path / "test.json", [slake_record(1)])
    with pytest.raises(BenchmarkError, match=r"slake \(zh\): .* has no question of this variant"):
        load_benchmark("slake", tmp_path, variant="zh")


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/hostname", "../../secret.jpg"])
def test_a_record_can_name_no_image_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = write_vqa_rad(tmp_path / "VQA-RAD")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    file = folder / "VQA_RAD Dataset Public.json"
    file.write_text(file.read_text().replace("synpic0.jpg", name))
    benchmark = load_benchmark("vqa_rad", folder)
    assert benchmark.counted_problems() == {"image_outside": 2}
    assert all(tmp_path / "secret.jpg" not in one.images for one in benchmark.questions)
