# SPDX-License-Identifier: Apache-2.0

"""The training-step benchmark runs as a user runs it, in both precisions, and its batches are fair."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import warm

FOLDER = Path(__file__).parents[2] / "benchmarks"
KEYS = {
    *("geometry", "stage", "device", "torch", "useful_tokens_per_second", "mfu", "ratio", "fill"),
    *("xtuner_useful_tokens_per_second", "xtuner_mfu", "peak_memory_gib", "seconds_per_step"),
    *("padding_share", "recomputed_layers", "loss", "xtuner_loss", "optimiser"),
}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
            *(sys.executable, FOLDER / "train_step.py", "--json", "--steps", "1"),
            *("--micro-batch", "1", "--max-length", "1024", "--stage", "2"),
            *("--dtype", "bfloat16", "--xtuner-order", "shuffled"),
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
    assert result["loss"] == pytest.approx(result["xtuner_loss"], rel=1e-2)
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
