# SPDX-License-Identifier: Apache-2.0

"""Who owns a work dir, and what its ``status.json`` says whatever happens."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import status
from gmai_xtuner.train.status import (
    Run,
    failure_recorded,
    in_plain_words,
    read_status,
    store_status,
    stored_status,
)

OTHER = """
import sys, time
from pathlib import Path
from gmai_xtuner.train import status
run = status.Run(Path(sys.argv[1]), resumes=True)
run.progress = lambda: (12, 300)
run.write("running")
status.start_keeper(run)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_run_yet(monkeypatch):
    monkeypatch.setattr(status, "_current", None)
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def other(tmp_path):
    """A process that runs in the work dir ``tmp_path``, as a trainer does."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def wait_for(state: str, work_dir: Path) -> dict:
    deadline = time.monotonic() + 10
    while stored_status(work_dir).get("state") != state and time.monotonic() < deadline:
        time.sleep(0.05)
    return stored_status(work_dir)


def test_a_run_says_where_it_is_from_the_start_on(tmp_path):
    with failure_recorded(tmp_path / "work", resumes=False) as run:
        now = stored_status(run.work_dir)
        assert (now["state"], now["iteration"], now["of"]) == ("starting", 0, None)
        assert now["process"] == os.getpid()
        run.progress = lambda: (4, 8)
        run.renew(0)
        now = stored_status(run.work_dir)
        assert (now["state"], now["iteration"], now["of"]) == ("running", 4, 8)
        run.write("stopped", "a signal")
    assert stored_status(run.work_dir)["reason"] == "a signal"


def test_a_failure_is_told_with_its_reason_and_goes_on(tmp_path):
    store_status(tmp_path, {"state": "finished"})
    with pytest.raises(ValueError, match="no data"), failure_recorded(tmp_path, resumes=False):
        raise ValueError("no data")
    assert stored_status(tmp_path)["state"] == "failed"
    assert stored_status(tmp_path)["reason"] == "ValueError: no data"


def test_a_living_run_keeps_its_work_dir_and_its_status(tmp_path, other):
    before = (tmp_path / "status.json").read_bytes()
    expected = rf"process {other.pid} on .*, since 20.* \(running, iteration 12 of 300\)"
    for resumes in (False, True):
        with pytest.raises(GMAIError, match=expected):
            Run(tmp_path, resumes=resumes)
    assert (tmp_path / "status.json").read_bytes() == before


def test_a_killed_run_is_said_to_have_failed_and_gives_its_work_dir_back(tmp_path, other):
    other.kill()
    other.wait()
    assert read_status(tmp_path)["state"] == "failed"
    now = wait_for("failed", tmp_path)
    assert (now["process"], now["iteration"], now["reason"]) == (other.pid, 12, status.GONE)
    Run(tmp_path, resumes=True).release()
    assert stored_status(tmp_path)["process"] == os.getpid()


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_on_another_machine_is_watched(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(status, "HEARTBEAT", 0.05)
    monkeypatch.setattr(status, "LOOK", 0.4)
    theirs = {"state": "running", "host": "node7", "process": os.getpid(), "since": "Monday"}
    store_status(tmp_path, theirs)
    stop = threading.Event()

    def beat() -> None:
        while alive and not stop.wait(0.05):
            os.utime(tmp_path / "status.json")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        if alive:
            with pytest.raises(GMAIError, match="on node7, since Monday"):
                Run(tmp_path, resumes=True)
            assert stored_status(tmp_path) == theirs
        else:
            Run(tmp_path, resumes=True).release()
            assert stored_status(tmp_path)["process"] == os.getpid()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("alive", [True, False])
def test_where_the_file_system_has_no_locks_the_process_is_looked_for(
    tmp_path, monkeypatch, other, alive
):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not alive:
        store_status(tmp_path, {**stored_status(tmp_path), "process": 2**22 - 1})
    monkeypatch.setattr(status.fcntl, "lockf", no_locks)
    if alive:
        with pytest.raises(GMAIError, match=f"process {other.pid}"):
            Run(tmp_path, resumes=True)
    else:
        Run(tmp_path, resumes=True).release()


def test_old_checkpoints_are_overwritten_by_no_forgotten_resume(tmp_path):
    (tmp_path / "iter_8.pth").mkdir()
    store_status(tmp_path, {"state": "finished"})
    with pytest.raises(GMAIError, match=rf"iter_8\.pth.*--resume {tmp_path}"):
        Run(tmp_path, resumes=False)
    assert stored_status(tmp_path) == {"state": "finished"}
    Run(tmp_path, resumes=True).release()


def test_a_full_disk_masks_no_error_and_leaves_no_running(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_room(*_: object) -> None:
        raise full

    def train() -> None:
        with failure_recorded(tmp_path, resumes=False) as run:
            run.write("running")
            monkeypatch.setattr(status, "replace_text", no_room)
            raise full

    with pytest.raises(OSError, match="No space left") as caught:
        train()
    assert caught.value is full
    now = stored_status(tmp_path)
    assert now["state"] == "failed"
    assert now["reason"].startswith("the disk is full: make room")


def test_another_rank_says_why_it_failed_and_is_not_overwritten(tmp_path, monkeypatch):
    first = Run(tmp_path, resumes=False)
    monkeypatch.setenv("RANK", "3")
    second = Run(tmp_path, resumes=False)
    second.write("running")
    assert stored_status(tmp_path)["state"] == "starting"
    second.failed(GMAIError("an image is damaged"))
    first.failed(RuntimeError("Connection closed by peer"))
    assert stored_status(tmp_path)["reason"] == "rank 3: an image is damaged"


def failed_import() -> BaseException:
    try:
        try:
            raise ModuleNotFoundError("No module named 'nibabel'")
        except ImportError:
            raise ImportError("Failed to import gmai_xtuner.plugin") from None
    except ImportError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GMAIError("set it to 2"), "set it to 2"),
        (KeyboardInterrupt(), "Ctrl-C came"),
        (MemoryError(), "the memory of this machine"),
        (failed_import(), "a package is missing"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "kernel"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory of the GPU"),
        (RuntimeError("[enforce fail at inline_container.cc:659] . unexpected"), "disk is full"),
        (AssertionError("Check batch related parameters"), "does not take a setting of this run"),
        (RuntimeError("[../gloo/pair.cc:525] Connection closed by peer"), "another rank"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_errors_in_plain_words(error, words):
    told = in_plain_words(error)
    assert words in told
    assert not str(error).strip("'") or str(error) in told or "nibabel" in told


@pytest.mark.parametrize(
    ("text", "options", "before", "reason"),
    [
        ('_base_ = ["stage1_shallow.py"]\na = (\n', [], None, "syntax (mine.py, line 2)"),
        ("x = 1  # gmai\n", ["--cfg-options", "a", "--seed", "1"], "failed", "_base_"),
        (None, [], None, "_base_"),
        ("model = (\n", [], None, None),
        ("# gmai\nmodel = (\n", [], "finished", None),
        ("# gmai\nmodel = (\n", [], "running", None),
    ],
)
def test_a_start_before_the_plugin_that_fails_says_so(
    text, options, before, reason, tmp_path, monkeypatch, capsys
):
    def parse_args() -> argparse.Namespace:
        assert "a" not in sys.argv  # what is wrong in --cfg-options is not read again
        return argparse.Namespace(config="mine.py", work_dir="w")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "mine.py", *options])
    monkeypatch.setattr(sys.modules["__main__"], "parse_args", parse_args, raising=False)
    if text is not None:
        Path("mine.py").write_text(text)
    if before is not None:
        Path("w").mkdir()
        store_status(Path("w"), {"state": before, "iteration": 9, **status.owner_now()})
    stored = stored_status(Path("w"))
    status.record_failed_start(SyntaxError, SyntaxError("syntax"), None)
    if reason is None:
        assert stored_status(Path("w")) == stored
    else:
        now = stored_status(Path("w"))
        assert (now["state"], now["iteration"]) == ("failed", 0)
        assert reason in now["reason"]
        assert f"error: {now['reason']}" in capsys.readouterr().err


def test_the_keeper_ends_with_a_trainer_that_ends(tmp_path):
    script = OTHER.replace("time.sleep(60)", "run.write('finished')")
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=30)
    assert time.monotonic() - begun < 20
    assert stored_status(tmp_path)["state"] == "finished"


def test_ctrl_c_ends_no_command_that_is_not_xtuner(tmp_path, other):
    """The keeper hears it too; it may end the xtuner command above, and nothing else."""
    children = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGINT)
    time.sleep(0.5)
    assert other.poll() is None
    other.kill()
    assert wait_for("failed", tmp_path)["state"] == "failed"
