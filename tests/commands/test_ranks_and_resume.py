# SPDX-License-Identifier: Apache-2.0

"""One rank, two ranks, other accumulations, an interrupted run: the same weights come out.

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


def test_two_ranks_equal_one_where_a_micro_batch_has_no_image(sparse, tiny_bases):
    """Stage 3, in which everything learns; stage 2 runs on two ranks in ``test_three_stages``."""
    folder, xtuner = sparse
    stage = "stage3_instruct"
    first, second = packs_of_ranks(folder, tiny_bases, stage.split("_")[0])
    # The case that could hang: one rank has an image, the other has none.
    assert any((a == 0) != (b == 0) for a, b in zip(first, second, strict=True))

    start = (f"model.pretrained_pth={folder / 'stage1'}", "model.pretrained_parts=[projector]")
    one, two = folder / f"{stage}-one", folder / f"{stage}-two"
    xtuner.train(stage, one, *EACH, *layout(1, 4), *start, deepspeed=FP32)
    xtuner.train(stage, two, *EACH, *layout(1, 2), *start, deepspeed=FP32, ranks=2)
    assert_same(weights(one), weights(two), weights(folder / "stage1"))


def test_zero3_equals_zero2(sparse):
    """Every weight partitioned, as the large ones of the 7B are; loads, recomputes and saves alike."""
    folder, xtuner = sparse
    start = (f"model.pretrained_pth={folder / 'stage1'}", "model.pretrained_parts=[projector]")
    two, three = folder / "zero2", folder / "zero3"
    options = (*EACH, *layout(4, 1), *start, "model.loss_chunk_size=8")
    xtuner.train("stage3_instruct", two, *options, deepspeed=FP32)
    printed = xtuner.train(
        "stage3_instruct", three, *options, deepspeed=FP32.with_name("zero3_fp32.json")
    )
    assert "Loaded projector from" in printed
    assert_same(weights(two), weights(three), weights(folder / "stage1"))


def test_accumulation_does_not_change_what_is_trained(sparse):
    folder, xtuner = sparse
    runs = {}
    for batch_size, accumulation in ((1, 8), (8, 1)):
        work_dir = folder / f"accumulate-{accumulation}"
        xtuner.train(
            "stage1_shallow", work_dir, *EACH, *layout(batch_size, accumulation), deepspeed=FP32
        )
        runs[accumulation] = weights(work_dir)
    assert_same(runs[8], runs[1], weights(folder / "stage1"))


def test_a_resumed_run_equals_one_never_stopped(sparse):
    folder, xtuner = sparse
    run = folder / "resumed"
    # 24 packs in steps of 10: each epoch ends with a short step of one micro-batch.
    options = (*EACH, *layout(5, 2), "train_cfg.max_epochs=2", "train_dataloader.dataset.seed=3")
    saved = ("default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.max_keep_ckpts=9")
    xtuner.train("stage1_shallow", run, *options, *saved, deepspeed=FP32)
    # Checkpoints after every second optimiser step, losses of every micro-batch.
    assert {path.name for path in run.glob("iter_*.pth")} == {
        "iter_4.pth", "iter_7.pth", "iter_10.pth"
    }  # fmt: skip
    whole = {row["step"]: row["loss"] for row in scalars(run) if "loss" in row}
    undisturbed = weights(run)
    # Every supervised token of an epoch counts once in the logged losses: their mean is near ln(1536).
    assert np.mean(list(whole.values())) == pytest.approx(np.log(1536), abs=0.3)

    resumed_from = run / "iter_4.pth"
    printed = xtuner.train(
        "stage1_shallow", run, *options, *saved, deepspeed=FP32, resume=resumed_from
    )
    resumed = {row["step"]: row["loss"] for row in scalars(run) if "loss" in row}
    assert (min(resumed), max(resumed)) == (5, 10), "a resumed run begins with the next batch"
    assert "Advance dataloader" not in printed
    assert resumed == pytest.approx({k: v for k, v in whole.items() if k > 4}, rel=1e-6)
    assert_same(undisturbed, weights(run), weights(folder / "stage1"))

    # A step of another size would mean other data.
    refused = xtuner(
        "train", "configs/gmai_vl/stage1_shallow.py", "--deepspeed", FP32,
        "--work-dir", folder / "other", "--resume", resumed_from,
        "--cfg-options", *TINY_RUN, *options, *layout(2, 2),
    )  # fmt: skip
    assert "can't go on from iteration 4: packs of an optimiser step: 10 -> 4" in refused
    assert not (folder / "other" / "last_checkpoint").exists()


# --- Steps with a NaN, in real runs on two ranks of which one sees it ---


POISON = '''
"""What a test adds to a run: NaN in the pictures of some iterations, or iterations left out."""

import os

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOOPS

from gmai_xtuner.train.loop import PackedTrainLoop

BAD = {int(number) for number in os.environ["BAD_ITERATIONS"].split(",")}


@HOOKS.register_module()
class Poison(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 in BAD and get_rank() == 1:
            data_batch["data"]["pixel_values"][0, 0, 0, 0] = torch.nan


@LOOPS.register_module()
class LeavingOut(PackedTrainLoop):
    """Steps of two micro-batches; those with a bad one never reach the engine."""

    def run_iter(self, data_batch):
        last = self._iter + 1 + (self._iter + 1) % 2
        if not BAD & {last, last - 1}:
            return super().run_iter(data_batch)
        self._iter += 1
        if self.step_end:
            self.step += 1
            for scheduler in self.runner.param_schedulers:
                scheduler.step()
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
    (folder / "leaving_out.py").write_text(
        f'_base_ = ["{base}"]\n{imports}train_cfg = dict(type="LeavingOut")\n'
    )
    xtuner = Xtuner.tiny(
        tiny_bases,
        corpus.mixture,
        folder / "cache",
        PYTHONPATH=f"{folder}:{ROOT}",
        BAD_ITERATIONS=",".join(map(str, BAD_ITERATIONS)),
    )

    def train(config: str, work_dir: str, *options: str, resume: bool = False) -> str:
        return xtuner(
            "train", folder / f"{config}.py", "--deepspeed", FP32, "--work-dir", folder / work_dir,
            *(("--resume", folder / work_dir) if resume else ()),
            "--cfg-options", *TINY_RUN, *EACH, *LAYOUT, *options,
            ranks=2,
        )  # fmt: skip

    stopped = train("poisoned", "run", "default_hooks.nonfinite.max_in_a_row=1")
    resumed = train("poisoned", "run", "default_hooks.nonfinite.max_in_a_row=2", resume=True)
    train("leaving_out", "reference")
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
    reference = logged(runs[0] / "reference")
    for number in (11, 12):
        assert rows[number]["lr"] == reference[number]["lr"]
        assert rows[number]["loss"] == pytest.approx(reference[number]["loss"], rel=1e-6)


def test_the_weights_are_those_of_a_run_without_these_steps(runs):
    folder, _, _ = runs
    run, reference = (load_checkpoint_state(folder / name) for name in ("run", "reference"))
    assert run.keys() == reference.keys()
    for key, value in run.items():
        assert torch.equal(value, reference[key]), key
    assert {row["iter"] for row in scalars(folder / "reference")} == {1, 2, 5, 6, 11, 12}
