# SPDX-License-Identifier: Apache-2.0

"""``gmai-train`` over the real ``xtuner``: stopped, killed, resumed, and a config that is no Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gmai_xtuner.train.status import ALIVE, read_status, stored_status
from tests.commands.runner import ROOT, TINY_RUN, Xtuner
from tests.commands.test_ctrl_c import wait_until
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow
PROGRAM = (sys.executable, "-m", "gmai_xtuner.train")


def test_stopped_then_killed_it_goes_on_each_time(tiny_bases: Path, tmp_path: Path):
    images = [f"{number}.png" for number in range(8)]
    records = [record(name, "<image>\nWhich?", name, image=name) for name in images]
    corpus = write_corpus(tmp_path / "corpus", {"toy": records}, images=images)
    environment = Xtuner.tiny(tiny_bases, corpus.mixture, tmp_path / "cache").environment
    work_dir = tmp_path / "work"
    command = [
        *PROGRAM, "stage1_shallow", "--work-dir", str(work_dir), "--resume", *TINY_RUN,
        "train_dataloader.dataset.max_length=160", "train_dataloader.batch_size=2",
        "train_dataloader.dataset.held_out=0", "default_hooks.sample_answer.interval=0",
    ]  # fmt: skip

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
    with start(f"train_cfg.max_iters={iteration() + 20}", "train_cfg.max_epochs=None") as third:
        printed = third.communicate(timeout=240)[0]
    assert (third.returncode, stored_status(work_dir)["state"]) == (0, "finished"), printed
    assert "is ending the run that was killed" in printed
    assert read_status(work_dir)["state"] not in ALIVE


def test_a_config_that_is_no_python_fails_with_a_reason_and_a_status(tmp_path: Path):
    config = tmp_path / "broken.py"
    config.write_text("model = dict(\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [*PROGRAM, str(config)], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 1
    assert "'(' was never closed" in done.stdout
    assert len(done.stdout.splitlines()) < 5, done.stdout
    status = stored_status(tmp_path / "work_dirs" / "broken")
    assert status["state"] == "failed"
    assert "broken.py" in status["reason"]
    assert "'(' was never closed" in status["reason"]
