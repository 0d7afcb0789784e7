# SPDX-License-Identifier: Apache-2.0

"""A comparison has a folder of its own: no list of another benchmark is written over, nor anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_tools import overlap
from tests.data_tools.contamination.sides import picture, write_lines
from tests.toy import record

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
