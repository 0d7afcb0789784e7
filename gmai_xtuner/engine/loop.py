"""The training loop: the sampler says where an optimiser step ends, and a resumed run begins there."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import LOOPS
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop
from torch.utils.data import DataLoader

from gmai_xtuner import compat
from gmai_xtuner.datasets.sampler import MicroBatchSampler
from gmai_xtuner.errors import GMAIError


@LOOPS.register_module()
class PackedTrainLoop(IterBasedTrainLoop):
    """Runs micro-batches; iterations in logs and checkpoints count micro-batches, as in xtuner.

    Differs from ``xtuner.engine.runner.TrainLoop`` in three points: the optimiser also steps on the
    short last window of an epoch; a resumed run reads nothing that it has trained on already; training
    never ends in the middle of a step.

    Args:
        runner: xtuner's runner; DeepSpeed is required, it keeps the gradients of a step.
        dataloader: with a :class:`MicroBatchSampler`.
        max_iters: micro-batches to train; rounded up to the end of an optimiser step.
        max_epochs: or epochs; may be a fraction.

    Raises:
        GMAIError: no DeepSpeed, another sampler, or not exactly one of the two lengths.
    """

    def __init__(
        self,
        runner: FlexibleRunner,
        dataloader: DataLoader | dict[str, Any],
        max_iters: int | None = None,
        max_epochs: float | None = None,
        **kwargs: Any,
    ) -> None:
        if (max_iters is None) == (max_epochs is None):
            raise GMAIError("train_cfg needs either max_iters or max_epochs")
        if not isinstance(runner, FlexibleRunner):
            raise GMAIError(
                "GMAI-VL trains with DeepSpeed: add --deepspeed zero2 (or zero1, zero3, "
                "zero2_offload, zero3_offload)"
            )
        compat.rendezvous_alone()
        loader: DataLoader = (
            runner.build_dataloader(dataloader, seed=runner.seed)
            if isinstance(dataloader, dict)
            else dataloader
        )
        sampler = loader.batch_sampler
        if not isinstance(sampler, MicroBatchSampler):
            raise GMAIError(
                f"train_dataloader needs batch_sampler=dict(type='MicroBatchSampler', ...), got "
                f"{type(sampler).__name__}"
            )
        if max_epochs is not None:
            max_iters = math.ceil(max_epochs * len(sampler))
        total = _round_up_to_step(int(max_iters or 0), sampler)
        super().__init__(runner, loader, max_iters=total, **kwargs)
        print_log(
            f"{len(sampler)} micro-batches and {sampler.steps} optimiser steps an epoch; "
            f"training {total} micro-batches",
            logger="current",
            level=logging.INFO,
        )

    @property
    def micro_batches(self) -> MicroBatchSampler:
        return self.dataloader.batch_sampler

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        sampler = self.micro_batches
        epochs, left = divmod(self._max_iters, len(sampler))
        return epochs * sampler.steps + sum(sampler.step_ends(i) for i in range(left))

    def run(self) -> Any:
        """Train from the current iteration on."""
        self._check_accumulation()
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        batches = self._batches()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            batch = next(batches)
            self.runner.model.set_gradient_accumulation_boundary(batch["data"]["step_end"])
            self.run_iter(batch)
            self._decide_current_val_interval()
            if (
                self.runner.val_loop is not None
                and self._iter >= self.val_begin
                and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
            ):
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _batches(self) -> Iterator[dict[str, Any]]:
        while True:
            self._epoch, position = divmod(self._iter, len(self.micro_batches))
            self.micro_batches.set_position(self._epoch, position)
            yield from self.dataloader

    def _check_accumulation(self) -> None:
        """The sampler normalises the loss for this accumulation; the engine must agree."""
        engine = self.runner.model.gradient_accumulation_steps()
        if engine != self.micro_batches.accumulative_counts:
            raise GMAIError(
                f"optim_wrapper.accumulative_counts is {engine}, but "
                "train_dataloader.batch_sampler.accumulative_counts is "
                f"{self.micro_batches.accumulative_counts}; set both"
            )


def _round_up_to_step(iterations: int, sampler: MicroBatchSampler) -> int:
    while not sampler.step_ends((iterations - 1) % len(sampler)):
        iterations += 1
    return iterations
