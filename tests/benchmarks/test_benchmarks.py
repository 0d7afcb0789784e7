# SPDX-License-Identifier: Apache-2.0

"""The benchmarks run, at a tiny size, and print what they promise. Their figures mean nothing here."""

import importlib.util
import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests import warm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def load(name: str) -> ModuleType:
    """A benchmark's module."""
    specification = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
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


@pytest.mark.slow
def test_tokenizing(work_dir):
    result = run("tokenizing.py", work_dir, "--samples", "3000", "--peer-samples", "150")
    assert result["same_ids"] is True
    assert result["ours_per_second"] > result["xtuner_per_second"] > 0
    assert result["ratio"] == pytest.approx(result["ours_per_second"] / result["xtuner_per_second"])


@pytest.mark.slow
def test_startup(work_dir, monkeypatch, capfd):
    monkeypatch.syspath_prepend(BENCHMARKS)
    startup = load("startup")
    monkeypatch.setattr(startup, "in_a_fresh_process", partial(run, "startup.py", work_dir))
    few = ["--json", "--work-dir", str(work_dir), "--samples", "2000", "--peer-samples", "150"]
    monkeypatch.setattr(sys, "argv", ["startup.py", *few])
    startup.main()
    result = json.loads(capfd.readouterr().out)
    assert result["conversations"] <= result["samples"] == 2000
    assert result["seconds"] > 0
    assert 0 < result["worker_private_gib"] <= result["worker_resident_gib"]
    assert result["worker_resident_gib"] < result["main_gib"] * 1.5
    assert result["xtuner_seconds"] > 0


@pytest.mark.slow
def test_requesting_at_scale(work_dir):
    few = ("--scale", "600", "--deaths", "5", "--images", "4", "--side", "64", "--in-flight", "16")
    result = run("requesting.py", work_dir, *few, "--latency", "0.05")
    assert (result["requests"], result["deaths"]) == (600, 5)
    assert result["requests_under_way_at_a_death"] > 0
    none = ("lost", "undecided", "asked_twice_without_a_death")
    assert [result[key] for key in none] == [0, 0, 0]
    assert result["same_as_without_a_server"] is True
    assert result["of_them_for_answers_that_never_came"] >= 0
    assert result["spent_tokens"] <= result["budget_tokens"]


@pytest.mark.slow
def test_damage(work_dir):
    result = run("damage.py", work_dir, "--tries", "2", "--pictures", "1", "--side", "120")
    assert {row["format"] for row in result["rows"]} >= {"JPEG", "PNG", "WebP"}
    assert all(row["decode"] <= row["careful"] <= 1 for row in result["rows"])


@pytest.mark.slow
def test_attacks():
    command = [sys.executable, BENCHMARKS / "attacks.py", "--only", "15 MiB of wrong items"]
    done = warm.run(command, environment=os.environ)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["outcome"].startswith("ApiError")
    assert row["seconds"] < 10
    assert row["GiB"] < 1


@pytest.mark.slow
def test_gpu_check(tmp_path, monkeypatch, capfd):
    """The groups that are quick on a CPU; `make gpu-check` runs all, each in a process of its own."""
    checks = load("gpu_check")

    def child(*arguments, seconds, **more):
        command = arguments if Path(arguments[0]).name == "xtuner" else ("python", *arguments)
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), **more}
        return warm.run(command, environment=environment, timeout=seconds)

    monkeypatch.setattr(checks, "child", child)
    groups = ["environment", "padded", "checkpoints"]
    out = tmp_path / "checks.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), "--only", *groups])
    assert checks.main() == 0, capfd.readouterr().out
    found = {(one["group"], one["name"]): one for one in json.loads(out.read_text())}
    assert [*dict.fromkeys(group for group, _ in found)] == groups
    assert found["padded", "left-padded batch of four"]["verdict"] == "PASS"
    assert found["checkpoints", "resumed"]["verdict"] == "PASS"
    inside, end = checks.command()
    assert (inside.name, inside.measured) == ("host waits of a micro-batch", "0: ")
    # DeepSpeed's look for an overflow, and the guard's own: a bad step must be known before it is made.
    places = re.findall(r"(\w+\.py):", end.measured)
    assert {"nonfinite.py"} <= set(places) <= {"stage_1_and_2.py", "nonfinite.py"}, end.measured


@pytest.mark.slow
def test_images(work_dir):
    result = run("images.py", work_dir, "--samples", "1", "--seconds", "0.1")
    assert result["identical"] is True
    assert result["ratio"] > 0
    kinds = {row["kind"]: row for row in result["kinds"]}
    assert kinds["2048x2500 JPEG"]["scaled_ms"] < kinds["2048x2500 JPEG"]["ours_ms"]
    assert 0 < kinds["2048x2500 JPEG"]["scaled_max_levels"] <= 8.5
    assert kinds["512x512 PNG"]["scaled_max_levels"] == 0


@pytest.mark.slow
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


# The corpus builder


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


# The training step

KEYS = {
    *("geometry", "stage", "device", "torch", "useful_tokens_per_second", "mfu", "ratio", "fill"),
    *("xtuner_useful_tokens_per_second", "xtuner_mfu", "peak_memory_gib", "seconds_per_step"),
    *("padding_share", "recomputed_layers", "loss", "xtuner_loss", "optimiser"),
}


@pytest.fixture(scope="module")
def batches():
    return load("random_batches")


@pytest.fixture(scope="module")
def drawn(batches):
    return batches.draw_conversations(200, vocabulary=1472, max_length=2048, seed=0)


@pytest.mark.slow
def test_the_command_says_everything_in_one_json_object():
    done = warm.run(
        [
            *(sys.executable, BENCHMARKS / "train_step.py", "--json", "--steps", "1"),
            *("--micro-batch", "1", "--max-length", "1024", "--stage", "2"),
            *("--xtuner-order", "shuffled"),
        ],
        environment={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result.keys() >= KEYS
    assert result["device"] == "cpu"
    assert result["mfu"] is None
    assert result["ratio"] == pytest.approx(
        result["useful_tokens_per_second"] / result["xtuner_useful_tokens_per_second"]
    )
    assert result["loss"] == pytest.approx(result["xtuner_loss"], rel=1e-4)
    assert result["loss"] == pytest.approx(math.log(1472), rel=0.05)
    assert 0 < result["fill"] <= 1


def test_both_sides_train_the_same_conversations(drawn, batches):
    conversations, packs = batches.fill_packs(drawn, 8, 2048)
    assert len(packs) == 8
    assert sorted(np.concatenate(packs)) == list(range(len(conversations)))
    tokens = sum(conversation.length for conversation in conversations)
    learnt = sum(int((c.labels[1:] != -100).sum()) for c in conversations)

    ours = [batch["data"] for batch in batches.our_batches(conversations, packs, 4, 2048)]
    assert [len(ours), sum(data["num_tokens"] for data in ours)] == [2, tokens]
    assert sum(len(data["label_targets"]) for data in ours) == learnt
    for order in ("shuffled", "grouped"):
        theirs = batches.xtuner_batches(conversations, 5, order)
        assert sum(batch.tokens for batch in theirs) == tokens
        instances = [instance for batch in theirs for instance in batch.instances]
        assert len(instances) == len(conversations)
        labels = np.concatenate([np.array(instance["labels"])[1:] for instance in instances])
        assert int((labels != -100).sum()) == learnt
        images = sum(bool(instance["pixel_values"].any()) for instance in instances)
        assert images == sum(len(data["pixel_values"]) for data in ours)


def test_containers_give_the_same_images(work_dir):
    found = run("containers.py", work_dir, "--images", "6", "--side", "32", "--rounds", "1")
    assert {"loose files", "zip", "tar", "arrow", "parquet"} < found["containers"].keys()
    rows = found["containers"].values()
    assert all("skipped" in row or row["decode_per_second"] > 0 for row in rows)
