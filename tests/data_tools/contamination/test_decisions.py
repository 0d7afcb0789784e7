# SPDX-License-Identifier: Apache-2.0

"""Decisions are about pairs, the list about images: `keep` of one pair takes no other pair's leak back."""

import csv
from pathlib import Path
from typing import Any

import pytest

from data_tools.contamination.findings import read_decisions
from gmai_xtuner.core.errors import CorpusError
from tests.data_tools.contamination.sides import compare, picture, write_lines
from tests.toy import record


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The corpus' copy.png has the pixels of one picture of the benchmark and looks like another's JPEG;
    near.png looks like both."""
    images = tmp_path / "corpus" / "images"
    images.mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    picture(0).save(tmp_path / "bench" / "same.png")
    picture(0).save(tmp_path / "bench" / "alike.jpg", quality=50)
    picture(0).save(images / "copy.png")
    picture(0).save(images / "near.jpg", quality=70)
    rows = [record(name, "<image>\nWhat?", "It.", image=name) for name in ("copy.png", "near.jpg")]
    write_lines(tmp_path / "corpus" / "records.jsonl", rows)
    mixture = tmp_path / "corpus" / "mixture.yaml"
    mixture.write_text("datasets: {a: {annotations: records.jsonl, image_root: images}}\n")
    out = tmp_path / "out"

    def once(
        decisions: dict[tuple[str, str], str], *options: str, status: int = 0
    ) -> tuple[list[str], str, dict[str, Any]]:
        """Names in exclude.txt, stderr and the numbers, after these decisions and no others."""
        if decisions:
            rows = list(csv.DictReader((out / "near.tsv").open(), delimiter="\t"))
            with (out / "near.tsv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
                writer.writeheader()
                for row in rows:
                    pair = (row["benchmark_picture"], row["image"])
                    writer.writerow(row | {"decision": decisions.get(pair, "")})
        found = compare(mixture, tmp_path / "bench", *options, folder=out, status=status)
        lines = (out / "exclude.txt").read_text().splitlines()
        names = [line.removeprefix("image: ") for line in lines if line.startswith("image: ")]
        return names, capsys.readouterr().err, found

    return once


def test_keep_of_one_pair_leaves_a_certain_leak_on_the_list(run: Any, tmp_path: Path) -> None:
    assert run({})[0] == ["copy.png"]
    rows = csv.DictReader((tmp_path / "out" / "near.tsv").open(), delimiter="\t")
    found = [(row["relation"], row["benchmark_picture"], row["image"]) for row in rows]
    assert found[-1] == ("same pixels", "same.png", "copy.png")
    assert sorted(found[:-1]) == [
        ("looks the same", "alike.jpg", "copy.png"),
        ("looks the same", "alike.jpg", "near.jpg"),
        ("looks the same", "same.png", "near.jpg"),
    ]
    alike, same = ("alike.jpg", "copy.png"), ("same.png", "copy.png")
    assert run({alike: "keep"})[0] == ["copy.png"]
    assert run({same: "keep"})[0] == ["copy.png"]  # the other pair is still undecided
    assert run({alike: "keep", same: "keep"})[0] == []
    assert run({})[0] == []  # decisions are kept
    assert run({alike: "exclude", same: "keep"})[0] == ["copy.png"]


def test_exclude_wins_over_keep_in_any_order(run: Any) -> None:
    run({})
    one, other = ("alike.jpg", "near.jpg"), ("same.png", "near.jpg")
    for decisions in ({one: "exclude", other: "keep"}, {one: "keep", other: "exclude"}):
        names, _, found = run(decisions)
        assert names == ["copy.png", "near.jpg"]
        assert found["exclude"]["by_decision"] == 1
    assert run({one: "keep", other: "keep"})[0] == ["copy.png"]


def test_rows_of_one_pair_that_disagree_and_rows_without_cells(tmp_path: Path) -> None:
    table = tmp_path / "near.tsv"
    head = "decision\tbenchmark_picture\tdataset\timage\n"
    for first, second in (("exclude", "keep"), ("keep", "exclude")):
        table.write_text(f"{head}{first}\tp\td\ti\n{second}\tp\td\ti\n")
        assert read_decisions(table) == {("p", "d", "i"): "exclude"}
    table.write_text(f"{head}keep\tp\n")
    with pytest.raises(CorpusError, match=r"near\.tsv, line 2: keep of what\?"):
        read_decisions(table)
    table.write_bytes(f"{head}keep\tp\td\t\xe4\n".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"is not UTF-8 .* Save it as UTF-8"):
        read_decisions(table)


def test_undecided_pairs_are_said_and_fail_a_strict_check(run: Any, tmp_path: Path) -> None:
    run({})
    mixture = tmp_path / "corpus" / "mixture.yaml"
    mixture.write_text(mixture.read_text() + "exclude: ../out/exclude.txt\n")
    # Two pairs of near.jpg; the third that looks the same is of copy.png, which is left out anyway.
    _, told, found = run({}, "--check")
    assert found["undecided"] == 2
    assert "check: 2 pairs undecided; look at them and write exclude or keep into" in told
    assert "near.tsv (--strict fails on them)" in told
    assert "2 pairs undecided" in run({}, "--strict", status=3)[1]
    one, other = ("alike.jpg", "near.jpg"), ("same.png", "near.jpg")
    assert "1 pair undecided" in run({one: "keep"}, "--strict", status=3)[1]
    assert "check:" not in run({one: "keep", other: "keep"}, "--strict")[1]
    told = run({one: "exclude"}, "--strict", status=3)[1]
    assert "check: 1 of " in told  # decided, but the mixture's list was read before
    assert " undecided;" not in told
    assert "check:" not in run({}, "--strict")[1]


def test_a_file_that_two_datasets_name_is_one_picture(run: Any, tmp_path: Path) -> None:
    run({})
    mixture = tmp_path / "corpus" / "mixture.yaml"
    own = "annotations: records.jsonl, image_root: images"
    mixture.write_text(f"datasets: {{a: {{{own}}}, b: {{{own}}}}}\n")
    _, _, found = run({})
    assert (found["corpus"]["pictures"], found["corpus"]["distinct_pictures"]) == (4, 2)
    assert "| distinct images of the corpus | 2 |" in (tmp_path / "out" / "report.md").read_text()
