# SPDX-License-Identifier: Apache-2.0

"""Validation loss on the held-out part of the mixture, by mmengine's own loop and metric machinery.

Needs no second dataset in the config: ``val_dataloader`` takes the training dataset's held-out part, so
that length, template and images are the same by construction.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import print_log
from mmengine.registry import LOOPS, METRICS
from mmengine.runner import FlexibleRunner, ValLoop
from mmengine.runner.base_loop import BaseLoop

from gmai_xtuner.core.config import dataset_config
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.sampler import MicroBatchSampler
from gmai_xtuner.train.benchmarks import (
    BenchmarkQuestions,
    BenchmarkScore,
    RankedAnswerer,
    RankedPredictor,
    ask_benchmarks,
    bare_model,
)
from gmai_xtuner.train.loop import with_loader_defaults
from gmai_xtuner.train.signals import worker_init


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
        benchmark_batch_size: questions that a rank asks together.
        benchmark_workers: threads of each rank that read their images.

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
        benchmark_batch_size: int = 8,
        benchmark_workers: int = 2,
    ) -> None:
        self.benchmark_interval = benchmark_interval
        self.benchmarks: _Benchmarks | None = None
        if benchmarks:
            self.benchmarks = _Benchmarks(
                runner,
                benchmarks,
                batch_size=benchmark_batch_size,
                num_workers=benchmark_workers,
            )
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
            print_log(
                f"No validation: nothing is held out (train_dataloader.dataset.held_out={share})",
                logger="current",
                level=logging.WARNING,
            )
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
        print_log(
            f"Validation: {len(plan.samples)} held-out conversations in {len(self.dataloader.dataset)} packs",
            logger="current",
            level=logging.INFO,
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
            metrics |= benchmarks.ask()
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


class _Benchmarks:
    """Benchmarks of a training run, asked with its own tokenizer, template and image path."""

    def __init__(
        self,
        runner: FlexibleRunner,
        benchmarks: str | Mapping[str, Mapping[str, Any]],
        *,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self._runner = runner
        self._questions = BenchmarkQuestions(benchmarks)
        self._options = {"batch_size": batch_size, "readers": num_workers}
        self._evaluator = Evaluator(BenchmarkScore(prefix="val"))

    def ask(self) -> dict[str, float]:
        """All ranks take part."""
        training = self._runner.train_loop.dataloader.dataset
        predictor = RankedPredictor(
            bare_model(self._runner.model),
            tokenizer=training.tokenizer,
            template=training.template,
            transform=training.transform,
        )
        answerer = RankedAnswerer(predictor, **self._options)
        return ask_benchmarks(self._questions, answerer, self._evaluator)


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
        groups = self._groups()
        names = sorted(set(groups.values()))
        table = torch.zeros(len(names), 2, dtype=torch.float64)
        for sample in self.results:
            dataset = _dataset_of(sample["id"], groups)
            table[names.index(groups[dataset])] += torch.tensor(
                [sample["loss"], sample["tokens"]], dtype=torch.float64
            )
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

    def _groups(self) -> dict[str, str]:
        meta = self.dataset_meta or {}
        datasets = meta["datasets"]
        if self.by is None:
            return dict.fromkeys(datasets, "")
        if self.by == "dataset":
            return {name: name for name in datasets}
        return {
            name: category or name
            for name, category in zip(datasets, meta["categories"], strict=True)
        }


def _dataset_of(sample: str, datasets: dict[str, str]) -> str:
    """``<dataset>/<record>`` -> dataset; the longest name that fits, since names may hold a slash."""
    return max((name for name in datasets if sample.startswith(f"{name}/")), key=len)
