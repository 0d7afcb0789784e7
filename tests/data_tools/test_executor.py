# SPDX-License-Identifier: Apache-2.0

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_tools.executor import IN_FLIGHT, open_executor
from gmai_xtuner.core.errors import CorpusError
from tests.data_tools.conftest import draw, files_of, generate


def slower_at_first(number: int) -> int:
    time.sleep(0.02 if number < 2 else 0)
    return number * number


def die(name: Path, number: int) -> int:
    """Ends its process at 5; at 7 the first time only."""
    if number == 5 or (number == 7 and not name.exists()):
        name.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    if number == 3:
        raise CorpusError("three")
    return number


def test_results_come_in_the_order_of_the_inputs():
    with open_executor("processes", 2) as engine:
        assert list(engine.map(slower_at_first, range(50))) == [(i, i * i) for i in range(50)]


def test_inputs_are_read_no_further_than_the_window():
    read = []

    def inputs():
        for number in range(1000):
            read.append(number)
            yield number

    with open_executor("processes", 2) as engine:
        results = engine.map(slower_at_first, inputs())
        for taken in range(1, 20):
            next(results)
            assert taken <= len(read) <= taken + 2 * IN_FLIGHT
        results.close()


def test_one_worker_is_this_process():
    with open_executor("processes", 1) as engine:
        assert dict(engine.map(lambda _: os.getpid(), range(2))) == dict.fromkeys(
            (0, 1), os.getpid()
        )


def test_a_worker_that_dies_costs_the_one_task_that_kills_it(tmp_path):
    died = []

    def instead(number: int) -> int:
        died.append(number)
        return -number

    with open_executor("processes", 2) as engine:
        results = list(engine.map(partial(die, tmp_path / "once"), range(12), died=instead))
    assert died == [5]
    assert results == [(number, -5 if number == 5 else number) for number in range(12)]


def test_a_worker_that_dies_is_an_error_if_nothing_stands_for_its_result(tmp_path):
    with (
        open_executor("processes", 2) as engine,
        pytest.raises(CorpusError, match="a worker process died"),
    ):
        list(engine.map(partial(die, tmp_path / "once"), range(12)))


def test_an_error_of_the_function_is_raised():
    with open_executor("processes", 2) as engine:
        results = engine.map(fail, range(10))
        assert [next(results)[1] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(CorpusError, match="three"):
            next(results)


def test_no_worker_outlives_a_parent_that_is_killed():
    code = (
        "import time\n"
        "from data_tools.executor import open_executor\n"
        "if __name__ == '__main__':\n"
        "    with open_executor('processes', 2) as engine:\n"
        "        results = engine.map(time.sleep, [0, 0, 60, 60])\n"
        "        next(results); next(results)\n"
        "        print('working', flush=True)\n"
        "        next(results)\n"
    )
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "working\n"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def use_ray(directory: Path) -> None:
    """What `open_executor("ray")` promises; for a process of its own, which Ray's C++ code can abort."""
    import ray

    with open_executor("ray", 2) as engine:
        assert engine.workers == 2
        assert list(engine.map(slower_at_first, range(50))) == [(i, i * i) for i in range(50)]
        died: list[int] = []
        task = partial(die, directory / "once")
        results = list(engine.map(task, range(8), died=lambda n: died.append(n) or -n))
        assert [made for _, made in results] == [0, 1, 2, 3, 4, -5, 6, 7]
        assert died == [5]
        with pytest.raises(CorpusError, match="three"):
            list(engine.map(fail, range(10)))
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        commands = [
            " ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)
        ]
        assert any("gcs_server" in line for line in commands)
        assert not any(
            "dashboard/dashboard.py" in line and "--minimal" not in line for line in commands
        )
    assert not ray.is_initialized()


@pytest.mark.slow
def test_ray_gives_the_same_and_reports_to_nobody(tmp_path):
    pytest.importorskip("ray")
    code = f"from tests.data_tools.test_executor import *; use_ray(Path({str(tmp_path)!r}))"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    for _ in range(3):
        (tmp_path / "once").unlink(missing_ok=True)
        made = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
        )
        # Ray itself sometimes aborts when a worker dies ("Tried to complete task that was not pending").
        if made.returncode != -signal.SIGABRT or "discovered a bug in Ray" not in made.stderr:
            break
    assert made.returncode == 0, made.stderr


@pytest.mark.slow
def test_a_job_on_ray_gives_the_same_corpus(classes, make_job, tmp_path):
    pytest.importorskip("ray")
    for number in range(6, 40):  # more than are in flight
        draw(classes / "TUM" / f"image {number}.png", number)
    for name, keys in (("out", {}), ("ray", {"workers": 2, "engine": "ray"})):
        made = generate(make_job({}, **keys), "--output", tmp_path / name)
        assert made.returncode == 0, made.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "ray")
