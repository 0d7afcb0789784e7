"""The training loop: the sampler says where an optimiser step ends, and a resumed run begins there."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object
from mmengine.logging import print_log
from mmengine.registry import LOOPS
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from mmengine.runner.utils import calc_dynamic_intervals
from torch.utils.data import DataLoader

from gmai_xtuner import compat
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.sampler import MicroBatchSampler
from gmai_xtuner.train.checkpointing import choose_checkpoint, restore_rank_state
from gmai_xtuner.train.random_state import preserved_random_state
from gmai_xtuner.train.signals import guard_workers
from gmai_xtuner.train.status import failure_told, told

DATA_ORDER = "gmai_data_order"
"""Where a checkpoint's message hub keeps what decides the order of the data."""

LENGTH = "gmai_length"
"""Where it keeps the length of the run in micro-batches."""


@LOOPS.register_module()
class PackedTrainLoop(IterBasedTrainLoop):
    """Runs micro-batches; iterations in logs and checkpoints count micro-batches, as in xtuner.

    Differs from ``xtuner.engine.runner.TrainLoop`` in five points: the optimiser also steps on the
    short last window of an epoch; a run finds the newest whole checkpoint by itself where it is asked to
    resume (:func:`~gmai_xtuner.train.checkpointing.choose_checkpoint`); a resumed run reads nothing that
    it has trained on already; it refuses to go on with other data or another layout than it began with,
    or if ranks see different data; training never ends in the middle of a step.

    Args:
        runner: xtuner's runner; DeepSpeed is required, it keeps the gradients of a step.
        dataloader: with a :class:`MicroBatchSampler`.
        max_iters: micro-batches to train; rounded up to the end of an optimiser step.
        max_epochs: or epochs; may be a fraction.
        val_begin: as in mmengine.
        val_interval: micro-batches from one validation to the next; each waits for the end of the
            optimiser step, and the run ends with one.
        dynamic_intervals: as in mmengine.

    Raises:
        GMAIError: no DeepSpeed, another sampler, or not exactly one of the two lengths.
    """

    def __init__(
        self,
        runner: FlexibleRunner,
        dataloader: DataLoader | dict[str, Any],
        max_iters: int | None = None,
        max_epochs: float | None = None,
        *,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
    ) -> None:
        if (max_iters is None) == (max_epochs is None):
            raise GMAIError("train_cfg needs either max_iters or max_epochs")
        if not isinstance(runner, FlexibleRunner):
            raise GMAIError(
                "GMAI-VL trains with DeepSpeed: add --deepspeed zero2 (or zero1, zero3, "
                "zero2_offload, zero3_offload)"
            )
        compat.rendezvous_alone()
        with failure_told(Path(runner.work_dir)):
            self.resumed_from = choose_checkpoint(runner)
            # Not IterBasedTrainLoop's own: it would start the workers on the first batches at once, which
            # a resumed run does not want.
            BaseLoop.__init__(self, runner, with_loader_defaults(dataloader))
        sampler = self.dataloader.batch_sampler
        if not isinstance(sampler, MicroBatchSampler):
            raise GMAIError(
                f"train_dataloader needs batch_sampler=dict(type='MicroBatchSampler', ...), got "
                f"{type(sampler).__name__}"
            )
        if max_epochs is not None:
            max_iters = math.ceil(max_epochs * len(sampler))
        guard_workers(self.dataloader)
        self._max_iters = _round_up_to_step(int(max_iters or 0), sampler)
        self._max_epochs = 1
        self._epoch = 0
        self._iter = 0
        self.val_begin = val_begin
        self.val_interval = val_interval
        self.stop_training = False
        self.stop_reason = ""
        self._validation_due = False
        self.optim_wrapper: Any = None
        """Stands in for the runner's where a hook has put something, see ``train/nonfinite.py``."""
        self.dynamic_milestones, self.dynamic_intervals = calc_dynamic_intervals(
            val_interval, dynamic_intervals
        )
        self.runner.visualizer.dataset_meta = self.dataloader.dataset.metainfo
        print_log(
            f"{len(sampler)} micro-batches and {sampler.steps} optimiser steps an epoch; "
            f"training {self._max_iters} micro-batches, {self.total_steps} steps",
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
        """Train from the current iteration on; ``status.json`` in the work dir says how it ended.

        Raises:
            GMAIError: the engine, the ranks or the checkpoint disagree about the data; says how.
        """
        with told(self):
            return self._run()

    def _run(self) -> Any:
        self._check_accumulation()
        self._check_ranks_agree()
        self._check_resumed_order()
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        batches = self._batches()
        if self.resumed_from is not None:
            restore_rank_state(self.runner, self.resumed_from)
        if self._iter >= self._max_iters:
            print_log(
                f"Nothing to train: iteration {self._iter} of {self._max_iters} is reached",
                logger="current",
            )
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            batch = next(batches)
            self.runner.model.set_gradient_accumulation_boundary(batch["data"]["step_end"])
            self.run_iter(batch)
            self._decide_current_val_interval()
            self._validation_due |= self._iter >= self.val_begin and (
                self._iter % self.val_interval == 0 or self._iter == self._max_iters
            )
            if self._validation_due and batch["data"]["step_end"]:
                self._validation_due = False
                if self.runner.val_loop is not None and not self.stop_training:
                    with preserved_random_state():
                        self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: dict[str, Any]) -> None:
        """One micro-batch. What it adds to the logged loss stays here (``weighted_sum``, on the device):
        mmengine would print every output of the model."""
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = self.runner.model.train_step(
            data_batch, optim_wrapper=self.optim_wrapper or self.runner.optim_wrapper
        )
        self.weighted_sum: torch.Tensor = outputs.pop("weighted_sum")
        self.runner.call_hook(
            "after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs
        )
        self._iter += 1

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

    def _data_order(self) -> dict[str, Any]:
        """What decides which conversations an iteration trains on."""
        sampler, plan = self.micro_batches, self.dataloader.dataset.plan
        return {
            **plan.settings,
            "plan": plan.folder.name,
            # The draw depends on numpy's version too, which the plan's name does not know.
            "content": plan.epoch(0).digest[:16],
            "packs": len(sampler.sampler),
            "world_size": sampler.world_size,
            "batch_size": sampler.batch_size,
            "accumulative_counts": sampler.accumulative_counts,
            "weighting": sampler.weighting,
        }

    def _check_ranks_agree(self) -> None:
        orders = all_gather_object(self._data_order())
        different = [rank for rank, order in enumerate(orders) if order != orders[0]]
        if different:
            raise GMAIError(
                f"ranks {different} see other data than rank 0: {orders[different[0]]} against "
                f"{orders[0]}. Was an image or a file unreadable on one machine? Let all machines "
                "share one GMAI_CACHE, or remove the caches and start again"
            )

    def _check_resumed_order(self) -> None:
        hub, now = self.runner.message_hub, self._data_order()
        if self._iter:
            before = hub.get_info(DATA_ORDER)
            changed = {
                key: (before.get(key), now[key]) for key in now if before.get(key) != now[key]
            }
            if changed:
                told = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed.items())
                raise GMAIError(
                    f"this run can't go on from iteration {self._iter}: {told}. Resume with the data "
                    "and the layout that it began with, or start a new run from its weights "
                    "(model.pretrained_pth)"
                )
            position = (self._iter - 1) % len(self.micro_batches)
            if not self.micro_batches.step_ends(position):
                raise GMAIError(
                    f"the checkpoint of iteration {self._iter} lies inside an optimiser step, whose "
                    "gradients it does not hold. Take one that StepCheckpointHook has written"
                )
            length = hub.get_info(LENGTH, self._max_iters)
            if length != self._max_iters:
                print_log(
                    f"The run was {length} micro-batches long when it was stopped, and is {self._max_iters} "
                    "now: the learning rate follows the new length from here on",
                    logger="current",
                    level=logging.WARNING,
                )
        hub.update_info(DATA_ORDER, now)
        hub.update_info(LENGTH, self._max_iters)


def with_loader_defaults(dataloader: DataLoader | dict[str, Any]) -> DataLoader | dict[str, Any]:
    if not isinstance(dataloader, dict):
        return dataloader
    options = {"pin_memory": torch.cuda.is_available(), **dataloader}
    if not options.get("num_workers"):
        # torch refuses these without workers.
        options.pop("persistent_workers", None)
        options.pop("prefetch_factor", None)
    return options


def _round_up_to_step(iterations: int, sampler: MicroBatchSampler) -> int:
    while not sampler.step_ends((iterations - 1) % len(sampler)):
        iterations += 1
    return iterations
