# SPDX-License-Identifier: Apache-2.0

"""The real ``gmai-train``, with the real ``xtuner`` under it: killed, resumed, stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmai_xtuner.train.status import read_status, stored_status
from tests.commands.runner import ROOT, TINY_RUN, Xtuner
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow
PROGRAM = (sys.executable, "-m", "gmai_xtuner.train")


OPTIONS = (
    *TINY_RUN, "train_dataloader.dataset.max_length=160", "train_dataloader.batch_size=2",
    "train_dataloader.dataset.held_out=0", "default_hooks.sample_answer.interval=0",
    "train_cfg.max_epochs=1000",
)  # fmt: skip


def wait_until(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def environment(tiny_bases, tmp_path_factory) -> dict[str, str]:
    """Names tiny bases, and a corpus of eight images."""
    folder = tmp_path_factory.mktemp("stopped")
    images = [f"{number}.png" for number in range(8)]
    records = [record(name, "<image>\nWhich?", name, image=name) for name in images]
    corpus = write_corpus(folder / "corpus", {"toy": records}, images=images)
    return Xtuner.tiny(tiny_bases, corpus.mixture, folder / "cache").environment


def test_killed_it_goes_on_and_ctrl_c_writes_a_checkpoint(environment, tmp_path: Path):
    work_dir = tmp_path / "work"
    command = [*PROGRAM, "stage1_shallow", "--work-dir", str(work_dir), "--resume", *OPTIONS]

    def start() -> subprocess.Popen[str]:
        own = {"cwd": ROOT, "env": environment, "start_new_session": True}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **own)

    def running() -> int:
        """The trainer's process."""
        status = stored_status(work_dir)
        return status["process"] if status.get("state") == "running" else 0

    with start() as first:
        wait_until(running)
        trainer = running()
        first.kill()
    # At once: the run without its launcher is waited for.
    with start() as second:
        wait_until(lambda: running() not in (0, trainer))
        os.killpg(second.pid, signal.SIGINT)  # as in a terminal, where every process gets it
        printed = second.communicate(timeout=240)[0]
    assert "is ending the run that was killed" in printed
    logs = sorted(work_dir.glob("train_*.log"))
    assert "Going on from" in logs[-1].read_text(), logs
    status = read_status(work_dir)
    assert (second.returncode, status["state"], status["reason"]) == (130, "stopped", "Ctrl-C came")
    assert (work_dir / f"iter_{status['iteration']}.pth").is_dir(), printed
