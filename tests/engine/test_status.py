from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gmai_xtuner.engine.status import STATUS_FILE, told


@pytest.fixture
def loop(tmp_path):
    return SimpleNamespace(runner=SimpleNamespace(work_dir=str(tmp_path)), iter=4, max_iters=8)


def status(loop) -> dict[str, object]:
    with open(f"{loop.runner.work_dir}/{STATUS_FILE}") as file:
        return json.load(file)


def test_a_run_under_way_says_so(loop):
    with told(loop):
        assert status(loop) == {"state": "running", "iteration": 4, "of": 8, "reason": ""}


def test_the_end_is_told_from_a_stop_on_the_way(loop):
    with told(loop):
        loop.iter = 6
    assert status(loop) == {"state": "stopped", "iteration": 6, "of": 8, "reason": ""}
    with told(loop):
        loop.iter = 8
    assert status(loop)["state"] == "finished"


def test_a_failure_is_told_with_its_reason_and_goes_on(loop):
    with pytest.raises(ValueError, match="no data"), told(loop):
        raise ValueError("no data")
    assert status(loop)["state"] == "failed"
    assert status(loop)["reason"] == "ValueError: no data"
