# SPDX-License-Identifier: Apache-2.0

"""The best checkpoint and the end of a run that no longer improves; trackers by one option."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.registry import VISBACKENDS

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import start, validation
from gmai_xtuner.train.validation import BestCheckpointHook


class Run:
    """A run as the hook sees it, which validates at every step."""

    def __init__(self, work_dir, monkeypatch, **options) -> None:
        self.hook = BestCheckpointHook(**options)
        self.kept: list[int] = []
        self.saved: list[int] = []

        self.slow = False
        """Whether a checkpoint is whole only when it is waited for."""
        self.under_way = lambda: None

        def write(runner, folder, iteration, then):
            def finish():
                self.under_way = lambda: None
                (folder / f"iter_{iteration}.pth").mkdir(parents=True)
                self.kept.append(iteration)
                then(folder / f"iter_{iteration}.pth")

            self.under_way = finish
            if not self.slow:
                finish()

        checkpoints = SimpleNamespace(
            write=write, finish=lambda: self.under_way(), out_dir=str(work_dir), filename_tmpl="iter_{}.pth",
            save_now=lambda runner: self.saved.append(runner.iter),
        )  # fmt: skip
        monkeypatch.setattr(validation, "checkpoint_hook", lambda *_: checkpoints)
        loop = SimpleNamespace(
            step=0, iter=0, max_iters=100, total_steps=50, stop_training=False,
            stopped_early=False, stop_reason="",
        )  # fmt: skip
        self.runner = SimpleNamespace(
            work_dir=str(work_dir), train_loop=loop, iter=0,
            val_loop=SimpleNamespace(nothing=False, benchmarks=None),
            logger=SimpleNamespace(info=lambda _: None),
        )  # fmt: skip

    def begin(self, step: int = 0) -> None:
        self.runner.train_loop.step = step
        self.hook.before_train(self.runner)

    def validate(self, *scores: float, name: str = "val/loss") -> None:
        for score in scores:
            loop = self.runner.train_loop
            loop.step += 1
            self.runner.iter = loop.iter = 2 * loop.step
            self.hook.after_val_epoch(self.runner, {name: score})


@pytest.fixture
def run(tmp_path, monkeypatch):
    return lambda **options: Run(tmp_path, monkeypatch, **options)


def test_the_best_is_kept_and_replaces_the_one_before(run, tmp_path):
    made = run(keep=True)
    made.begin()
    made.validate(3.0, 2.0, 2.5, math.nan, 2.0, 1.0)
    assert made.kept == [2, 4, 12]  # neither NaN nor an equal one is better
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["iter_12.pth"]
    assert not made.runner.train_loop.stop_training


def test_the_history_knows_a_best_one_when_its_checkpoint_is_whole(run, tmp_path):
    made = run(keep=True)
    made.begin()
    made.validate(3.0)
    made.slow = True
    made.validate(2.0, 2.5)
    file = tmp_path / validation.HISTORY
    assert json.loads(file.read_text()) == {"1": 3.0, "3": 2.5}
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["iter_2.pth"]
    made.validate(1.0)  # waits for the one before
    assert made.kept == [2, 4]
    made.under_way()
    assert json.loads(file.read_text()) == {"1": 3.0, "2": 2.0, "3": 2.5, "4": 1.0}
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["iter_8.pth"]


def test_a_run_that_no_longer_improves_ends_with_a_checkpoint(run):
    made = run(patience=2, monitor="val/slake/accuracy")
    made.begin()
    made.validate(0.5, 0.6, 0.6, name="val/slake/accuracy")
    assert not made.runner.train_loop.stop_training
    made.validate(0.1, name="val/slake/accuracy")
    loop = made.runner.train_loop
    assert loop.stop_training
    assert loop.stopped_early
    assert "not better in the last 2 validations (best 0.6000 at step 2)" in loop.stop_reason
    assert made.saved == [8]
    assert made.kept == []


def test_a_resumed_run_counts_on_from_where_it_begins(run, tmp_path):
    first = run(patience=3)
    first.begin()
    first.validate(2.0, 3.0, 3.0)
    second = run(patience=3)
    second.begin(step=2)  # the validation of step 3 is not known there
    second.validate(3.0)
    assert not second.runner.train_loop.stop_training
    second.validate(3.0)
    assert second.runner.train_loop.stopped_early
    assert json.loads((tmp_path / validation.HISTORY).read_text())["1"] == 2.0
    again = run(patience=3)
    again.begin(step=4)  # an ended run that is resumed ends at once
    assert again.runner.train_loop.stopped_early


def test_what_can_not_be_watched_is_refused(run):
    made = run(keep=True, monitor="val/los")
    made.begin()
    with pytest.raises(GMAIError, match=r"'val/los' is no number .* has val/loss"):
        made.validate(1.0)
    asked = SimpleNamespace(numbers=lambda: {"slake/accuracy"})
    made.runner.val_loop.benchmarks = asked
    made.hook.monitor = "val/slake/accuracy"
    made.validate(1.0)  # not asked this time
    made.hook.monitor = "val/slake/acuracy"
    with pytest.raises(
        GMAIError, match=r"'val/slake/acuracy' is no .* val/loss, val/slake/accuracy"
    ):
        made.validate(1.0)
    made.runner.val_loop = None
    with pytest.raises(GMAIError, match="nothing is validated"):
        made.begin()
    with pytest.raises(GMAIError, match="patience at least 1"):
        BestCheckpointHook(patience=0)


def test_trackers_are_added_by_one_option():
    shown = {"vis_backends": [{"type": "LocalVisBackend"}]}
    cfg = Config({"report_to": "mlflow, wandb", "visualizer": shown})
    start.add_trackers(cfg, "work_dirs/mine")
    local, mlflow, wandb = cfg.visualizer.vis_backends
    assert local["type"] == "LocalVisBackend"
    assert mlflow["run_name"] == wandb["init_kwargs"]["name"] == "mine"
    assert "tracking_uri" not in mlflow  # it may hold a password, and others see the config
    assert mlflow["artifact_suffix"] == ()
    # W&B would send all that is printed: paths, warnings about records, sample answers.
    assert wandb["init_kwargs"]["settings"]["console"] == "off"


@pytest.mark.parametrize(
    ("named", "installed", "problem"),
    [
        ("mlflow", False, "pip install mlflow-skinny"),
        ("mlflow", True, "MLFLOW_TRACKING_URI"),
        ("trackio", True, "import_tf_events"),
        (["comet"], True, "Take wandb, mlflow"),
        ("none", False, ""),
        ("wandb", True, ""),
    ],
)
def test_a_tracker_that_cannot_be_used_is_said_before_the_run(
    named, installed, problem, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: installed or None)
    problems = start.tracker_problems({"report_to": named})
    assert len(problems) == bool(problem)
    assert not problem or problem in problems[0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_no_image_leaves_for_a_tracker(name, tmp_path):
    cfg = Config({"report_to": name, "visualizer": {"vis_backends": []}})
    start.add_trackers(cfg, "w")
    backend = VISBACKENDS.build({**cfg.visualizer.vis_backends[0], "save_dir": str(tmp_path)})
    backend.add_image("sample", None)  # a backend that took it would import its package
    assert not hasattr(backend, f"_{name}")


def test_numbers_go_to_the_server_that_the_environment_names(monkeypatch, tmp_path):
    """mmengine would write to the work dir, which MLflow 3 refuses, whatever the environment says."""
    told: list = []
    monkeypatch.setitem(
        sys.modules,
        "mlflow",
        SimpleNamespace(
            set_tracking_uri=told.append,
            get_experiment_by_name=lambda name: name,
            set_experiment=lambda name: None,
            log_metric=lambda name, value, step: told.append((name, value, step)),
        ),
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    backend = VISBACKENDS.build({"type": "MLflowNumbers", "save_dir": str(tmp_path)})
    backend.add_scalar("loss", 1.5, 4)
    assert told == ["http://127.0.0.1:5000", ("loss", 1.5, 4)]
