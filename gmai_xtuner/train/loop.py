# SPDX-License-Identifier: Apache-2.0

"""The training loop: the sampler says where an optimiser step ends, and a resumed run begins there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object
from mmengine.registry import LOOPS
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from gmai_xtuner.checkpoint.training import STAGE
from gmai_xtuner.core.config import train_dataloader_config
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.data.sampler import MicroBatchSampler
from gmai_xtuner.train.hooks import is_due
from gmai_xtuner.train.resume import choose_checkpoint, preserved_random_state, restore_rank_state
from gmai_xtuner.train.schedule import set_rates_by_part
from gmai_xtuner.train.signals import guard_workers
from gmai_xtuner.train.start import NO_DEEPSPEED, check_something_learns
from gmai_xtuner.train.status import Run, failure_recorded

DATA_ORDER = "gmai_data_order"
"""Where a checkpoint's message hub keeps what decides the order of the data."""

LENGTH = "gmai_length"
"""Where it keeps the length of the run in micro-batches."""

LAYOUT = ("world_size", "batch_size", "accumulative_counts")
"""What of the order of the data may change when a run is resumed, as long as a step has as many packs."""


@LOOPS.register_module()
class PackedTrainLoop(IterBasedTrainLoop):
    """Runs micro-batches and says where an optimiser step ends.

    Iterations in logs and names of checkpoints count micro-batches, as in xtuner; intervals count optimiser
    steps. At the end of each step, a hook's method ``after_step(runner)`` is called; :attr:`step` is then the
    number of steps made.

    Differs from ``xtuner.engine.runner.TrainLoop``: the optimiser also steps on the short last window of an
    epoch; a run finds the newest whole checkpoint by itself where it is asked to resume
    (:func:`~gmai_xtuner.train.resume.choose_checkpoint`); a resumed run reads nothing that it has
    trained on already, on whatever number of ranks; it refuses to go on with other data or other packs a step
    than it began with, or if ranks see different data; training never ends in the middle of a step.

    Args:
        runner: xtuner's runner; DeepSpeed is required, it keeps the gradients of a step.
        dataloader: with a :class:`MicroBatchSampler`; what the config names elsewhere is filled in
            (:mod:`gmai_xtuner.core.config`).
        max_iters: micro-batches to train; rounded up to the end of an optimiser step.
        max_epochs: or epochs; may be a fraction.
        val_interval: optimiser steps from one validation to the next; the run ends with one.

    Raises:
        GMAIError: no DeepSpeed, another sampler, or not exactly one of the two lengths.
    """

    _status: Run | None = None

    def __init__(
        self,
        runner: FlexibleRunner,
        dataloader: DataLoader | dict[str, Any],
        max_iters: int | None = None,
        max_epochs: float | None = None,
        *,
        val_interval: int = 125,
    ) -> None:
        if not isinstance(runner, FlexibleRunner):
            raise GMAIError(NO_DEEPSPEED)
        rendezvous_alone()
        with self._recorded(runner):
            self.resumed_from = choose_checkpoint(runner)
            if isinstance(dataloader, dict):
                config = {**runner.cfg, "train_dataloader": dataloader}
                dataloader = with_loader_defaults(train_dataloader_config(config))
            # Not IterBasedTrainLoop's own: it would start the workers on the first batches at once, which
            # a resumed run does not want.
            BaseLoop.__init__(self, runner, dataloader)
            plan = self.dataloader.dataset.plan.epoch(0)
            check_something_learns(runner.cfg.model, plan.total("images").sum())
            set_rates_by_part(runner)
        sampler = self.dataloader.batch_sampler
        if not isinstance(sampler, MicroBatchSampler):
            raise GMAIError(
                f"train_dataloader needs batch_sampler=dict(type='MicroBatchSampler', ...), got "
                f"{type(sampler).__name__}"
            )
        guard_workers(self.dataloader)
        self._max_iters = sampler.run_length(max_epochs, max_iters)
        self._max_epochs = 1
        self._epoch = 0
        self._iter = 0
        self.step = 0
        """Optimiser steps made."""
        self.step_end = False
        """Whether the optimiser steps after the current micro-batch."""
        self.val_interval = val_interval
        self.stop_training = False
        self.stop_reason = ""
        self.stopped_early = False
        """Whether a hook has ended the run as one that has learnt what it can."""
        self.optim_wrapper: Any = None
        """Stands in for the runner's where a hook has put something, see ``train/nonfinite.py``."""
        self.runner.visualizer.dataset_meta = self.dataloader.dataset.metainfo
        info(
            f"{len(sampler)} micro-batches and {sampler.steps} optimiser steps an epoch; "
            f"training {self._max_iters} micro-batches, {self.total_steps} steps"
        )

    @property
    def micro_batches(self) -> MicroBatchSampler:
        return self.dataloader.batch_sampler

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.micro_batches.steps_after(self._max_iters)

    def run(self) -> Any:
        """Train from the current iteration on; ``status.json`` in the work dir says how it ended.

        Raises:
            GMAIError: the engine, the ranks or the checkpoint disagree about the data; says how.
        """
        with self._recorded(self.runner) as run:
            self._status = run
            run.progress = lambda: (self._iter, self._max_iters)
            stage = self.runner.cfg.train_dataloader.dataset.get("stage")
            self.runner.message_hub.update_info(STAGE, stage)
            model = self._run()
            finished = self._iter >= self._max_iters or self.stopped_early
            run.write("finished" if finished else "stopped", self.stop_reason)
            return model

    @staticmethod
    def _recorded(runner: FlexibleRunner) -> AbstractContextManager[Run]:
        return failure_recorded(Path(runner.work_dir), resumes=bool(runner._resume))

    def _run(self) -> Any:
        self._check_accumulation()
        self._check_ranks_agree()
        moved = self._check_resumed_order()
        self.step = self.micro_batches.steps_after(self._iter)
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        batches = self._batches()
        if self.resumed_from is not None and not moved:
            restore_rank_state(self.runner, self.resumed_from)
        if self._iter >= self._max_iters:
            info(f"Nothing to train: iteration {self._iter} of {self._max_iters} is reached")
        if self._status is not None:
            self._status.write("running")  # now that requests to stop are heard
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            batch = next(batches)
            self.runner.model.set_gradient_accumulation_boundary(self.step_end)
            self.run_iter(batch)
            if self.step_end and not self.stop_training:
                self._validate()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: dict[str, Any]) -> None:
        """Train one micro-batch.

        What it adds to the logged loss stays here (``weighted_sum``, on the device), and so does the loss to
        learn from, which is scaled for the optimiser step: mmengine would log every output of the model.
        """
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = self.runner.model.train_step(
            data_batch, optim_wrapper=self.optim_wrapper or self.runner.optim_wrapper
        )
        self.weighted_sum: torch.Tensor = outputs.pop("weighted_sum")
        outputs.pop("loss", None)
        self.runner.call_hook(
            "after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs
        )
        if self.step_end:
            self.step += 1
            self.runner.call_hook("after_step")
            if self._status is not None:
                self._status.renew()
        self._iter += 1

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield micro-batches of all epochs, each with its denominator; keeps :attr:`step_end`."""
        sampler = self.micro_batches
        while True:
            self._epoch, start = divmod(self._iter, len(sampler))
            sampler.set_position(self._epoch, start)
            for position, batch in enumerate(self.dataloader, start):
                batch["data"]["loss_denominator"] = sampler.loss_denominator(self._epoch, position)
                self.step_end = sampler.step_ends(position)
                yield batch

    def _validate(self) -> None:
        due = is_due(self.step, self.val_interval) or self._iter == self._max_iters
        if due and self.runner.val_loop is not None:
            with preserved_random_state():
                self.runner.val_loop.run()

    def _check_accumulation(self) -> None:
        """The sampler normalises the loss for this accumulation; the engine must agree."""
        engine = self.runner.model.gradient_accumulation_steps()
        if engine != self.micro_batches.accumulative_counts:
            raise GMAIError(
                f"the engine sums {engine} micro-batches a step, but the batch sampler "
                f"{self.micro_batches.accumulative_counts}: set optim_wrapper.accumulative_counts alone"
            )

    def _data_order(self) -> dict[str, Any]:
        """Return what decides which conversations an iteration trains on."""
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

    def _check_resumed_order(self) -> bool:
        """Check that a resumed run has the data it began with; find its iteration in another layout.

        Returns whether the layout is another.
        """
        hub, now = self.runner.message_hub, self._data_order()
        moved = False
        if self._iter:
            before = hub.get_info(DATA_ORDER)
            changed = {
                k: f"{k}: {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v
            }
            moved = not changed.keys().isdisjoint(LAYOUT)
            old = self._micro_batches_of(before) if moved else self.micro_batches
            self._refuse_other_data(changed, old)
            if not old.step_ends((self._iter - 1) % len(old)):
                raise GMAIError(
                    f"the checkpoint of iteration {self._iter} lies inside an optimiser step, whose "
                    "gradients it does not hold. Take one that StepCheckpointHook has written"
                )
            length = hub.get_info(LENGTH)
            steps = self.total_steps if length is None else old.steps_after(length)
            if steps != self.total_steps:
                warn(
                    f"The run was {steps} optimiser steps long when it was stopped, and is "
                    f"{self.total_steps} now: the learning rate follows the new length from here on"
                )
            if moved:
                step, was = old.steps_after(self._iter), self._iter
                self._iter = self.micro_batches.iterations_at(step)
                info(
                    f"{', '.join(changed.values())}: step {step}, iteration {was} until now, is iteration "
                    f"{self._iter} from here on. Random numbers (dropout) go on other than they would have"
                )
        hub.update_info(DATA_ORDER, now)
        hub.update_info(LENGTH, self._max_iters)
        return moved

    def _micro_batches_of(self, order: Mapping[str, Any]) -> MicroBatchSampler:
        """Return the micro-batches of the layout that a checkpoint was written in."""
        world, size, count = (order[key] for key in LAYOUT)
        return MicroBatchSampler(
            self.micro_batches.sampler, size, accumulative_counts=count, rank=0, world_size=world
        )

    def _refuse_other_data(self, changed: Mapping[str, str], old: MicroBatchSampler) -> None:
        now = self.micro_batches
        reasons = [text for key, text in changed.items() if key not in LAYOUT]
        remedy = "Resume with the data that it began with"
        if old.packs_per_step != now.packs_per_step:
            reasons.append(
                f"packs of an optimiser step: {old.packs_per_step} -> {now.packs_per_step}"
            )
            remedy += " and as many packs a step (GPUs x batch_size x accumulative_counts)"
        elif now.weighting == "micro_batch":
            reasons.extend(text for key, text in changed.items() if key in LAYOUT)
            remedy += ", and with its layout, on which the weighting micro_batch depends"
        if reasons:
            raise GMAIError(
                f"this run can't go on from iteration {self._iter}: {', '.join(reasons)}. {remedy}, or start "
                "a new run from its weights (model.pretrained_pth)"
            )


def with_loader_defaults(dataloader: dict[str, Any]) -> dict[str, Any]:
    """Return the options with pinned memory for CUDA, and without what needs workers if there are none."""
    options = {"pin_memory": torch.cuda.is_available(), **dataloader}
    if not options.get("num_workers"):
        options.pop("persistent_workers", None)
        options.pop("prefetch_factor", None)
    return options


def rendezvous_alone() -> None:
    """Let single-process jobs on one machine run side by side. To be called before DeepSpeed starts.

    Without a launcher DeepSpeed looks for MPI and then listens on its fixed default port, so the second
    ``xtuner train`` on a machine would stop with "address already in use".
    """
    if torch.distributed.is_initialized() or "RANK" in os.environ:
        return
    # Port 0: the store listens on a free port that the system gives it. A port looked up beforehand can be
    # taken by another program before the store listens.
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
