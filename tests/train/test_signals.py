# SPDX-License-Identifier: Apache-2.0

"""Requests to stop: who hears them, and who does not die of them."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from gmai_xtuner.train import signals
from gmai_xtuner.train.signals import StopRequest, guard_workers


@pytest.fixture
def stop(tmp_path):
    request = StopRequest(tmp_path / "stop")
    request.install()
    yield request
    request.restore()


def test_nothing_asked_nothing_agreed(stop):
    assert stop.agreed() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_agreed_at_the_end_of_the_step(stop, number):
    os.kill(os.getpid(), number)
    assert stop.agreed() == f"{number.name} came"


def test_a_file_in_the_work_dir_asks_as_well(stop):
    stop.stop_file.touch()
    assert stop.agreed() == f"there is a file {stop.stop_file}"


def test_a_hook_can_ask(stop):
    stop.ask("the disk is nearly full")
    assert stop.agreed() == "the disk is nearly full"


def test_all_ranks_stop_when_one_was_asked(stop, monkeypatch):
    def another_rank_heard(tensor, op):
        assert op == "max"
        tensor.clamp_(min=signal.SIGTERM)

    monkeypatch.setattr(signals, "all_reduce", another_rank_heard)
    assert stop.agreed() == "SIGTERM came"


def test_handlers_from_before_come_back(tmp_path):
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    request = StopRequest(tmp_path / "stop")
    request.install()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    request.restore()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


CHILD = """
import importlib.util, sys, time
from pathlib import Path
# Without the rest of the package, which takes long to import.
spec = importlib.util.spec_from_file_location("signals", sys.argv[2])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
request = signals.StopRequest(Path(sys.argv[1]))
print("ready", request.agreed(), flush=True)
while (reason := request.agreed()) is None:
    time.sleep(0.05)
Path(sys.argv[1]).write_text(reason)
"""


def test_the_trainer_stops_when_the_xtuner_command_above_it_is_killed(tmp_path):
    """``xtuner`` hands no signal on: its trainer would train on without a parent."""
    launcher = tmp_path / "xtuner"
    launcher.write_text("import subprocess, sys; subprocess.run(sys.argv[1:])")
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, str(launcher), sys.executable, str(tmp_path / "child.py")]
    command += [str(tmp_path / "told"), signals.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"ready None\n"
        started.kill()
    deadline = time.monotonic() + 10
    while not (tmp_path / "told").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "xtuner command that started this run has gone" in (tmp_path / "told").read_text()


class Items(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return os.getpid()


def test_data_loader_workers_survive_a_signal_to_the_whole_job_and_go_on(stop, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    loader = DataLoader(
        Items(), num_workers=1, worker_init_fn=lambda number: (marks / str(number)).touch()
    )
    guard_workers(loader)
    batches = iter(loader)
    worker = int(next(batches))
    assert worker != os.getpid()
    assert (marks / "0").exists(), "the loader's own init function was lost"
    send = f"import os; [os.kill({worker}, number) for number in {[*map(int, signals.SIGNALS)]}]"
    subprocess.run([sys.executable, "-c", send], check=True)
    assert {int(batch) for batch in batches} == {worker}, "the worker gave the whole epoch"
    assert stop.agreed() is None


def test_a_stuck_worker_still_ends_when_its_trainer_says():
    loader = DataLoader(Items(), num_workers=1)
    guard_workers(loader)
    worker = int(next(batches := iter(loader)))
    process = batches._workers[0]
    assert process.pid == worker
    process.terminate()
    process.join(timeout=10)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()  # a deaf one would keep the tests from ending


def test_starting_workers_draws_nothing_from_the_generator_of_dropout():
    loader = DataLoader(Items(), num_workers=1)
    before = torch.get_rng_state()
    iter(loader)
    assert not torch.equal(torch.get_rng_state(), before), "torch does not draw, nothing to guard"
    guard_workers(loader)
    before = torch.get_rng_state()
    iter(loader)
    assert torch.equal(torch.get_rng_state(), before)
