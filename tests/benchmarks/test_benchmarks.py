# SPDX-License-Identifier: Apache-2.0

"""The benchmarks run, at a tiny size, and print what they promise. Their figures mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import warm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def run(script: str, work_dir: Path, *arguments: str) -> dict[str, Any]:
    """The one JSON object that a benchmark prints on stdout."""
    command = [sys.executable, str(BENCHMARKS / script), "--json", "--work-dir", str(work_dir)]
    done = warm.run([*command, *arguments], environment=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_packing(work_dir):
    result = run("packing.py", work_dir, "--samples", "4000", "--peer-samples", "1000")
    assert result["samples"] == 4000
    assert result["seconds"] > 0
    assert 0.99 < result["fill"] <= result["best_fill"] <= 1
    assert 0.7 < result["xtuner_fill"] < 0.9
    assert result["xtuner_seconds"] > 0
    # None where TRL can't be installed, which stderr says
    assert result["trl_fill"] is None or 0.9 < result["trl_fill"] < 1
    assert "trl_seconds" in result


def test_tokenizing(work_dir):
    result = run("tokenizing.py", work_dir, "--samples", "3000", "--peer-samples", "150")
    assert result["same_ids"] is True
    assert result["ours_per_second"] > result["xtuner_per_second"] > 0
    assert result["ratio"] == pytest.approx(result["ours_per_second"] / result["xtuner_per_second"])


def test_startup(work_dir):
    result = run("startup.py", work_dir, "--samples", "2000", "--peer-samples", "150")
    assert result["conversations"] <= result["samples"] == 2000
    assert result["seconds"] > 0
    assert 0 < result["worker_private_gib"] <= result["worker_resident_gib"]
    assert result["worker_resident_gib"] < result["main_gib"] * 1.5
    assert result["xtuner_seconds"] > 0


def test_damage(work_dir):
    result = run("damage.py", work_dir, "--tries", "2", "--pictures", "1", "--side", "120")
    assert {row["format"] for row in result["rows"]} >= {"JPEG", "PNG", "WebP"}
    assert all(row["decode"] <= row["careful"] <= 1 for row in result["rows"])


def test_attacks():
    command = [sys.executable, str(BENCHMARKS / "attacks.py"), "--only", "15 MiB of wrong items"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["outcome"].startswith("ApiError")
    assert row["seconds"] < 10
    assert row["GiB"] < 1


def test_gpu_check(tmp_path):
    """The groups that are quick on a CPU; `make gpu-check` runs all."""
    groups = ["environment", "padded", "checkpoints", "command"]
    out = tmp_path / "checks.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_check.py"),
        "--out",
        str(out),
        "--only",
        *groups,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = {(one["group"], one["name"]): one for one in json.loads(out.read_text())}
    assert [*dict.fromkeys(group for group, _ in found)] == groups
    assert found["padded", "left-padded batch of four"]["verdict"] == "PASS"
    assert found["checkpoints", "resumed"]["verdict"] == "PASS"
    waits = found["command", "host waits of a micro-batch"]
    assert "stage_1_and_2.py" in waits["measured"]


def test_images(work_dir):
    result = run("images.py", work_dir, "--samples", "1", "--seconds", "0.1")
    assert result["identical"] is True
    assert result["ratio"] > 0
    kinds = {row["kind"]: row for row in result["kinds"]}
    assert kinds["2048x2500 JPEG"]["scaled_ms"] < kinds["2048x2500 JPEG"]["ours_ms"]
    assert 0 < kinds["2048x2500 JPEG"]["scaled_max_levels"] <= 8.5
    assert kinds["512x512 PNG"]["scaled_max_levels"] == 0


def test_overlap(work_dir):
    result = run(
        "overlap.py", work_dir, "--pictures", "2", "--values", "20000", "--queries", "500",
        "--brute-queries", "200", "--questions", "300", "--asked", "300",
    )  # fmt: skip
    assert result["same_as_brute"] is True
    assert result["pairs"] >= 15  # a thousandth of the values lies within 8 bits of a query
    # None where FAISS, datasketch or imagehash can't be installed, which stderr says
    assert result["same_as_faiss"] in (True, None)
    assert result["datasketch_recall"] is None or result["datasketch_recall"] <= 1
    assert all(row["ours_per_second"] > 0 for row in result["pictures"])
    assert result["from_cache_per_second"] > result["all_cores_per_second"] > 0
