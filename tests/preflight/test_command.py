# SPDX-License-Identifier: Apache-2.0

"""The command as a user runs it; its exit status is what a job script looks at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmai_xtuner.preflight.__main__ import main
from tests import warm
from tests.preflight.conftest import ROOT
from tests.preflight.test_data import edit_mixture
from tests.toy import record

KEYS = {"parameters", "trainable", "packs", "fill", "iterations", "missing", "memory_gib"}
SMALL = (
    "train_dataloader.dataset.max_length=256",
    "train_dataloader.dataset.held_out=0",
    "train_dataloader.batch_size=2",
)


@pytest.fixture
def command(tiny_bases, tmp_path):
    def run(mixture: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GMAI_LLM": str(tiny_bases / "llm"),
            "GMAI_VISION": str(tiny_bases / "vision"),
            "GMAI_MIXTURE": str(mixture),
            "GMAI_CACHE": str(tmp_path / "cache"),
        }
        line = [sys.executable, "-m", "gmai_xtuner.preflight", "configs/gmai_vl/stage1_shallow.py"]
        line += [*arguments, "--work-dir", str(tmp_path / "work"), "--cfg-options", *SMALL]
        return warm.run(line, environment=environment, folder=ROOT, timeout=120)

    return run


@pytest.mark.slow
def test_good_run_exits_0_with_one_json_object(command, corpus):
    done = command(corpus.mixture, "--json", "--gpus", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= KEYS
    assert report["verdict"] == "would run"
    assert (report["packs"], report["iterations"], report["images"]) == (10, 3, 20)
    assert report["missing"] == {"datasets": [], "images": [], "images_left_out": 0}
    assert report["trainable"]["total"] == report["parameters"]["projector"]
    assert "Tokenised a: 15 of 15 records" in done.stderr


@pytest.mark.slow
def test_what_is_missing_or_damaged_exits_1_and_is_named(command, corpus):
    edit_mixture(corpus, "lost", annotations="lost.jsonl")
    whole = (corpus.images / "4.png").read_bytes()
    (corpus.images / "4.png").write_bytes(whole[:-400])
    with corpus.annotations("b").open("a") as file:
        file.write(json.dumps(record("late", "<image>?", "Yes.", image="none.png")) + "\n")
    done = command(corpus.mixture)
    assert done.returncode == 1
    assert "a.jsonl, line 5: image" in done.stdout
    assert "none.png" in done.stdout
    assert "lost.jsonl" in done.stdout
    assert done.stdout.splitlines()[-1] == "Verdict: this run would fail (data)."


@pytest.mark.parametrize(
    "line",
    [
        ["nowhere.py"],
        ["configs/gmai_vl/stage1_shallow.py", "--deepspeed", "zero9"],
        ["configs/gmai_vl/stage1_shallow.py", "--gpus", "0"],
        ["configs/gmai_vl/_base_/data.py"],
        [],
    ],
)
def test_usage_errors_exit_2(line, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert "error: " in error
