# SPDX-License-Identifier: Apache-2.0

"""Ctrl-C in a terminal: every process of the command gets ``SIGINT``, and a checkpoint is written."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gmai_xtuner.train.status import ALIVE, stored_status
from tests.commands.runner import ROOT, TINY_RUN, Xtuner
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow


def wait_until(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ctrl_c_writes_a_checkpoint(tiny_bases: Path, tmp_path: Path):
    images = [f"{number}.png" for number in range(8)]
    records = [record(name, "<image>\nWhich?", name, image=name) for name in images]
    corpus = write_corpus(tmp_path / "corpus", {"toy": records}, images=images)
    xtuner = Xtuner.tiny(tiny_bases, corpus.mixture, tmp_path / "cache")
    work_dir, log = tmp_path / "work", tmp_path / "log"
    options = ("train_dataloader.dataset.max_length=160", "train_dataloader.batch_size=2")
    with log.open("w") as out:
        command = subprocess.Popen(
            [
                "xtuner", "train", "configs/gmai_vl/stage1_shallow.py", "--deepspeed", "zero2",
                "--work-dir", str(work_dir), "--cfg-options", *TINY_RUN, *options,
                "train_dataloader.dataset.held_out=0", "train_cfg.max_epochs=1000",
            ],
            cwd=ROOT, env=xtuner.environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    wait_until(lambda: "Iter(train)" in log.read_text() or command.poll() is not None)
    os.killpg(command.pid, signal.SIGINT)
    command.wait(60)
    wait_until(lambda: stored_status(work_dir).get("state") not in ALIVE)
    status = stored_status(work_dir)
    assert (status["state"], status["reason"]) == ("stopped", "Ctrl-C came"), log.read_text()[
        -3000:
    ]
    assert (work_dir / f"iter_{status['iteration']}.pth").is_dir()
