# SPDX-License-Identifier: Apache-2.0

"""VQA-RAD, SLAKE, OmniMedVQA and the HuatuoGPT-Vision collection, in their authors' JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gmai_xtuner.evaluate.benchmarks import BenchmarkError, find_protocol, load_benchmark
from gmai_xtuner.evaluate.benchmarks.reading import Problem
from gmai_xtuner.evaluate.questions import Question
from tests.evaluate.files import (
    huatuo_record,
    image_file,
    json_file,
    omnimedvqa_record,
    slake_record,
    vqa_rad_record,
)


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
    path = json_file(tmp_path / "VQA_RAD Dataset Public.json", records)
    image = image_file(tmp_path / "VQA_RAD Image Folder" / "synpic54610.jpg")

    benchmark = load_benchmark("vqa_rad", tmp_path)

    assert [question.id for question in benchmark.questions] == ["0", "3", "4"]
    assert benchmark.questions[1] == Question(
        id="3",
        text="How many?",
        images=(image,),
        answer="3",
        groups={
            "answer_type": "OPEN",
            "phrase_type": "test_para",
            "question_type": "PRES",
            "image_organ": "HEAD",
        },
    )
    assert benchmark.questions[2].groups["answer_type"] == "CLOSED"
    assert benchmark.problems == (
        Problem("no_answer", "5", "the gold answer is empty"),
        Problem("missing_image", "6", str(tmp_path / "VQA_RAD Image Folder" / "gone.jpg")),
    )
    assert benchmark.source[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert benchmark.source[0].size == path.stat().st_size
    counts = {
        name: len(find_protocol("vqa_rad", name).select(benchmark.questions))
        for name in ("closed-251", "closed-272", "open-179", "full-451")
    }
    assert counts == {"closed-251": 1, "closed-272": 2, "open-179": 1, "full-451": 3}


def test_slake_by_language(tmp_path: Path) -> None:
    json_file(
        tmp_path / "test.json",
        [
            slake_record(1),
            slake_record(2, "zh", question="图像的模态是什么?"),
            slake_record(3, img_name="xmlab2/source.jpg"),
            slake_record(4, answer="Yes", answer_type="CLOSED"),
        ],
    )
    image = image_file(tmp_path / "imgs" / "xmlab1" / "source.jpg")

    english = load_benchmark("slake", tmp_path)
    chinese = load_benchmark("slake", tmp_path, variant="zh")

    assert (english.variant, [question.id for question in english.questions]) == ("en", ["1", "4"])
    assert english.counted_problems() == {"missing_image": 1}
    assert english.questions[0].images == (image,)
    assert english.questions[0].groups["content_type"] == "Modality"
    assert [question.text for question in chinese.questions] == ["图像的模态是什么?"]
    text_only = load_benchmark("slake", tmp_path, require_images=False)
    assert [question.id for question in text_only.questions] == ["1", "3", "4"]


def test_the_real_slake_has_the_counts_of_its_protocols(shared_data: Path) -> None:
    folder = shared_data / "bench_slake_questions"
    english = load_benchmark("slake", folder, require_images=False)
    chinese = load_benchmark("slake", folder, variant="zh", require_images=False)
    for name, count in (
        ("full-1061", 1061),
        ("open-645", 645),
        ("closed-416", 416),
        ("closed-355", 355),
    ):
        chosen = find_protocol("slake", name)
        assert len(chosen.select(english.questions)) == count == chosen.expected
    assert len(find_protocol("slake", "full-1033").select(chinese.questions)) == 1033
    assert not english.problems
    assert not chinese.problems
    with pytest.raises(
        BenchmarkError, match=r"not one question .* can be asked \(1061 missing_image\)"
    ):
        load_benchmark("slake", folder)


def test_omnimedvqa(tmp_path: Path) -> None:
    open_access = tmp_path / "OmniMedVQA" / "QA_information" / "Open-access"
    changed = omnimedvqa_record("Chest CT Scan_0", dataset="Chest CT Scan")
    changed["modality"] = changed.pop("modality_type")
    two = omnimedvqa_record("ACRIMA_0001", option_A="No", option_B="Yes", gt_answer="yes")
    del two["option_C"], two["option_D"]
    gap = omnimedvqa_record("ACRIMA_0002", option_C="", gt_answer="Fundus imaging")
    json_file(
        open_access / "ACRIMA.json",
        [
            omnimedvqa_record("ACRIMA_0000"),
            two,
            gap,
            omnimedvqa_record("ACRIMA_0003", gt_answer="OCT"),
            omnimedvqa_record("ACRIMA_0004", image_path="Images/ACRIMA/gone.png"),
            omnimedvqa_record("ACRIMA_0000", question="Again?"),
        ],
    )
    json_file(open_access / "Chest CT Scan.json", [changed])
    json_file(
        tmp_path / "OmniMedVQA" / "QA_information" / "Restricted-access" / "AIDA.json",
        [omnimedvqa_record("AIDA_0000")],
    )
    image = image_file(tmp_path / "OmniMedVQA" / "Images" / "ACRIMA" / "Im553_g_ACRIMA.png")

    for folder in (tmp_path, tmp_path / "OmniMedVQA"):
        benchmark = load_benchmark("omnimedvqa", folder)
        first, second, third, fourth, again, chest = benchmark.questions
        assert first.images == (image,)
        assert first.answer == "Fundus imaging"
        assert first.gold_letters() == {"D"}
        assert (second.options, second.answer) == (("No", "Yes"), "Yes")  # but for the case
        assert (third.letters, third.gold_letters()) == ("ABD", {"D"})
        assert (fourth.answer, fourth.gold_letters()) == ("OCT", frozenset())
        assert again.id == "ACRIMA_0000#2"
        assert chest.groups == {
            "question_type": "Modality Recognition",
            "modality": "Fundus Photography",
            "dataset": "Chest CT Scan",
        }
        assert [
            (problem.reason, problem.record, problem.left_out) for problem in benchmark.problems
        ] == [
            ("answer_not_an_option", "ACRIMA_0003", False),
            ("missing_image", "ACRIMA_0004", True),
            ("duplicate_id", "ACRIMA_0000", False),
        ]
        assert [source.path.name for source in benchmark.source] == [
            "ACRIMA.json",
            "Chest CT Scan.json",
        ]
    restricted = load_benchmark("omnimedvqa", tmp_path, variant="restricted-access")
    assert [question.id for question in restricted.questions] == ["AIDA_0000"]
    one_file = load_benchmark("omnimedvqa", open_access / "Chest CT Scan.json")
    assert [question.id for question in one_file.questions] == ["Chest CT Scan_0"]
    json_file(open_access / "notes.json", [{"text": "x"}])
    with pytest.raises(BenchmarkError, match=r"notes.json' is no file of OmniMedVQA"):
        load_benchmark("omnimedvqa", tmp_path)


def test_the_huatuogpt_collection(tmp_path: Path) -> None:
    json_file(
        tmp_path / "medical_multimodel_evaluation_data.json",
        [
            huatuo_record(),
            huatuo_record(
                dataset="MMMU_Medical_Validation",
                question="<image 1> Which of <image 2>?",
                options="['<image 1>', \"Crohn's\"]",
                answer="<image 1>",
                image=["images/synpic1.jpg", "images/synpic2.jpg"],
                subset="Pharmacy",
            ),
            huatuo_record(options="['yes', no]"),
            huatuo_record(answer="?"),
            huatuo_record(options=[], question_type="open"),
            huatuo_record(image=["images/gone.jpg"]),
            huatuo_record(question="See <image 3>."),
        ],
    )
    one = image_file(tmp_path / "images" / "synpic1.jpg", 1)
    two = image_file(tmp_path / "images" / "synpic2.jpg", 2)

    benchmark = load_benchmark("huatuo", tmp_path)

    rad, mmmu, wrong = benchmark.questions
    assert (rad.id, rad.options, rad.answer) == ("1", ("yes", "no"), "no")
    assert mmmu.text == "<image> Which of <image>?"
    assert mmmu.options == ("<image>", "Crohn's")
    assert mmmu.images == (one, two, one)
    assert mmmu.gold_letters() == {"A"}
    assert mmmu.groups["subset"] == "Pharmacy"
    assert (wrong.id, wrong.gold_letters()) == ("4", frozenset())
    assert [(problem.reason, problem.record) for problem in benchmark.problems] == [
        ("bad_options", "3"),
        ("answer_not_an_option", "4"),
        ("no_options", "5"),
        ("missing_image", "6"),
        ("missing_image", "7"),
    ]
    part = load_benchmark("huatuo", tmp_path, variant="MMMU_Medical_Validation")
    assert part.questions == (mmmu,)
    assert find_protocol("huatuo").prompt(rad) == (
        "Is there a fracture?\nA. yes\nB. no\n"
        "Answer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"q_lang": "en", "img_name": "a", "answer_type": "OPEN"}', "is not valid JSON"),
        (
            b'[{"q_lang": "en", "img_name": "a", "answer_type": "OPEN"}, 3]',
            "holds no list of records",
        ),
        (b'[{"q_lang": "en", "img_name": "a", "answer_type": "\xff"}]', "is not UTF-8 at line 1"),
    ],
)
def test_broken_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test.json").write_bytes(content)
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark("slake", tmp_path)
