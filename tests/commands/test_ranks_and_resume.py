# SPDX-License-Identifier: Apache-2.0

"""One rank and two, ZeRO-2 and ZeRO-3: the same weights come out; and steps that are not finite.

In fp32, so that a difference is a defect and not rounding.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gmai_xtuner.checkpoint.training import load_checkpoint_state
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler
from tests.commands.runner import ROOT, TINY_RUN, Xtuner, scalars
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

FP32 = Path(__file__).with_name("zero2_fp32.json")
MAX_LENGTH = 160
EACH = (
    f"train_dataloader.dataset.max_length={MAX_LENGTH}",
    "model.llm.torch_dtype=float32",
    "default_hooks.logger.interval=1",
    "param_scheduler.warmup_ratio=0.2",
    # No rounding in the optimiser either: Adam divides tiny gradients by their own size.
    "optim_wrapper.optimizer.eps=1e-4",
    "optim_wrapper.optimizer.lr=1e-3",
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, tiny_bases):
    """A corpus in which few packs have an image, and the command that trains on it from a stage 1."""
    folder = tmp_path_factory.mktemp("sparse")
    records = [
        record(f"r{n}", "Which number? " + "Look closely. " * 12, f"It is number {n}.")
        if n % 6
        else record(f"r{n}", "<image>\nWhich number?", f"It is number {n}.", image=f"{n}.png")
        for n in range(24)
    ]
    corpus = write_corpus(
        folder / "corpus", {"sparse": records}, images=[f"{n}.png" for n in range(0, 24, 6)]
    )
    xtuner = Xtuner.tiny(tiny_bases, corpus.mixture, folder / "cache")
    xtuner.train("stage1_shallow", folder / "stage1", *EACH, *layout(2, 2), deepspeed=FP32)
    return folder, xtuner


def layout(batch_size: int, accumulation: int) -> tuple[str, ...]:
    return (
        f"train_dataloader.batch_size={batch_size}",
        f"optim_wrapper.accumulative_counts={accumulation}",
    )


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint_state(work_dir)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], start) -> None:
    assert first.keys() == second.keys()
    moved = [key for key in first if key in start and not torch.equal(first[key], start[key])]
    assert moved, "training changed nothing, the comparison would be empty"
    exact = torch.cat([value.flatten() for value in first.values()])
    assert not torch.equal(exact, exact.half().float()), "the checkpoint was read in half precision"
    for key in first:
        torch.testing.assert_close(
            first[key], second[key], rtol=1e-4, atol=5e-6, msg=lambda m, key=key: f"{key}: {m}"
        )


def packs_of_ranks(folder: Path, tiny_bases: Path, stage: str) -> list[list[list[int]]]:
    """Images of each micro-batch of each of two ranks."""
    dataset = SoftPackedDataset(
        str(folder / "corpus" / "mixture.yaml"),
        stage,
        tokenizer={
            "type": "gmai_xtuner.checkpoint.tokenizer.load_tokenizer",
            "pretrained_model_name_or_path": str(tiny_bases / "llm"),
            "padding_side": "right",
        },
        vision=str(tiny_bases / "vision"),
        cache_dir=str(folder / "cache"),
        max_length=MAX_LENGTH,
    )
    images = dataset.plan.epoch(0).total("images")
    return [
        [
            sum(int(images[ref.pack]) for ref in refs)
            for refs in MicroBatchSampler(
                PackSampler(dataset), 1, accumulative_counts=2, rank=rank, world_size=2
            )
        ]
        for rank in range(2)
    ]


def test_two_ranks_under_zero3_equal_one_where_a_micro_batch_has_no_image(sparse, tiny_bases):
    """Stage 3, in which everything learns; every weight partitioned, as the large ones of the 7B are."""
    folder, xtuner = sparse
    stage = "stage3_instruct"
    first, second = packs_of_ranks(folder, tiny_bases, stage.split("_")[0])
    # The case that could hang: one rank has an image, the other has none.
    assert any((a == 0) != (b == 0) for a, b in zip(first, second, strict=True))

    start = (f"model.pretrained_pth={folder / 'stage1'}", "model.pretrained_parts=[projector]")
    options = (*EACH, *start, "model.loss_chunk_size=8")
    one, two = folder / "one", folder / "two"
    xtuner.train(stage, one, *options, *layout(1, 4), deepspeed=FP32)
    printed = xtuner.train(
        stage, two, *options, *layout(1, 2), deepspeed=FP32.with_name("zero3_fp32.json"), ranks=2
    )
    assert "Loaded projector from" in printed
    assert_same(weights(one), weights(two), weights(folder / "stage1"))
    # Every supervised token counts once in the logged losses: their mean is near ln(1536).
    losses = [row["loss"] for row in scalars(folder / "stage1") if "loss" in row]
    assert np.mean(losses) == pytest.approx(np.log(1536), abs=0.3)


# --- Steps with a NaN, in real runs on two ranks of which one sees it ---


POISON = '''
"""What a test adds to a run: NaN in the pictures of some iterations."""

import os

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

BAD = {int(number) for number in os.environ["BAD_ITERATIONS"].split(",")}


@HOOKS.register_module()
class Poison(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 in BAD and get_rank() == 1:
            data_batch["data"]["pixel_values"][0, 0, 0, 0] = torch.nan
'''
LAYOUT = (
    "train_dataloader.batch_size=2",
    "optim_wrapper.accumulative_counts=2",
    "model.pretrained_pth=None",
    "default_hooks.sample_answer.interval=0",
)
BAD_ITERATIONS = (3, 7, 10)
"""Of 12: early in step 2, early in step 4, late in step 5. Steps 4 and 5 are in a row."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_bases):
    """(folder, what the run printed until it stopped, what the resumed part printed)"""
    folder = tmp_path_factory.mktemp("nonfinite")
    images = [f"{n}.png" for n in range(48)]
    question = "<image>\nWhich number is it? " + "Look. " * 8
    records = [record(f"r{name}", question, f"It is {name}.", image=name) for name in images]
    corpus = write_corpus(folder / "corpus", {"toy": records}, images=images)
    (folder / "poison.py").write_text(POISON)
    base = ROOT / "configs" / "gmai_vl" / "stage2_deep.py"
    imports = 'custom_imports = dict(imports=["gmai_xtuner.plugin", "poison"])\n'
    (folder / "poisoned.py").write_text(
        f'_base_ = ["{base}"]\n{imports}custom_hooks = [dict(type="ProgressHook"), dict(type="Poison")]\n'
    )
    xtuner = Xtuner.tiny(
        tiny_bases,
        corpus.mixture,
        folder / "cache",
        PYTHONPATH=f"{folder}:{ROOT}",
        BAD_ITERATIONS=",".join(map(str, BAD_ITERATIONS)),
    )

    def train(*options: str, resume: bool = False) -> str:
        return xtuner(
            "train", folder / "poisoned.py", "--deepspeed", FP32, "--work-dir", folder / "run",
            *(("--resume", folder / "run") if resume else ()),
            "--cfg-options", *TINY_RUN, *EACH, *LAYOUT, *options,
            ranks=2,
        )  # fmt: skip

    stopped = train("default_hooks.nonfinite.max_in_a_row=1")
    resumed = train("default_hooks.nonfinite.max_in_a_row=2", resume=True)
    return folder, stopped, resumed


def logged(work_dir: Path) -> dict[int, dict[str, float]]:
    rows = {}
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        lines = map(json.loads, file.read_text().splitlines())
        rows.update({row["iter"]: row for row in lines if "lr" in row})
    return rows


def test_a_step_with_a_nan_on_one_rank_is_told_and_survived(runs):
    folder, stopped, _ = runs
    assert "skipped at iteration 4: the loss of micro-batch 3 on rank 1 is not finite" in stopped
    assert "1 skipped in total, 1 in a row" in stopped
    rows = list(map(json.loads, (folder / "run" / "nonfinite.jsonl").read_text().splitlines()))
    assert [(row["rank"], row["iteration"]) for row in rows] == [(1, 3), (1, 7), (1, 10)]
    assert all(len(row["ids"]) == 2 for row in rows)  # the packs of one rank's micro-batch
    for name in rows[0]["ids"]:
        assert name.startswith("toy/r")
        assert name in stopped


def test_the_bound_stops_the_run_with_a_checkpoint_that_resumes(runs):
    folder, stopped, resumed = runs
    told = "2 optimiser steps in a row and 3 in total were not finite; 1 in a row and 20 in total"
    assert f"error: {told}" in stopped
    assert "Saving checkpoint at 10 iterations" in stopped
    assert "Iter(train) [11/12]" not in stopped
    assert "Iter(train) [11/12]" in resumed
    assert (folder / "run" / "iter_12.pth").is_dir()


def test_the_count_survives_the_resume_and_no_logged_loss_is_nan(runs):
    rows = logged(runs[0] / "run")
    assert sorted(rows) == list(range(1, 13))
    assert [rows[number]["skipped_steps"] for number in (2, 4, 6, 8, 10, 12)] == [0, 1, 1, 2, 3, 3]
    assert all(np.isfinite(row["loss"]) for row in rows.values())
    # The schedule goes on where a step is left out.
    assert len({rows[number]["lr"] for number in (4, 6, 8, 10, 12)}) == 5
