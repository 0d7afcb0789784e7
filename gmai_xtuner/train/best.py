# SPDX-License-Identifier: Apache-2.0

"""What follows from validations: the best checkpoint is kept, and a run that no longer improves ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner

from gmai_xtuner.checkpoint.training import checkpoints_in, what_is_wrong
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.train.checkpointing import StepCheckpointHook
from gmai_xtuner.train.on_disk import remove
from gmai_xtuner.train.resume import tidy_up

FOLDER = "best"
HISTORY = "validations.json"


@HOOKS.register_module()
class BestCheckpointHook(Hook):
    """Keep the checkpoint of the best validation in ``<work_dir>/best``, and stop when none is better.

    The best one lies beside the checkpoints that a run is resumed from, is written like them (it is whole or
    absent), and counts for nothing there; it can be converted and started from. ``validations.json`` has
    the number of each validation by optimiser step, so that a resumed run counts on from where it begins.

    Args:
        monitor: name of a validation's number, such as ``val/loss`` or ``val/slake/accuracy``.
        rule: ``less`` or ``greater`` is better; default: ``less`` for a loss or perplexity.
        keep: keep the best checkpoint.
        patience: validations without a better number after which the run ends, finished; ``None``: never.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        rule: str | None = None,
        *,
        keep: bool = False,
        patience: int | None = None,
    ) -> None:
        if rule not in (None, "less", "greater") or (patience is not None and patience < 1):
            raise GMAIError(
                "default_hooks.best: rule must be 'less' or 'greater' and patience at least 1, got "
                f"{rule!r} and {patience!r}"
            )
        lower = rule == "less" or (rule is None and ("loss" in monitor or "perplexity" in monitor))
        self.monitor, self.keep, self.patience = monitor, keep, patience
        self._sign = -1.0 if lower else 1.0
        self._history: dict[int, float] = {}

    def before_train(self, runner: FlexibleRunner) -> None:
        if not self.keep and self.patience is None:
            return
        loop = runner.val_loop
        if loop is None or (loop.nothing and loop.benchmarks is None):
            raise GMAIError(
                f"default_hooks.best watches {self.monitor}, but nothing is validated. Hold images out "
                "(train_dataloader.dataset.held_out), or set its keep=False and patience=None"
            )
        file = Path(runner.work_dir) / HISTORY
        history = json.loads(file.read_text()) if file.is_file() else {}
        step = runner.train_loop.step
        self._history = {int(at): score for at, score in history.items() if int(at) <= step}
        tidy_up(Path(runner.work_dir) / FOLDER)
        self._stop_if_patience_is_over(runner)  # a run that had ended so ends again

    def after_val_epoch(
        self, runner: FlexibleRunner, metrics: Mapping[str, float] | None = None
    ) -> None:
        if (not self.keep and self.patience is None) or metrics is None:
            return
        if self.monitor not in metrics:
            if runner.val_loop.benchmarks is not None and not self.monitor.startswith("val/loss"):
                return  # benchmarks are not asked at every validation
            raise GMAIError(
                f"default_hooks.best.monitor={self.monitor!r} is no number of the validation, which has "
                f"{', '.join(sorted(metrics))}"
            )
        step = runner.train_loop.step
        self._history[step] = float(metrics[self.monitor])
        if self.keep and self._best() == step:
            self._write(runner)
        if get_rank() == 0:
            replace_text(Path(runner.work_dir) / HISTORY, json.dumps(self._history, indent=1))
        if self._stop_if_patience_is_over(runner):
            hook = _checkpoints(runner)
            if what_is_wrong(Path(hook.out_dir) / hook.filename_tmpl.format(runner.iter)):
                hook.save_now(runner)

    def _best(self) -> int | None:
        """Return the step of the best validation; of equal ones the first."""
        finite = {step: score for step, score in self._history.items() if math.isfinite(score)}
        return max(finite, key=lambda step: (self._sign * finite[step], -step), default=None)

    def _write(self, runner: FlexibleRunner) -> None:
        folder = Path(runner.work_dir) / FOLDER
        written = _checkpoints(runner).write(runner, folder, runner.iter)
        if get_rank() == 0:
            for old in checkpoints_in(folder):
                if old != written:
                    remove(old)
        runner.logger.info(
            f"{self.monitor} is the best so far, {self._history[runner.train_loop.step]:.4f}: {written}"
        )

    def _stop_if_patience_is_over(self, runner: FlexibleRunner) -> bool:
        best, loop = self._best(), runner.train_loop
        later = [step for step in self._history if best is None or step > best]
        if self.patience is None or len(later) < self.patience or loop.iter >= loop.max_iters:
            return False
        told = "" if best is None else f" (best {self._history[best]:.4f} at step {best})"
        loop.stop_reason = (
            f"{self.monitor} was not better in the last {len(later)} validations{told}"
        )
        loop.stop_training = loop.stopped_early = True
        runner.logger.info(
            f"The run ends at step {loop.step} of {loop.total_steps}: {loop.stop_reason}"
        )
        return True


def _checkpoints(runner: FlexibleRunner) -> StepCheckpointHook:
    for hook in runner.hooks:
        if isinstance(hook, StepCheckpointHook):
            return hook
    raise GMAIError("default_hooks.best needs default_hooks.checkpoint, a StepCheckpointHook")
