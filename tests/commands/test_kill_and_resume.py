# SPDX-License-Identifier: Apache-2.0

"""A run that is killed again and again, with the one command given each time, equals one never stopped.

To the bit, in fp32, on two ranks, with dropout from torch's generator.
"""

import json
from pathlib import Path

import pytest
import torch

from gmai_xtuner.checkpoint.training import load_checkpoint_state
from tests.commands.runner import ROOT, Xtuner
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

CONFIG = f"""
_base_ = [{str(ROOT / "configs/gmai_vl/stage1_shallow.py")!r}]
custom_imports = dict(
    imports=["gmai_xtuner.plugin", "tests.commands.killing"], allow_failed_imports=False
)
custom_hooks = [dict(type="ProgressHook"), dict(type="DropoutHook"), dict(type="KillHook")]
"""
OPTIONS = (
    "train_dataloader.dataset.max_length=160",
    "train_dataloader.batch_size=2",
    "optim_wrapper.accumulative_counts=2",
    "optim_wrapper.optimizer.lr=1e-3",
    "model.llm.torch_dtype=float32",
    "train_cfg.max_epochs=2",
    "default_hooks.checkpoint.interval=2",
    # Not where checkpoints are: what the log has counted so far must come back as well.
    "default_hooks.logger.interval=3",
)
"""24 packs: 12 micro-batches in two epochs, 6 optimiser steps; checkpoints after 4, 8 and 12."""


class Command:
    """The one command: ``xtuner train CONFIG --work-dir DIR --resume DIR`` on two ranks."""

    def __init__(self, folder: Path, tiny_bases: Path, work_dir: Path) -> None:
        self.folder = folder
        self.tiny_bases = tiny_bases
        self.work_dir = work_dir

    def __call__(self, kill: str = "none:0:0", workers: int = 1) -> str:
        xtuner = Xtuner.tiny(
            self.tiny_bases,
            self.folder / "corpus" / "mixture.yaml",
            self.folder / "cache",
            GMAI_TEST_KILL=kill,
            PYTHONPATH=ROOT,
        )
        return xtuner(
            "train", self.folder / "killed.py",
            "--deepspeed", Path(__file__).with_name("zero2_fp32.json"),
            "--work-dir", self.work_dir, "--resume", self.work_dir,
            "--cfg-options", f"train_dataloader.num_workers={workers}", *OPTIONS,
            ranks=2,
        )  # fmt: skip

    def found(self) -> list[str]:
        return sorted(path.name for path in self.work_dir.glob("iter_*"))

    def pointer(self) -> str:
        return Path((self.work_dir / "last_checkpoint").read_text()).name

    def logged(self) -> list[tuple[int, float, float, float]]:
        """(iteration, loss, rate, gradient norm) of all runs, in the order of time."""
        return [
            (row["step"], row["loss"], row["lr"], row["grad_norm"])
            for file in sorted(self.work_dir.glob("*/vis_data/scalars.json"))
            for row in map(json.loads, file.read_text().splitlines())
            if "loss" in row
        ]


@pytest.fixture(scope="module")
def commands(tmp_path_factory, tiny_bases):
    """The command in a work dir where nothing happens, done; and in one where everything will."""
    folder = tmp_path_factory.mktemp("killed")
    pictures = [f"{number}.png" for number in range(24)]
    # Two of these don't fit into 160 tokens: a conversation is a pack.
    question = "<image>\nWhich number? " + "Look closely. " * 5
    records = [
        record(name, question, f"It is number {number}.", image=name)
        for number, name in enumerate(pictures)
    ]
    write_corpus(folder / "corpus", {"pictures": records}, images=pictures)
    (folder / "killed.py").write_text(CONFIG)
    whole = Command(folder, tiny_bases, folder / "whole")
    printed = whole(workers=0)
    assert "beginning at the beginning" in printed
    assert whole.found() == ["iter_12.pth", "iter_8.pth"], printed[-4000:]
    return whole, Command(folder, tiny_bases, folder / "cut")


def test_killed_at_any_moment_and_resumed_it_equals_one_never_stopped(commands):
    whole, cut = commands

    # Rank 0 dies in a later iteration with half of its optimiser state in the file (between two checkpoints:
    # test_elastic).
    printed = cut("writing:8:0")
    assert "beginning at the beginning" in printed
    assert cut.found() == ["iter_4.pth", "iter_8.pth.writing"]
    assert cut.pointer() == "iter_4.pth"

    # Rank 0 dies when the checkpoint has its name, and the pointer still names the one before.
    printed = cut("renamed:8:0")
    assert "Removed iter_8.pth.writing" in printed
    assert f"Going on from {cut.work_dir / 'iter_4.pth'}" in printed
    assert cut.found() == ["iter_4.pth", "iter_8.pth"]
    assert cut.pointer() == "iter_4.pth"

    # The scheduler ends the job: rank 1 and its workers get SIGTERM. Iteration 9 is inside a step.
    printed = cut("between:9:1:SIGTERM")
    assert f"Going on from {cut.work_dir / 'iter_8.pth'}" in printed
    assert "Stopped after iteration 10 of 12, because SIGTERM came" in printed
    assert f"give the same command with --resume {cut.work_dir}" in printed
    assert "Error" not in printed
    assert cut.pointer() == "iter_10.pth"

    # Undisturbed, it finishes. What somebody began to copy there meanwhile is passed over by name.
    (cut.work_dir / "iter_11.pth").mkdir()
    printed = cut()
    assert "iter_11.pth is incomplete" in printed
    assert f"Going on from {cut.work_dir / 'iter_10.pth'}" in printed
    assert cut.found() == ["iter_10.pth", "iter_11.pth", "iter_12.pth"]

    expected = whole.logged()
    assert [row[0] for row in expected] == [3, 6, 9, 12]
    assert len({row[1] for row in expected}) == 4
    assert list(dict.fromkeys(row[0] for row in cut.logged())) == [3, 6, 9, 12]
    assert set(cut.logged()) == set(expected)
    weights, undisturbed = map(load_checkpoint_state, (cut.work_dir, whole.work_dir))
    assert weights.keys() == undisturbed.keys()
    for key in weights:
        assert torch.equal(weights[key], undisturbed[key]), key
