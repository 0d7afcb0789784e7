# SPDX-License-Identifier: Apache-2.0

"""``gmai-train`` over a stand-in for ``xtuner`` that does in no time what a run does."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import launch
from gmai_xtuner.train.__main__ import main
from gmai_xtuner.train.launch import Screen
from gmai_xtuner.train.status import GONE, stored_status

XTUNER = """#!{python}
import json, os, signal, socket, sys, time
from pathlib import Path

arguments = sys.argv[1:]
fake = os.environ["FAKE"]
sys.stdout.reconfigure(line_buffering=True)
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([*arguments, os.environ.get("NPROC_PER_NODE")]), file=calls)
if arguments[0] == "convert":
    if fake != "no convert":
        Path(arguments[4]).mkdir()
        Path(arguments[4], "config.json").write_text("{{}}")
    sys.exit(print("error: another geometry"))
work = Path(arguments[arguments.index("--work-dir") + 1])

def say(state, reason="", process=os.getpid()):
    status = {{"state": state, "reason": reason, "iteration": 7, "process": process}}
    status |= {{"host": socket.gethostname(), "since": str(time.time()), "time": "t"}}
    (work / "status.json").write_text(json.dumps(status))

if fake == "syntax":
    sys.exit(print("Traceback\\n  File x\\nSyntaxError: in config x.py: '(' was never closed"))
if fake == "other":  # another run begins in the same moment
    say("running", process=os.getppid())
    sys.exit(print("error: work dir belongs to another run"))
if fake == "refuse":
    sys.exit(print("error: work dir belongs to another run"))
say("running")
print("11/30 09:05:57 - mmengine - INFO - Iter(train) [1/7]  lr: 1.0e-03  eta: 0:00:09  loss: 7.2")
if fake in ("wait", "deaf"):
    stop = lambda number, _: sys.exit(say("stopped", signal.Signals(number).name + " came"))
    signal.signal(signal.SIGTERM, stop if fake == "wait" else signal.SIG_IGN)
    time.sleep(60)
if fake == "die":
    os.kill(os.getpid(), signal.SIGKILL)
failing = fake == "fail" or fake == work.name
if not failing:
    (work / "last_checkpoint").touch()
say({{"touch": "stopped"}}.get(fake, "failed" if failing else "finished"), "out of memory" if failing else "")
"""


@pytest.fixture
def xtuner(tmp_path, monkeypatch):
    """Put the stand-in where ``xtuner`` is looked for; returns a setter of what it does, and its calls."""
    tool = tmp_path / "bin" / "xtuner"
    tool.parent.mkdir()
    tool.write_text(XTUNER.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setattr(launch, "_path", lambda: f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(tmp_path)

    def calls() -> list[list[str]]:
        lines = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").write_text("")
        return [json.loads(line) for line in lines]

    return lambda does: monkeypatch.setenv("FAKE", does), calls


@pytest.mark.parametrize(
    ("does", "exit_status", "state", "reason"),
    [
        ("finish", 0, "finished", ""),
        ("fail", 1, "failed", "out of memory"),
        ("touch", 3, "stopped", ""),
        ("die", 1, "failed", GONE),
        ("syntax", 1, "failed", "SyntaxError: in config x.py: '(' was never closed"),
    ],
)
def test_the_exit_status_and_the_status_file_say_how_a_run_ended(
    does, exit_status, state, reason, xtuner, tmp_path, capsys
):
    xtuner[0](does)
    assert main(["stage1_shallow", "--work-dir", "w", "a.b=1", "--nproc", "2"]) == exit_status
    shown = capsys.readouterr().out
    assert re.search(rf"^{state}", shown, re.MULTILINE)
    assert reason in shown
    if does != "die":  # no keeper beside the stand-in
        assert stored_status(tmp_path / "w")["state"] == state
        assert stored_status(tmp_path / "w")["reason"].startswith(reason)
    assert ("1/7  loss 7.2  rate 1.0e-03  eta 0:00:09" in shown) == (does != "syntax")
    ((verb, config, *options),) = xtuner[1]()
    assert (verb, Path(config).name) == ("train", "stage1_shallow.py")
    assert Path(config).is_file()
    assert options == ["--work-dir", "w", "--deepspeed", "zero2", "--cfg-options", "a.b=1", "2"]


def test_a_syntax_error_has_its_file_and_line(xtuner, tmp_path, capsys):
    xtuner[0]("syntax")
    (tmp_path / "mine.py").write_text("a = 1\nmodel = dict(\n")
    assert main(["mine.py"]) == 1
    assert "never closed (mine.py, line 2)" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "then"), [("touch", "refuse"), ("finish", "syntax")])
def test_a_start_that_never_began_leaves_a_status_that_is_of_use(before, then, xtuner, tmp_path):
    xtuner[0](before)
    main(["stage1_shallow", "--work-dir", "w"])
    status = stored_status(tmp_path / "w")
    xtuner[0](then)
    assert main(["stage1_shallow", "--work-dir", "w"]) == 1
    assert stored_status(tmp_path / "w") == status


def test_a_run_that_began_in_the_same_moment_is_not_taken_for_ones_own(xtuner, tmp_path, capsys):
    xtuner[0]("other")
    assert main(["stage1_shallow", "--work-dir", "w"]) == 1
    assert "failed: work dir belongs to another run" in capsys.readouterr().out
    assert stored_status(tmp_path / "w")["state"] == "running"


@pytest.mark.parametrize(("does", "times"), [("wait", 1), ("deaf", 2)])
def test_a_signal_stops_the_trainer_and_a_second_one_ends_it_at_once(
    does, times, xtuner, tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "ONE_SIGNAL", 0.1)
    xtuner[0](does)

    def send() -> None:
        while stored_status(tmp_path / "w").get("state") != "running":
            time.sleep(0.05)
        time.sleep(0.3)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.4)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send, daemon=True).start()
    assert main(["stage1_shallow", "--work-dir", "w"]) == 143
    status = stored_status(tmp_path / "w")
    assert status["state"] == "stopped"
    assert ("at once" in status["reason"]) == (does == "deaf")
    assert signal.getsignal(signal.SIGTERM) is before


def test_all_goes_on_where_it_ended_and_repeats_nothing(xtuner, tmp_path, capsys):
    does, calls = xtuner
    command = ["all", "--work-dir", "w", "--variant", "small_data", "lr=1", "stage2.lr=2"]

    def run() -> tuple[int, list[str]]:
        status = main(command)
        return status, [call[0] + Path(call[call.index("--work-dir") + 1]).name
                        if "--work-dir" in call else call[0] for call in calls()]  # fmt: skip

    does("stage2")
    assert run() == (1, ["trainstage1", "trainstage2"])
    command[-1] = "stage2.lr=3"  # it has no checkpoint yet
    does("no convert")
    assert run() == (1, ["trainstage2", "trainstage3", "convert"])
    assert "another geometry" in capsys.readouterr().err
    does("finish")
    assert run() == (0, ["convert"])
    assert "gmai-chat w/model" in capsys.readouterr().out
    assert run() == (0, [])
    command[-1] = "stage2.lr=4"
    assert run() == (1, [])
    assert "w/stage2 was begun with other settings (settings: " in capsys.readouterr().err


@pytest.mark.parametrize(("evaluation", "then"), [(0, 0), (1, 1), (3, 1), (130, 130)])
def test_all_ends_as_the_evaluation_does_but_for_the_status_of_a_stop(
    evaluation, then, xtuner, monkeypatch
):
    xtuner[0]("finish")
    ended = SimpleNamespace(returncode=evaluation)
    asked: list = []
    run = lambda program, check: asked.append(program[-4:]) or ended  # noqa: E731
    monkeypatch.setattr("gmai_xtuner.train.__main__.subprocess.run", run)
    assert main(["all", "--work-dir", "w", "--benchmarks", "b"]) == then
    assert asked == [["--data", "b", "--out", "w/evaluation"]]


def test_a_stage_of_all_gets_its_own_settings_the_stage_before_and_resumes(xtuner):
    xtuner[0]("finish")
    assert main(["all", "--work-dir", "w", "stage2.lr=2", "lr=1", "--seed", "3"]) == 0
    trained = [call for call in xtuner[1]() if call[0] == "train"]
    settings = [call[call.index("--cfg-options") + 1 : -1] for call in trained]
    assert settings == [["lr=1"], ["lr=1", "lr=2"], ["lr=1"]]
    assert [call[call.index("--resume") + 1] for call in trained] == [
        "w/stage1",
        "w/stage2",
        "w/stage3",
    ]
    assert all("--seed" in call for call in trained)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["stage9"], "there is no config 'stage9'"), (["stage1_shallow", "lr"], "KEY=VALUE")],
)
def test_what_can_not_be_started_is_said(arguments, says, capsys):
    assert main(arguments) == 1
    assert says in capsys.readouterr().err


def test_xtuner_must_be_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "_path", lambda: str(tmp_path))
    with pytest.raises(GMAIError, match="pip install xtuner"):
        launch.start_xtuner([], {})


def test_the_screen_shows_what_matters(capsys):
    screen = Screen("run")
    for line in (
        "[2026-11-30 09:05:51,852] [INFO] [config.py:999:print] DeepSpeedEngine configuration:",
        '11/30 09:05:51 - mmengine - WARNING - "FileClient" will be deprecated in future.',
        "11/30 09:05:51 - mmengine - WARNING - This run is too small",
        "Tokenising mine: 60 records",
        "11/30 09:05:51 - mmengine - INFO - Sample answer at iteration 8, images/r1:",
        "  answer: No, 2.",
        "[2026-11-30 09:05:57,305] [INFO] [logging.py:128:log_dist] [Rank 0] [Torch]",
        "  and more of it",
        "ValueError: too late",
    ):
        screen.take(line)
    assert capsys.readouterr().out.splitlines() == [
        "WARNING: This run is too small",
        "Sample answer at iteration 8, images/r1:",
        "  answer: No, 2.",
    ]
    assert screen.error == "ValueError: too late"
