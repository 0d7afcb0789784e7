# SPDX-License-Identifier: Apache-2.0

"""The command on a corpus and a benchmark whose overlap is known."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools import overlap
from data_tools.contamination import hashing
from tests.data_tools.contamination.sides import compare, write_benchmark, write_corpus


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    return write_corpus(tmp_path / "corpus"), write_benchmark(tmp_path / "bench")


def by_image(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {pair["image"]: (pair["relation"], pair["benchmark_picture"]) for pair in found["pairs"]}


def test_planted_copies_are_found_and_nothing_else(sides: tuple[Path, Path]) -> None:
    found = compare(*sides)
    assert by_image(found) == {
        "copy.png": ("same pixels", "0.png"),
        "copy_as_rgb.tif": ("same pixels", "0.png"),
        "deep.png": ("same pixels", "4.png"),
        "recoded.jpg": ("looks the same", "1.png"),
        "smaller.png": ("looks the same", "2.png"),
        "synpic54610.png": ("same case", "synpic54610.png"),
        # A mirrored copy is not found: the hash sees another picture. Blank ones are compared with none.
    }
    assert found["pictures"]["same_pixels"] == 2
    assert found["pictures"]["within_bits"] == {"0": 4, "4": 4, "8": 4}
    assert found["pictures"]["same_case"] == 1
    assert found["corpus"]["pictures_by_state"] == {
        "read": 10, "plain": 1, "unreadable": 1, "missing": 1,
    }  # fmt: skip
    assert found["benchmark"]["pictures_by_state"]["plain"] == 1
    told = {name: why for _, name, why in found["unreadable"]}
    assert set(told) == {"damaged.png", "gone.png"}
    assert any(
        "1 image of the corpus, unreadable: not compared" in text for text in found["warnings"]
    )


def test_planted_questions_are_found_with_picture_and_answer(sides: tuple[Path, Path]) -> None:
    found = compare(*sides)
    hits = {hit["question"]: hit for hit in found["question_hits"]}
    effusion = hits["Is there a pleural effusion?"]
    assert (effusion["equal"], effusion["near"]) == (1, 0)
    assert effusion["examples"][0]["id"] == "leak"
    assert effusion["examples"][0]["same_picture"] is True
    assert effusion["examples"][0]["same_answer"] is True
    # "which organ makes", "organ makes insulin" of "please say ...", "say which ...", these, two more: 2 / 6
    insulin = hits["Which organ makes insulin?"]
    assert (insulin["equal"], insulin["near"]) == (2, 0)
    assert [one["id"] for one in insulin["examples"] if one["same_answer"]] == ["word-for-word"]
    assert hits["胰岛素，由哪个器官产生"]["equal"] == 1
    template = hits["What is shown here now?"]
    assert template["equal"] == 12
    assert not any(one["same_picture"] for one in template["examples"])
    assert set(hits) == {
        "Is there a pleural effusion?", "Which organ makes insulin?", "胰岛素，由哪个器官产生",
        "What is shown here now?",
    }  # fmt: skip
    # With a lower bar the paraphrase is near.
    low = compare(*sides, "--jaccard", 0.33)
    assert {hit["question"]: hit["near"] for hit in low["question_hits"]}[
        "Which organ makes insulin?"
    ] == 1
    assert found["items"] == {
        "all": 10, "picture_and_question": 1, "picture": 3, "question": 3, "neither": 3,
    }  # fmt: skip


def test_the_exclude_list_holds_what_is_certain(sides: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(*sides)
    lines = (tmp_path / "overlap" / "exclude.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[1:] == [
        "dataset: seen",
        "image: copy.png",
        "image: copy_as_rgb.tif",
        "image: deep.png",
        "dataset: told",
        "id: word-for-word",
        "id: 中文",
    ]
    assert found["exclude"] == {
        "images": 3, "conversations": 2, "by_decision": 0, "not_in_the_mixture_yet": 5,
    }  # fmt: skip


def test_decisions_on_near_pictures_are_obeyed_and_kept(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    compare(*sides)
    table = tmp_path / "overlap" / "near.tsv"
    rows = list(csv.DictReader(table.open(encoding="utf-8"), delimiter="\t"))
    assert [(row["image"], row["relation"], row["decision"]) for row in rows] == [
        ("recoded.jpg", "looks the same", ""),
        ("smaller.png", "looks the same", ""),
        ("synpic54610.png", "same case", ""),
        ("copy.png", "same pixels", ""),
        ("copy_as_rgb.tif", "same pixels", ""),
        ("deep.png", "same pixels", ""),
    ]
    text = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([text[0], "exclude" + text[1], "keep" + text[2], *text[3:]]) + "\n")
    found = compare(*sides)
    listed = (tmp_path / "overlap" / "exclude.txt").read_text(encoding="utf-8")
    assert "image: recoded.jpg\n" in listed
    assert "smaller.png" not in listed
    assert found["exclude"]["by_decision"] == 1
    compare(*sides, "--distance", 0)  # at which it may not be found; the decision stands
    assert table.read_text(encoding="utf-8").count("exclude\t") == 1
    assert "image: recoded.jpg\n" in (tmp_path / "overlap" / "exclude.txt").read_text(
        encoding="utf-8"
    )
    table.write_text(table.read_text(encoding="utf-8").replace("exclude\t", "yes\t", 1))
    assert overlap.main([*map(str, sides), "--output", str(tmp_path / "overlap")]) == 1


def test_check_fails_until_the_mixture_leaves_it_out(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    mixture, _ = sides
    compare(*sides, "--check", status=3)
    mixture.write_text(mixture.read_text() + "exclude: ../overlap/exclude.txt\n")
    found = compare(*sides, "--check")
    assert found["exclude"]["not_in_the_mixture_yet"] == 0
    assert (
        found["exclude"]["images"] == 3
    )  # the list still holds them: writing it anew must not lose them
    assert found["corpus"]["left_out_by_the_mixture"] == 6


def test_training_leaves_out_exactly_these_conversations(
    sides: tuple[Path, Path], tmp_path: Path, tiny_bases: Path, tokenizer: Any
) -> None:
    """The list of the command in the hands of the training's own dataset."""
    from gmai_xtuner.data.dataset import SoftPackedDataset

    mixture, _ = sides

    def trained_on() -> set[str]:
        dataset = SoftPackedDataset(
            str(mixture),
            "stage3",
            tokenizer=tokenizer,
            vision=str(tiny_bases / "vision"),
            cache_dir=str(tmp_path / "cache"),
            max_length=256,
            num_workers=1,
            on_bad_sample="skip",
        )
        return {name for number in range(len(dataset)) for name in dataset[number]["ids"]}

    before = trained_on()
    compare(*sides)
    mixture.write_text(mixture.read_text() + "exclude: ../overlap/exclude.txt\n")
    assert before - trained_on() == {
        "seen/see-copy.png", "seen/see-copy_as_rgb.tif", "seen/see-deep.png", "seen/leak",
        "told/word-for-word", "told/中文",
    }  # fmt: skip


def test_a_second_run_decodes_nothing_and_a_changed_file_again(
    sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(*sides)
    opened: list[Any] = []
    read = hashing.read_pixels
    monkeypatch.setattr(
        hashing,
        "read_pixels",
        lambda source: opened.append(getattr(source, "name", "")) or read(source),
    )
    monkeypatch.setattr(hashing, "thumbnail", lambda *_, **__: b"")
    monkeypatch.setattr("data_tools.contamination.report.thumbnail", lambda *_, **__: b"")
    again = compare(*sides)
    assert opened == []
    changing = ("seconds",)
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in first.items() if k not in changing
    }
    shutil.copy(
        tmp_path / "corpus" / "images" / "own21.png", tmp_path / "corpus" / "images" / "own22.png"
    )
    compare(*sides)
    assert opened == ["own22.png"]


def test_what_was_not_compared_is_said_and_nothing_recognised_is_an_error(
    sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, _ = sides
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.csv").write_text("alpha,beta\n1,2\n")
    assert overlap.main([str(mixture), str(empty), "--output", str(tmp_path / "o")]) == 1
    error = capsys.readouterr().err
    assert "nothing of" in error
    assert "notes.csv: no column of questions or images is known (columns: alpha, beta)" in error
    assert "Figure_path" in error
    assert not (tmp_path / "o").exists()

    (empty / "notes.csv").write_text("question,image\nWhere is the lesion?,nowhere.png\n")
    found = compare(mixture, empty, folder=tmp_path / "o")
    assert found["pictures"]["compared"] is False
    assert (
        "none of the 1 images that the benchmark names was found"
        in found["pictures"]["not_compared_because"]
    )
    assert "NOT COMPARED" in capsys.readouterr().out
    assert "**not compared**" in (tmp_path / "o" / "report.md").read_text()

    pictures = tmp_path / "pictures"
    shutil.copytree(tmp_path / "bench" / "imgs", pictures)
    found = compare(mixture, pictures, folder=tmp_path / "p")
    assert found["pictures"]["same_pixels"] == 2
    assert found["questions"]["compared"] is False
    assert any("no column of questions" in text for text in found["warnings"])


def test_records_without_a_mixture_give_a_list_without_datasets(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    mixture, benchmark = sides
    found = compare(
        mixture.with_name("seen.jsonl"), benchmark, "--image-root", mixture.parent / "images"
    )
    assert found["pictures"]["same_pixels"] == 2
    lines = (tmp_path / "overlap" / "exclude.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == ["image: copy.png", "image: copy_as_rgb.tif", "image: deep.png"]
