# SPDX-License-Identifier: Apache-2.0

"""The real ``xtuner``, alone and under ``gmai-train``: stopped, killed, resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmai_xtuner.train.status import ALIVE, read_status, stored_status
from tests.commands.runner import ROOT, TINY_RUN, Xtuner
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow
PROGRAM = (sys.executable, "-m", "gmai_xtuner.train")


OPTIONS = (
    *TINY_RUN, "train_dataloader.dataset.max_length=160", "train_dataloader.batch_size=2",
    "train_dataloader.dataset.held_out=0", "default_hooks.sample_answer.interval=0",
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


def test_ctrl_c_writes_a_checkpoint(environment, tmp_path: Path):
    """In a terminal every process of the command gets ``SIGINT``."""
    work_dir = tmp_path / "work"
    command = [
        "xtuner", "train", "configs/gmai_vl/stage1_shallow.py", "--deepspeed", "zero2", "--work-dir",
        str(work_dir), "--cfg-options", *OPTIONS, "train_cfg.max_epochs=1000",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    wait_until(lambda: stored_status(work_dir).get("state") == "running")
    os.killpg(started.pid, signal.SIGINT)
    started.wait(60)
    wait_until(lambda: stored_status(work_dir).get("state") not in ALIVE)
    status = stored_status(work_dir)
    told = (tmp_path / "log").read_text()[-3000:]
    assert (status["state"], status["reason"]) == ("stopped", "Ctrl-C came"), told
    assert (work_dir / f"iter_{status['iteration']}.pth").is_dir()


def test_stopped_then_killed_it_goes_on_each_time(environment, tmp_path: Path):
    work_dir = tmp_path / "work"
    command = [*PROGRAM, "stage1_shallow", "--work-dir", str(work_dir), "--resume", *OPTIONS]

    def iteration() -> int:
        return stored_status(work_dir).get("iteration", 0)

    def start(*options: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*command, *options], cwd=ROOT, env=environment, stdout=pipe, text=True
        )

    with start("train_cfg.max_epochs=1000") as first:
        wait_until(lambda: stored_status(work_dir).get("state") == "running")
        first.send_signal(signal.SIGINT)
        printed = first.communicate(timeout=120)[0]
    status = stored_status(work_dir)
    assert (first.returncode, status["state"], status["reason"]) == (130, "stopped", "Ctrl-C came")
    assert (work_dir / f"iter_{status['iteration']}.pth").is_dir(), printed
    with start("train_cfg.max_epochs=1000") as second:
        wait_until(lambda: stored_status(work_dir).get("state") == "running")
        second.kill()
    # At once: the run without its launcher is waited for.
    with start(f"train_cfg.max_iters={iteration() + 4}", "train_cfg.max_epochs=None") as third:
        printed = third.communicate(timeout=240)[0]
    assert (third.returncode, stored_status(work_dir)["state"]) == (0, "finished"), printed
    assert "is ending the run that was killed" in printed
    assert read_status(work_dir)["state"] not in ALIVE
