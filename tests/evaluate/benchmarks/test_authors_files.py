# SPDX-License-Identifier: Apache-2.0

"""Each built-in column map, on small files in its authors' layout."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.evaluate.benchmarks import BenchmarkError, load_benchmark
from gmai_xtuner.evaluate.questions import Benchmark, Problem, Question, load_image
from tests.evaluate.files import (
    SUBJECTS,
    csv_file,
    find_protocol,
    huatuo_record,
    image_file,
    json_file,
    jsonl_file,
    medxpertqa_record,
    mmmu_row,
    omnimedvqa_record,
    parquet_file,
    png,
    slake_record,
    stored,
    vqa_rad_record,
)

CLEAN = (
    *("Figure_path", "Question", "Answer", "Choice A", "Choice B", " Choice C", " Choice D"),
    "Answer_label",
)


def told(benchmark: Benchmark) -> list[tuple[str, str, bool]]:
    return [(problem.reason, problem.record, problem.left_out) for problem in benchmark.problems]


def test_vqa_rad_is_the_test_part(tmp_path: Path) -> None:
    records = [
        vqa_rad_record(0),
        vqa_rad_record(1, "freeform"),
        vqa_rad_record(2, "para"),
        vqa_rad_record(3, "test_para", answer=3, answer_type="OPEN", question="How many? "),
        vqa_rad_record(4, answer="Left ", answer_type="CLOSED "),
        vqa_rad_record(5, answer=""),
        vqa_rad_record(6, image_name="gone.jpg"),
    ]
    json_file(tmp_path / "VQA_RAD Dataset Public.json", records)
    image = image_file(tmp_path / "VQA_RAD Image Folder" / "synpic54610.jpg")

    benchmark = load_benchmark("vqa_rad", tmp_path)

    groups = {"phrase_type": "test_para", "question_type": "PRES", "image_organ": "HEAD"}
    assert [question.id for question in benchmark.questions] == ["0", "3", "4"]
    assert benchmark.questions[1] == Question(
        "3", "How many?", (image,), answer="3", groups={"answer_type": "OPEN", **groups}
    )
    assert benchmark.problems == (
        Problem("no_answer", "5", "the gold answer is empty"),
        Problem("missing_image", "6", str(tmp_path / "VQA_RAD Image Folder" / "gone.jpg")),
    )
    counts = {"closed-251": 1, "closed-272": 2, "open-179": 1, "full-451": 3}
    for name, count in counts.items():
        assert len(find_protocol("vqa_rad", name).select(benchmark.questions)) == count


def test_more_questions_than_the_authors_have_are_another_part(tmp_path: Path) -> None:
    """The training part has the columns of the test part, and more questions."""
    records = [slake_record(number) for number in range(1062)]
    path = json_file(tmp_path / "test.json", records)
    with pytest.raises(BenchmarkError, match=r"1062 questions, slake en has 1061\. .* not scored"):
        load_benchmark("slake", path, require_images=False)
    rows = [{"image": stored(1), "question": "is it?", "answer": "no"}] * 452
    folder = tmp_path / "vqa-rad"
    parquet_file(folder / "test-00000-of-00001.parquet", rows, row_group_size=500)
    with pytest.raises(BenchmarkError, match="452 questions, vqa_rad test has 451"):
        load_benchmark("vqa_rad", folder)


def test_the_real_slake_has_the_counts_of_its_protocols(shared_data: Path) -> None:
    folder = shared_data / "bench_slake_questions"
    by_variant = {
        one: load_benchmark("slake", folder, variant=one, require_images=False)
        for one in ("en", "zh")
    }
    for name, count in (
        ("full-1061", 1061),
        ("open-645", 645),
        ("closed-355", 355),
        ("full-1033", 1033),
    ):
        chosen = find_protocol("slake", name)
        assert len(chosen.select(by_variant[chosen.variant].questions)) == count == chosen.expected
    assert not by_variant["en"].problems + by_variant["zh"].problems
    with pytest.raises(BenchmarkError, match=r"can be asked \(1061 missing_image\)"):
        load_benchmark("slake", folder)


def test_omnimedvqa(tmp_path: Path) -> None:
    root = tmp_path / "OmniMedVQA" / "QA_information"
    changed = omnimedvqa_record("Chest CT Scan_0", dataset="Chest CT Scan")
    changed["modality"] = changed.pop("modality_type")
    two = omnimedvqa_record("ACRIMA_1", option_A="No", option_B="Yes", gt_answer="yes")
    del two["option_C"], two["option_D"]
    records = [
        omnimedvqa_record("ACRIMA_0"),
        two,
        omnimedvqa_record("ACRIMA_2", option_C=""),
        omnimedvqa_record("ACRIMA_3", gt_answer="OCT"),
        omnimedvqa_record("ACRIMA_4", image_path="Images/ACRIMA/gone.png"),
        omnimedvqa_record("ACRIMA_0", question="Again?"),
    ]
    json_file(root / "Open-access" / "ACRIMA.json", records)
    json_file(root / "Open-access" / "Chest CT Scan.json", [changed])
    json_file(root / "Restricted-access" / "AIDA.json", [omnimedvqa_record("AIDA_0")])
    image = image_file(tmp_path / "OmniMedVQA" / "Images" / "ACRIMA" / "Im553_g_ACRIMA.png")

    for folder in (tmp_path, tmp_path / "OmniMedVQA"):
        benchmark = load_benchmark("omnimedvqa", folder)
        first, second, third, fourth, again, chest = benchmark.questions
        assert (first.images, first.answer) == ((image,), "Fundus imaging")
        assert first.gold_letters() == {"D"}
        assert (second.options, second.answer) == (("No", "Yes"), "Yes")  # but for the case
        assert (third.letters, third.gold_letters()) == ("ABD", {"D"})
        assert (fourth.answer, fourth.gold_letters()) == ("OCT", frozenset())
        assert again.id == "ACRIMA_0#2"
        assert chest.groups["modality"] == "Fundus Photography"
        assert told(benchmark) == [
            ("answer_not_an_option", "ACRIMA_3", False),
            ("missing_image", "ACRIMA_4", True),
            ("duplicate_id", "ACRIMA_0", False),
        ]
    restricted = load_benchmark("omnimedvqa", tmp_path, variant="restricted-access")
    assert [question.id for question in restricted.questions] == ["AIDA_0"]
    json_file(root / "Open-access" / "notes.json", [{"text": "x"}])
    with pytest.raises(BenchmarkError, match=r"notes.json' is no file .* Move it away"):
        load_benchmark("omnimedvqa", tmp_path)


def test_the_huatuogpt_collection(tmp_path: Path) -> None:
    marked = huatuo_record(
        dataset="MMMU_Medical_Validation",
        question="<image 1> Which of <image 2>?",
        options="['<image 1>', \"Crohn's\"]",
        answer="<image 1>",
        image=["images/synpic1.jpg", "images/synpic2.jpg"],
        subset="Pharmacy",
    )
    records = [
        *(huatuo_record(), marked, huatuo_record(options="['yes', no]"), huatuo_record(answer="?")),
        huatuo_record(options=[], question_type="open"),
        huatuo_record(image=["images/gone.jpg"]),
        huatuo_record(question="See <image 3>."),
    ]
    json_file(tmp_path / "medical_multimodel_evaluation_data.json", records)
    one, two = (image_file(tmp_path / "images" / f"synpic{n}.jpg", n) for n in (1, 2))

    benchmark = load_benchmark("huatuo", tmp_path)

    rad, mmmu, wrong = benchmark.questions
    assert (rad.id, rad.options, rad.answer) == ("1", ("yes", "no"), "no")
    assert (mmmu.text, mmmu.options) == ("<image> Which of <image>?", ("<image>", "Crohn's"))
    assert mmmu.images == (one, two, one)
    assert mmmu.gold_letters() == {"A"}
    assert (wrong.id, wrong.gold_letters()) == ("4", frozenset())
    reasons = ["bad_options", "answer_not_an_option", "no_options", *["missing_image"] * 2]
    assert [one[:2] for one in told(benchmark)] == list(zip(reasons, "34567", strict=True))
    part = load_benchmark("huatuo", tmp_path, variant="MMMU_Medical_Validation")
    assert part.questions == (mmmu,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"q_lang": "en", "img_name": "a", "answer_type": "OPEN"}', "is not valid JSON"),
        (b'[{"q_lang": "en", "img_name": "a", "answer_type": "OPEN"}, 3]', "record 2 is none"),
        (b'[{"q_lang": "en", "img_name": "a", "answer_type": "\xff"}]', "is not UTF-8 at line 1"),
    ],
)
def test_broken_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test.json").write_bytes(content)
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark("slake", tmp_path)


def test_pmc_vqa(tmp_path: Path) -> None:
    choices = [" A:None ", " B: Ratio A:B", "C:NA", " D:  3"]
    rows = [
        ["PMC1_F1.jpg", " What, exactly? ", "Ratio A:B", *choices, "B"],
        ["PMC1_F1.jpg", "What?", " A:None", *choices, " A"],
        ["PMC1_F1.jpg", "What?", "NA", *choices, "D"],
        ["PMC1_F1.jpg", "What?", "x", *choices, "E"],
        ["PMC1_F1.jpg", "What?", "None", " A:None", "B:", "C:x", "D:y", "A"],
        ["gone.jpg", "What?", "None", *choices, "A"],
    ]
    csv_file(tmp_path / "test_clean.csv", CLEAN, rows)
    image = image_file(tmp_path / "images" / "PMC1_F1.jpg")
    benchmark = load_benchmark("pmc_vqa", tmp_path)
    first, second, third = benchmark.questions
    assert (first.text, first.options) == ("What, exactly?", ("None", "Ratio A:B", "NA", "3"))
    assert (first.answer, first.images) == ("Ratio A:B", (image,))
    assert (second.answer, third.answer) == ("None", "3")
    assert told(benchmark) == [
        ("answer_disagrees", "2", False),
        ("bad_answer", "3", True),
        ("bad_options", "4", True),
        ("missing_image", "5", True),
    ]
    header = ["index", "Figure_path", "Caption", "Question", *CLEAN[3:7], "Answer", "split"]
    row = [
        "17",
        "PMC1_F1.jpg",
        "A cap,\ntion",
        "What?",
        *(" A:x", " B:y", " C:z", " D:w"),
        "C",
        "test",
    ]
    path = csv_file(tmp_path / "2" / "test_2.csv", header, [row])
    image = image_file(tmp_path / "2" / "figures" / "PMC1_F1.jpg")
    (question,) = load_benchmark("pmc_vqa", path).questions
    assert (question.id, question.answer, question.images) == ("17", "z", (image,))
    with pytest.raises(BenchmarkError, match="is a file of pmc_vqa test_2"):
        load_benchmark("pmc_vqa", path, variant="test_clean")


def write_mmmu(folder: Path) -> None:
    """Two questions a subject; in Pharmacy what is special."""
    compare = {"question": "Compare <image 2> with <image 1>.", "answer": "B"}
    special: list[dict[str, Any]] = [
        {**compare, "options": "['<image 1>', '<image 2>']"},
        {"options": "[]", "question_type": "open", "answer": "2"},
        {"options": "[]", "question_type": "open", "answer": "['RCC', 'renal cell carcinoma']"},
        {"options": "['a', 'b'"},
        {"options": "__import__('os').getcwd()"},
        {"question": "<image 3>?"},
        {"answer": "E"},
    ]
    for subject in (*SUBJECTS, "Art"):
        rows = [mmmu_row("validation", subject, n, image_1=stored(n)) for n in (1, 2)]
        for number, changes in enumerate(special if subject == "Pharmacy" else (), start=3):
            images = {"image_1": stored(31), "image_2": stored(32)}
            rows.append(mmmu_row("validation", subject, number, **images, **changes))
        parquet_file(folder / subject / "validation-00000-of-00001.parquet", rows)
        dev = mmmu_row("dev", subject, 1, image_1=stored(1), image_2=stored(2), question="?")
        parquet_file(folder / subject / "dev-00000-of-00001.parquet", [dev])


def test_mmmu(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    benchmark = load_benchmark("mmmu_health", tmp_path)
    by_id = {question.id.removeprefix("validation_"): question for question in benchmark.questions}

    assert len(by_id) == 5 * 2 + 3
    plain, several = by_id["Public_Health_2"], by_id["Pharmacy_3"]
    assert plain.text == "<image> What is shown?"
    assert plain.options == ("Liver", "Lung", "Crohn's disease", "None")
    assert (plain.answer, plain.groups["subject"]) == ("Crohn's disease", "Public_Health")
    assert several.options == ("<image>", "<image>")
    assert several.gold_letters() == {"B"}
    assert [load_image(image) for image in several.images] == [png(32), png(31), png(31), png(32)]
    assert by_id["Pharmacy_5"].answers == ("renal cell carcinoma",)
    reasons = ["bad_options", "bad_options", "missing_image", "bad_answer"]
    assert [(reason, record[-1]) for reason, record, _ in told(benchmark)] == list(
        zip(reasons, "6789", strict=True)
    )
    full = find_protocol("mmmu_health", "full-150")
    assert len(find_protocol("mmmu_health", "closed-145").select(benchmark.questions)) == 11
    assert full.score(by_id["Pharmacy_4"], "The answer is 2.").value == 1
    assert full.score(by_id["Pharmacy_4"], "12").value == 0
    dev = load_benchmark("mmmu_health", tmp_path, variant="dev")
    assert len(dev.questions) == 5
    assert [load_image(image) for image in dev.questions[0].images] == [png(1), png(2)]


def test_subjects_may_share_a_file_and_missing_ones_are_told(tmp_path: Path) -> None:
    rows = [mmmu_row("validation", one, 1, image_1=stored(1)) for one in (*SUBJECTS[:4], "Art")]
    parquet_file(tmp_path / "data" / "validation-00000-of-00001.parquet", rows)
    benchmark = load_benchmark("mmmu_health", tmp_path)
    assert len(benchmark.questions) == 4
    assert told(benchmark) == [("missing_subject", SUBJECTS[4], True)]


def test_path_vqa_on_the_hub(tmp_path: Path) -> None:
    rows = [
        {"image": stored(1), "question": "is it benign?", "answer": "Yes"},
        {"image": stored(2), "question": "what is shown?", "answer": "a polyp"},
        {"image": None, "question": "what?", "answer": "x"},
    ]
    folder = tmp_path / "path-vqa" / "data"
    parquet_file(folder / "test-00000-of-00003.parquet", rows)
    parquet_file(folder / "test-00001-of-00003.parquet", rows[:1])
    parquet_file(folder / "train-00000-of-00001.parquet", rows)
    benchmark = load_benchmark("path_vqa", tmp_path)
    assert [question.id for question in benchmark.questions] == ["0", "1", "3"]
    image = benchmark.questions[1].images[0]
    assert load_image(image) == png(2)
    kinds = [question.groups["answer_type"] for question in benchmark.questions]
    assert kinds == ["CLOSED", "OPEN", "CLOSED"]
    assert benchmark.counted_problems() == {"no_image": 1, "missing_part": 1}
    (folder / "test-00000-of-00003.parquet").write_bytes(b"version https://git-lfs")
    with pytest.raises(ImageError, match=r"row 1 of group 0, column 'image': can't be read"):
        image.read()
    with pytest.raises(BenchmarkError, match="is no readable Parquet file"):
        load_benchmark("path_vqa", tmp_path)


def test_a_file_that_does_not_say_whose_it_is_belongs_to_nobody(tmp_path: Path) -> None:
    """PathVQA and VQA-RAD have the same columns on the hub."""
    rows = [{"image": stored(1), "question": "is it?", "answer": "no"}] * 2
    for folder, name in (("vqa-rad", "vqa_rad"), ("path_vqa", "path_vqa")):
        path = parquet_file(tmp_path / folder / "test-00000-of-00001.parquet", rows)
        assert len(load_benchmark(name, path).questions) == 2
        with pytest.raises(BenchmarkError, match=f"is a file of {name} test"):
            load_benchmark({"vqa_rad": "path_vqa"}.get(name, "vqa_rad"), path)
    path = parquet_file(tmp_path / "mine" / "test-00000-of-00001.parquet", rows)
    for name in ("vqa_rad", "path_vqa"):
        with pytest.raises(BenchmarkError, match="is no file of a benchmark that is known"):
            load_benchmark(name, path)


def test_path_vqa_of_its_authors(tmp_path: Path) -> None:
    records = [
        {"image": "test_1", "question": "Is it benign?", "answer": "no"},
        {"image": "test_2", "question": "What is it?", "answer": "a polyp"},
        {"image": "test_3", "question": "What is it?", "answer": "a polyp"},
    ]
    path = tmp_path / "pvqa" / "qas" / "test" / "test_qa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(records, protocol=2))
    one, _ = (image_file(tmp_path / "pvqa" / "images" / "test" / f"test_{n}.jpg") for n in (1, 2))
    for place in (tmp_path, path):
        benchmark = load_benchmark("path_vqa", place)
        assert [question.id for question in benchmark.questions] == ["0", "1"]
        assert benchmark.questions[0].images == (one,)
        assert benchmark.counted_problems() == {"missing_image": 1}


class _Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "test_qa.pkl"
    for content in (pickle.dumps([_Malicious()]), pickle.dumps(OrderedDict(a=1)), b"\x80\x04"):
        path.write_bytes(content)
        with pytest.raises(BenchmarkError, match=r"no pickled list of plain records"):
            load_benchmark("path_vqa", path)
    assert capsys.readouterr().out == ""


def test_medxpertqa(tmp_path: Path) -> None:
    image_file(tmp_path / "images" / "MM-1-a.jpeg")
    records = [medxpertqa_record("MM-1"), medxpertqa_record("MM-2", options={"A": "x", "B": "y"})]
    jsonl_file(tmp_path / "MM" / "test.jsonl", records)
    text = medxpertqa_record(
        "Text-1", options={one: f"option {one}" for one in "ABCDEFGHIJ"}, label="J"
    )
    del text["images"]
    jsonl_file(tmp_path / "Text" / "test.jsonl", [text])
    jsonl_file(tmp_path / "Text" / "dev.jsonl", [text])
    multimodal = load_benchmark("medxpertqa", tmp_path)
    (question,) = multimodal.questions
    assert (question.text, question.answer) == ("What is it?", "option B")
    assert question.images == (tmp_path / "images" / "MM-1-a.jpeg",)
    assert question.groups["medical_task"] == "Diagnosis"
    assert told(multimodal) == [("bad_options", "MM-2", True)]
    (question,) = load_benchmark("medxpertqa", tmp_path, variant="text").questions
    assert (question.id, question.images, question.gold_letters()) == ("Text-1", (), {"J"})


MEDMCQA = {
    "id": "q",
    "question": "Q?",
    "subject_name": "ENT",
    "choice_type": "single",
    **{f"op{letter}": letter for letter in "abcd"},
}
MEDQA = {
    "question": "Q?",
    "answer": "b",
    "options": {"A": "a", "B": "b", "C": "c", "D": "d"},
    "meta_info": "step1",
    "answer_idx": "B",
}


@pytest.mark.parametrize(
    ("name", "file", "rows", "answer"),
    [
        ("medmcqa", "dev.json", [{**MEDMCQA, "cop": 2}], "b"),
        ("medmcqa", "validation-00000-of-00001.parquet", [{**MEDMCQA, "cop": 2}], "c"),
        ("medqa", "phrases_no_exclude_test.jsonl", [MEDQA], "b"),
        ("mmlu_medical", "anatomy/test-00000-of-00001.parquet",
         [{"question": "Q?", "subject": "anatomy", "choices": list("abcd"), "answer": 3}], "d"),
    ],
)  # fmt: skip
def test_text_alone(tmp_path: Path, name: str, file: str, rows: list[Any], answer: str) -> None:
    """The same number means another option in MedMCQA's two forms."""
    write = parquet_file if file.endswith("parquet") else jsonl_file
    write(tmp_path / file, rows)
    (question,) = load_benchmark(name, tmp_path).questions
    assert (question.text, question.images, question.answer) == ("Q?", (), answer)


def test_pubmedqa_asks_the_test_part(tmp_path: Path) -> None:
    record = {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "LABELS": []}
    record["final_decision"] = "maybe"
    json_file(tmp_path / "ori_pqal.json", {"1": record, "2": record})
    with pytest.raises(BenchmarkError, match=r"test_ground_truth.json', whose keys say which"):
        load_benchmark("pubmedqa", tmp_path)
    json_file(tmp_path / "test_ground_truth.json", {"2": "maybe"})
    (question,) = load_benchmark("pubmedqa", tmp_path).questions
    assert (question.id, question.options) == ("2", ("yes", "no", "maybe"))
    assert question.text == "Abstract: One.\nTwo.\nQuestion: Does it?"
    assert question.answer == "maybe"


def test_medframeqa_and_iu_xray_have_several_images(tmp_path: Path) -> None:
    row = {
        "question_id": "f1",
        "question": "Q?",
        "options": ["x", "y"],
        "correct_answer": "B",
        "system": "s",
        "organ": "o",
        "modality": "CT",
    }
    frames = {"image_1": stored(1), "image_2": stored(2), "image_3": None}
    parquet_file(tmp_path / "data" / "test-00000-of-00001.parquet", [{**row, **frames}])
    (question,) = load_benchmark("medframeqa", tmp_path).questions
    assert question.answer == "y"
    assert [load_image(image) for image in question.images] == [png(1), png(2)]

    paths = ["CXR1/0.png", "CXR1/1.png"]
    study = {"id": "CXR1", "report": "No effusion.", "image_path": paths, "split": "test"}
    folder = tmp_path / "iu_xray"
    json_file(folder / "annotation.json", {"train": [{**study, "split": "train"}], "test": [study]})
    images = tuple(image_file(folder / "images" / name) for name in paths)
    (question,) = load_benchmark("iu_xray", folder).questions
    assert (question.images, question.answer) == (images, "No effusion.")
    protocol = find_protocol("iu_xray")
    assert protocol.prompt(question).startswith("Write the findings")
    assert protocol.score(question, "No effusion.").value == 1
