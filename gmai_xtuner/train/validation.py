# SPDX-License-Identifier: Apache-2.0

"""Validation loss on the held-out part of the mixture, by mmengine's own loop and metric machinery.

Needs no second dataset in the config: ``val_dataloader`` takes the training dataset's held-out part, so
that length, template and images are the same by construction. What follows from validations: the best
checkpoint is kept, and a run that no longer improves ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOOPS, METRICS
from mmengine.runner import FlexibleRunner, ValLoop
from mmengine.runner.base_loop import BaseLoop

from gmai_xtuner.checkpoint.training import checkpoints_in, what_is_wrong
from gmai_xtuner.core.config import dataset_config
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.data.sampler import MicroBatchSampler
from gmai_xtuner.train.benchmarks import (
    BenchmarkQuestions,
    BenchmarkScore,
    ask_benchmarks,
    bare_model,
    predictor_of,
)
from gmai_xtuner.train.checkpointing import checkpoint_hook
from gmai_xtuner.train.loop import with_loader_defaults
from gmai_xtuner.train.on_disk import remove
from gmai_xtuner.train.resume import tidy_up
from gmai_xtuner.train.signals import worker_init

FOLDER = "best"
HISTORY = "validations.json"


@LOOPS.register_module()
class HeldOutLoop(ValLoop):
    """mmengine's ``ValLoop`` over what ``train_dataloader.dataset.held_out`` leaves out.

    Where that is nothing, it says so once, and validation is off. Training does not notice a validation:
    :class:`~gmai_xtuner.train.loop.PackedTrainLoop` runs it between two optimiser steps and keeps the random
    state, and packs and workers are its own.

    Args:
        runner: xtuner's runner.
        dataloader: as mmengine takes it; without a ``dataset`` it gets the held-out part, and a dataset
            without ``tokenizer`` and ``vision`` the model's.
        evaluator: with :class:`HeldOutLoss`.
        at_most: conversations of one dataset; default 100. What is held out is not trained on whether it
            is validated on or not.
        benchmarks: also asked, see :class:`~gmai_xtuner.train.benchmarks.BenchmarkQuestions`; default: none.
            ``val/<benchmark>/accuracy`` is their protocol's score.
        benchmark_interval: optimiser steps from one asking to the next, at the validation that follows; the
            run ends with one. Default: at every validation.

    Raises:
        GMAIError: a batch sampler that would repeat packs or leave some out; a benchmark that can't be read.
    """

    def __init__(
        self,
        runner: FlexibleRunner,
        dataloader: dict[str, Any],
        evaluator: Evaluator | dict[str, Any] | list[Any],
        at_most: int | None = 100,
        benchmarks: str | Mapping[str, Mapping[str, Any]] | None = None,
        benchmark_interval: int | None = None,
    ) -> None:
        self.benchmark_interval = benchmark_interval
        self.benchmarks = BenchmarkQuestions(benchmarks) if benchmarks else None
        self._scores = Evaluator(BenchmarkScore(prefix="val"))
        dataset = dataloader.get("dataset")
        training = runner.train_loop.dataloader.dataset
        if dataset is None:
            dataset = training.held_out_part(at_most)
        elif isinstance(dataset, Mapping):
            config = {**runner.cfg, "train_dataloader": {"dataset": dataset}}
            dataset = dataset_config(config)
        self.nothing = dataset is None
        if self.nothing:
            BaseLoop.__init__(self, runner, runner.train_loop.dataloader)
            share = training.plan.why_nothing_held_out() if training.plan.held_out else "0"
            warn(f"No validation: nothing is held out (train_dataloader.dataset.held_out={share})")
            return
        meta = runner.visualizer.dataset_meta
        super().__init__(
            runner, with_loader_defaults({**dataloader, "dataset": dataset}), evaluator
        )
        runner.visualizer.dataset_meta = meta
        if not isinstance(self.dataloader.batch_sampler, MicroBatchSampler):
            raise GMAIError(
                "val_dataloader needs batch_sampler=dict(type='MicroBatchSampler'), got "
                f"{type(self.dataloader.batch_sampler).__name__}: others repeat packs where the ranks "
                "don't come out even, and the loss would count them twice"
            )
        self.dataloader.worker_init_fn = partial(worker_init, then=self.dataloader.worker_init_fn)
        plan = self.dataloader.dataset.plan
        info(
            f"Validation: {len(plan.samples)} held-out conversations in {len(self.dataloader.dataset)} packs"
        )

    def run(self) -> dict[str, float]:
        benchmarks = self.benchmarks if self._benchmarks_due() else None
        if self.nothing and benchmarks is None:
            return {}
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        self.runner.model.eval()
        metrics: dict[str, float] = {}
        if not self.nothing:
            for idx, batch in enumerate(self.dataloader):
                self.run_iter(idx, batch)
            metrics |= self.evaluator.evaluate(len(self.dataloader.dataset))
        if benchmarks is not None:
            data = self.runner.train_loop.dataloader.dataset
            predictor = predictor_of(bare_model(self.runner.model), data)
            metrics |= ask_benchmarks(benchmarks, self._scores, predictor, batch_size=8, readers=2)
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics

    def _benchmarks_due(self) -> bool:
        """Return whether a multiple of the interval came since the last validation: no state to resume."""
        loop = self.runner.train_loop
        if self.benchmark_interval is None or loop.iter >= loop.max_iters:
            return True
        before = loop.step - loop.val_interval
        return loop.step // self.benchmark_interval > before // self.benchmark_interval

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: dict[str, Any]) -> None:
        """Validate one batch, without mmengine's hooks of an iteration: they log the validation before."""
        outputs = self.runner.model.val_step(data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)


@METRICS.register_module()
class HeldOutLoss(BaseMetric):
    """Mean loss over the supervised tokens of all conversations, and ``perplexity``, its exponential.

    Every token counts once and the same, whatever the training's ``weighting``, and however conversations are
    packed, batched and dealt to ranks; a pack that only fills a rank's place counts nothing.

    Args:
        by: also the loss of each ``category`` of the mixture, or of each ``dataset``, as
            ``val/loss/<name>`` with underscores for blanks; ``None`` for neither. Left out where there is
            only one.
        prefix: of the names; default ``val``.
    """

    default_prefix = "val"

    def __init__(self, by: str | None = "category", prefix: str | None = None) -> None:
        if by not in ("category", "dataset", None):
            raise GMAIError(f"by must be 'category', 'dataset' or None, got {by!r}")
        super().__init__(prefix=prefix)
        self.by = by

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        self.results.extend(data_samples)

    def evaluate(self, size: int) -> dict[str, float]:
        """Return the values over all ranks; mmengine would gather all samples and cut them at ``size``."""
        meta = self.dataset_meta or {}
        groups = dict.fromkeys(meta["datasets"], "")
        if self.by is not None:
            kinds = meta["categories"] if self.by == "category" else meta["datasets"]
            groups = {name: kind or name for name, kind in zip(groups, kinds, strict=True)}
        names = sorted(set(groups.values()))
        table = torch.zeros(len(names), 2, dtype=torch.float64)
        for sample in self.results:
            # <dataset>/<record>: the longest name that fits, since names may hold a slash.
            dataset = max((n for n in groups if sample["id"].startswith(f"{n}/")), key=len)
            numbers = torch.tensor([sample["loss"], sample["tokens"]], dtype=torch.float64)
            table[names.index(groups[dataset])] += numbers
        self.results.clear()
        all_reduce(table)
        metrics = self.compute_metrics(table.sum(0, keepdim=True).tolist())
        if len(names) > 1:
            for name, (loss, tokens) in zip(names, table.tolist(), strict=True):
                if tokens:
                    metrics[f"loss/{name.replace(' ', '_')}"] = loss / tokens
        return {f"{self.prefix}/{name}": value for name, value in metrics.items()}

    def compute_metrics(self, results: list[list[float]]) -> dict[str, float]:
        (loss, tokens), *_ = results
        mean = loss / tokens if tokens else math.nan
        return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}


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
        self._unwritten: int | None = None
        """Step of the best validation whose checkpoint is not whole yet."""

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
            benchmarks = runner.val_loop.benchmarks
            known = {f"val/{name}" for name in benchmarks.numbers()} if benchmarks else set()
            if self.monitor in known:
                return  # benchmarks are not asked at every validation
            raise GMAIError(
                f"default_hooks.best.monitor={self.monitor!r} is no number of the validation, which has "
                f"{', '.join(sorted(known | metrics.keys()))}"
            )
        step = runner.train_loop.step
        self._history[step] = float(metrics[self.monitor])
        if self.keep and self._best() == step:
            self._write(runner)
        self._store_history(runner)
        if self._stop_if_patience_is_over(runner):
            hook = checkpoint_hook(runner, "default_hooks.best")
            hook.finish()
            written = Path(hook.out_dir) / hook.filename_tmpl.format(runner.iter)
            if all_gather_object(what_is_wrong(written))[0]:  # as the first rank sees it
                hook.save_now(runner)

    def _best(self) -> int | None:
        """Return the step of the best validation; of equal ones the first."""
        finite = {step: score for step, score in self._history.items() if math.isfinite(score)}
        return max(finite, key=lambda step: (self._sign * finite[step], -step), default=None)

    def _store_history(self, runner: FlexibleRunner) -> None:
        if get_rank() == 0:
            whole = {
                step: score for step, score in self._history.items() if step != self._unwritten
            }
            file = Path(runner.work_dir) / HISTORY
            try:
                replace_text(file, json.dumps(whole, indent=1))
            except OSError as error:  # on this rank alone; the next validation writes it anew
                warn(f"{file} could not be written: {error}")

    def _write(self, runner: FlexibleRunner) -> None:
        folder, step = Path(runner.work_dir) / FOLDER, runner.train_loop.step

        def then(written: Path) -> None:
            if get_rank() == 0:
                for old in checkpoints_in(folder):
                    if old != written:
                        remove(old)
            self._unwritten = None
            self._store_history(runner)
            runner.logger.info(
                f"{self.monitor} is the best so far, {self._history[step]:.4f}: {written}"
            )

        hook = checkpoint_hook(runner, "default_hooks.best")
        hook.finish()
        self._unwritten = step
        hook.write(runner, folder, runner.iter, then)

    def _stop_if_patience_is_over(self, runner: FlexibleRunner) -> bool:
        best, loop = self._best(), runner.train_loop
        later = [step for step in self._history if best is None or step > best]
        if self.patience is None or len(later) < self.patience or loop.iter >= loop.max_iters:
            return False
        best_so_far = "" if best is None else f" (best {self._history[best]:.4f} at step {best})"
        loop.stop_reason = (
            f"{self.monitor} was not better in the last {len(later)} validations{best_so_far}"
        )
        loop.stop_training = loop.stopped_early = True
        runner.logger.info(
            f"The run ends at step {loop.step} of {loop.total_steps}: {loop.stop_reason}"
        )
        return True
