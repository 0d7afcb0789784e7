# SPDX-License-Identifier: Apache-2.0

"""A corpus is read as training reads it, and whatever training refuses is counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools import overlap
from data_tools.contamination.compare import Corpus, open_corpus
from gmai_xtuner.core.errors import CorpusError, DataError, MixtureError
from gmai_xtuner.core.exclusion import Exclusion
from tests.data_tools.contamination.sides import picture, write_lines
from tests.toy import record


def ids(corpus: Corpus) -> list[tuple[str, str]]:
    return [(corpus.datasets[number].name, found.id) for number, found in corpus.conversations()]


def part(kind: str, value: Any) -> dict[str, Any]:
    return {"type": kind, ("url" if kind == "image" else kind): value}


def test_images_of_every_spelling_are_seen_and_refused_records_counted(tmp_path: Path) -> None:
    asked = part("text", "What?")
    write_lines(tmp_path / "a.jsonl", [
        {"messages": [
            {"role": "user", "content": [part("image", "./x//a.png"), asked]},
            {"role": "assistant", "content": "It."},
        ]},
        {"messages": [
            {"role": "user", "content": [part("image_url", {"url": "http://x/a.png"}), asked]},
            {"role": "assistant", "content": "It."},
        ]},
        record("no-mark", "What?", "It.", image="b.png"),
        record("no-answer", "What?"),
        record("good", "<image>\nWhat?", "It.", image="c.png"),
    ])  # fmt: skip
    corpus = open_corpus(tmp_path / "a.jsonl")
    for _ in range(2):  # the records are read twice, and counted once
        found = [conversation for _, conversation in corpus.conversations()]
        assert [(one.id, one.images) for one in found] == [
            ("a.jsonl:1", ("x/a.png",)),
            ("good", ("c.png",)),
        ]
        assert corpus.refused == {"remote_image": 1, "image_count": 1, "bad_turn_order": 1}


def test_a_folder_of_records_names_the_files_that_hold_none(tmp_path: Path) -> None:
    write_lines(tmp_path / "sub" / "b.jsonl", [record("1", "Why?", "So.")])
    write_lines(tmp_path / "a.jsonl", [record("no-answer", "What?"), record("2", "Why?", "So.")])
    write_lines(tmp_path / "labels.jsonl", [{"image": "a.png", "label": 3}])
    (tmp_path / "settings.json").write_text('{"a": 1}')
    (tmp_path / "empty.jsonl").touch()
    corpus = open_corpus(tmp_path)
    assert ids(corpus) == [("a.jsonl", "2"), ("sub/b.jsonl", "1")]
    assert [name for name, _ in corpus.passed_over] == [
        "empty.jsonl", "labels.jsonl", "settings.json",
    ]  # fmt: skip
    assert not corpus.is_mixture


def test_a_variant_of_a_mixture_with_its_lists(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_lines(tmp_path / "base" / f"{name}.jsonl", [record(name, "Why?", "So.")])
    rows = "".join(f"  {name}: {{annotations: {name}.jsonl}}\n" for name in ("a", "b"))
    (tmp_path / "base" / "m.yaml").write_text(f"datasets:\n{rows}exclude: all.txt\n")
    (tmp_path / "base" / "all.txt").write_text("id: 1\ndataset: b\nimage: x//y.png\n")
    (tmp_path / "own.txt").write_text("id: 2\n")
    mixture = tmp_path / "m.yaml"
    own = "  c: {annotations: base/c.jsonl, image_root: base, exclude: own.txt}\n"
    mixture.write_text(f"base: base/m.yaml\nwithout: a\ndatasets:\n{own}")
    corpus = open_corpus(mixture)
    assert ids(corpus) == [("b", "b"), ("c", "c")]
    assert [dataset.excluded for dataset in corpus.datasets] == [
        Exclusion(frozenset({"1"}), frozenset({"x/y.png"})),
        Exclusion(frozenset({"2"})),
    ]
    assert [dataset.image_root for dataset in corpus.datasets] == [None, tmp_path / "base"]
    (tmp_path / "own.txt").write_text("id:\n")
    with pytest.raises(MixtureError, match=r"own\.txt, line 1: expected 'id: \.\.\.'"):
        open_corpus(mixture)


def test_groups_of_a_corpus_folder_of_ours(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [record("1", "Why?", "So.")])
    (tmp_path / "mixture.yaml").write_text("datasets: {a: {annotations: a.jsonl}}\n")
    rows = [{"image": "./a.png", "provenance": {"group": 7}}, {"image": "b.png", "provenance": {}}]
    write_lines(tmp_path / "records.jsonl", rows)
    assert open_corpus(tmp_path).groups == {"a.png": "7"}


def test_a_path_that_holds_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "holds no file of conversations"),
        (tmp_path / "a.csv", "a corpus is a folder, a mixture file"),
    ):
        with pytest.raises(CorpusError, match=message):
            open_corpus(path)
    (tmp_path / "a.jsonl").write_text(json.dumps(record("1", "Why?", "So.")) + "\n{\n")
    corpus = open_corpus(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not valid JSON"):
        ids(corpus)


def test_refused_records_are_said_and_a_corpus_of_nothing_else_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").mkdir()
    picture(0).save(tmp_path / "bench" / "0.png")
    command = ["a.jsonl", "bench", "--cache", "c.sqlite", "--workers", "1"]
    write_lines(tmp_path / "a.jsonl", [record("no-mark", "What?", "It.", image="0.png")])
    assert overlap.main(command) == 1
    assert "training refuses every record of a.jsonl (image_count 1)" in capsys.readouterr().err
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps(record("good", "What?", "It.")) + "\n")
    assert overlap.main(command) == 0
    told = capsys.readouterr().out
    assert "1 record of the corpus that training refuses (image_count 1): not compared" in told


# --- A comparison has a folder of its own; nothing else is written over ---


CORPUS = [record(name, "<image>\nWhat?", "A blob.", image=name) for name in ("a.png", "b.png")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two benchmarks, each with one picture of the corpus; the working directory."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "corpus" / "records.jsonl", CORPUS)
    for seed, (image, benchmark) in enumerate((("a.png", "slake"), ("b.png", "rad"))):
        picture(seed).save(tmp_path / "corpus" / image)
        (tmp_path / "benchmarks" / benchmark).mkdir(parents=True)
        picture(seed).save(tmp_path / "benchmarks" / benchmark / "0.png")
    return tmp_path


def run(corpus: str, benchmark: str, *options: str) -> int:
    own = ["--cache", str(Path.cwd() / "hashes.sqlite"), "--workers", "1"]
    return overlap.main([corpus, benchmark, *own, *options])


def test_each_benchmark_has_its_folder_by_itself(project: Path) -> None:
    assert run("corpus", "benchmarks/slake") == 0
    assert run("corpus", "benchmarks/rad") == 0
    lists = {
        name: (project / "overlap" / name / "exclude.txt").read_text() for name in ("slake", "rad")
    }
    assert "image: a.png" in lists["slake"]
    assert "image: b.png" in lists["rad"]
    assert run("corpus", "benchmarks/slake/0.png") == 0
    assert (project / "overlap" / "0" / "exclude.txt").is_file()


def test_the_folder_of_another_benchmark_or_corpus_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("corpus", "benchmarks/slake", "--output", "out") == 0
    before = {path: path.read_bytes() for path in (project / "out").iterdir()}
    assert run("corpus", "benchmarks/rad", "--output", "out") == 1
    assert (
        "holds the comparison with another benchmark: benchmarks/slake" in capsys.readouterr().err
    )
    shutil.copytree("corpus", "other")
    assert run("other", "benchmarks/slake", "--output", "out") == 1
    assert "with another corpus: corpus, now other" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (project / "out").iterdir()}
    # The same two by other names, and after the whole project has moved.
    assert run(str(project / "corpus"), "benchmarks/../benchmarks/slake", "--output", "out") == 0
    moved = shutil.copytree(project, project.with_name(project.name + "-moved"))
    monkeypatch.chdir(moved / "benchmarks")
    assert run("../corpus", "slake", "--output", "../out") == 0


def test_a_folder_of_something_else_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = project / "my_model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert run("corpus", "benchmarks/slake", "--output", "my_model") == 1
    assert (
        "my_model is not empty and no folder of a comparison (config.json)"
        in capsys.readouterr().err
    )
    assert [path.name for path in model.iterdir()] == ["config.json"]
    for content in ("[]", "{", json.dumps({"corpus": {}})):
        (model / "overlap.json").write_text(content)
        assert run("corpus", "benchmarks/slake", "--output", "my_model") == 1
        assert "its overlap.json is not of this command" in capsys.readouterr().err
    assert run("corpus", "benchmarks/slake", "--output", "my_model/config.json") == 1
    assert "is a file; a folder was expected" in capsys.readouterr().err
    half = project / "half"  # killed while the first file was written
    half.mkdir()
    (half / ".overlap.json.1.part").write_text("{")
    assert run("corpus", "benchmarks/slake", "--output", "half") == 0
