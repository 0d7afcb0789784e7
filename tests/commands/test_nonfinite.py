# SPDX-License-Identifier: Apache-2.0

"""Steps with a NaN, in real runs on two ranks of which one sees it.

One image of the corpus is turned into NaN by a hook before certain iterations. The run survives one such
step, then stops where two in a row are too many, and is resumed; it ends with the weights of a run whose
optimiser never saw these three steps.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gmai_xtuner.checkpoint.training import load_checkpoint_state
from tests.commands.runner import ROOT, TINY_RUN, Xtuner, scalars
from tests.commands.test_ranks_and_resume import EACH, FP32
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

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
