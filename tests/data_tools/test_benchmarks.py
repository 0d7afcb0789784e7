# SPDX-License-Identifier: Apache-2.0

"""The builder's benchmarks run, at a tiny size, and print what they promise; the figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, work_dir: Path, *arguments: str) -> dict[str, Any]:
    """The one JSON object that a benchmark prints on stdout."""
    command = [sys.executable, str(BENCHMARKS / script), "--json", "--work-dir", str(work_dir)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.slow
def test_a_corpus_of_made_up_records(tmp_path):
    result = run("corpus.py", tmp_path, "--records", "2000")
    assert (result["records"], result["conversations"], result["rejected"]) == (2000, 2000, 0)
    assert set(result["seconds_by_stage"]) == {"reading", "making", "building"}
    assert result["records_per_second_template"] > result["records_per_second"] > 0
    assert result["peak_memory_mib"] <= result["peak_memory_all_mib"]


@pytest.mark.slow
def test_requests_to_a_server_on_loopback(tmp_path):
    few = ("--requests", "200", "--in-flight", "16", "--latency", "0.05", "--images", "20")
    result = run("requesting.py", tmp_path, *few)
    assert result["requests"] == 200 - 5 * 16
    assert result["most_in_flight_at_server"] <= 16
    assert 0 < result["share_of_ideal"] <= 1
    assert result["from_the_ledger_a_second"] > 0


def test_planted_faults_are_caught_and_true_texts_pass(tmp_path):
    result = run("planted_faults.py", tmp_path, "--records", "12")
    assert result["planted"] > 500
    assert result["caught_share"] >= 0.95
    assert result["stopped_share"] <= 0.02
    assert {kind.split()[0] for kind in result["kinds"]} == {
        "organ",
        "side",
        "count",
        "modality",
        "size",
    }
