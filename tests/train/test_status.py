from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from gmai_xtuner.train.status import STATUS_FILE, log_failure, log_status, write_status


@pytest.fixture
def loop(tmp_path):
    return SimpleNamespace(
        runner=SimpleNamespace(work_dir=str(tmp_path)), iter=4, max_iters=8, stop_reason="a signal"
    )


def status(loop) -> dict[str, object]:
    with open(f"{loop.runner.work_dir}/{STATUS_FILE}") as file:
        return json.load(file)


def test_a_run_under_way_says_so(loop):
    with log_status(loop):
        now = status(loop)
    assert (now["state"], now["iteration"], now["of"], now["reason"]) == ("running", 4, 8, "")
    assert now["process"] == os.getpid()


def test_the_end_is_told_from_a_stop_on_the_way(loop):
    with log_status(loop):
        loop.iter = 6
    now = status(loop)
    assert (now["state"], now["iteration"], now["reason"]) == ("stopped", 6, "a signal")
    with log_status(loop):
        loop.iter = 8
    assert status(loop)["state"] == "finished"


def test_a_failure_is_told_with_its_reason_and_goes_on(loop):
    with pytest.raises(ValueError, match="no data"), log_status(loop):
        raise ValueError("no data")
    assert status(loop)["state"] == "failed"
    assert status(loop)["reason"] == "ValueError: no data"


def test_a_failure_before_training_does_not_leave_the_end_of_an_earlier_run(loop, tmp_path):
    write_status(tmp_path, "finished", iteration=8, of=8)
    seen = []

    def read_data() -> None:
        with log_failure(tmp_path):
            seen.append(status(loop)["state"])
            raise ValueError("bad records")

    with pytest.raises(ValueError, match="bad records"):
        read_data()
    assert seen == ["starting"]
    assert (status(loop)["state"], status(loop)["of"]) == ("failed", None)
    assert status(loop)["reason"] == "ValueError: bad records"
