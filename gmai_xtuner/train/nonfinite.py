# SPDX-License-Identifier: Apache-2.0

"""An optimiser step with a NaN or an infinity is left out, reported and counted; too many stop the run.

DeepSpeed 0.16.2 looks for overflow in fp16 alone (``step`` in ``zero/stage_1_and_2.py`` and
``zero/stage3.py``: ``if self.dtype == torch.float16: self.check_overflow()``). In bf16 and fp32 a NaN goes
into every weight and both moments of Adam, and the run is lost. But the way to leave a step out is there for
any precision: ``step`` of a ZeRO optimiser whose ``overflow`` is set clears the gradients of the whole step,
the accumulated ones too, and returns. So this module decides before the step, for all ranks together, and
sets that flag; nothing of DeepSpeed is replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.log import warn
from gmai_xtuner.train.checkpointing import checkpoint_hook

COUNTS = "gmai_skipped_steps"
"""Where a checkpoint's message hub keeps the number of skipped steps, in total and in a row."""

LIST = "nonfinite.jsonl"
IDS_IN_LOG = 20


class NonFiniteError(GMAIError):
    """More optimiser steps were skipped than allowed."""


class StepGuard:
    """Stands where the optimiser wrapper stands in ``train_step``; steps on finite numbers only.

    A step is left out if the loss of one of its micro-batches, or a reduced gradient, is not finite on any
    rank. Per micro-batch nothing waits for the device; per optimiser step there is one wait more, and two
    all-reduces of one number (DeepSpeed's own ``check_overflow``, and the losses').

    ``optim_wrapper`` is mmengine's ``DeepSpeedOptimWrapper``, after DeepSpeed has started; ``message_hub``
    keeps the counts, also over a resume, and hands them to the log.

    Raises:
        GMAIError: DeepSpeed runs without ZeRO, where a step can't be left out.
    """

    def __init__(self, optim_wrapper: Any, message_hub: MessageHub) -> None:
        self._wrapper = optim_wrapper
        self._hub = message_hub
        self._engine = optim_wrapper.model
        self._optimizer = self._engine.optimizer
        if not hasattr(self._optimizer, "check_overflow"):
            raise GMAIError(
                f"the guard against NaN needs ZeRO stage 1, 2 or 3, got "
                f"{type(self._optimizer).__name__}: take --deepspeed zero1, zero2 or zero3"
            )
        self._losses: list[torch.Tensor] = []
        self.skipped = False
        """Whether the last optimiser step was left out."""
        self.bad_losses: list[bool] = []
        """Which micro-batches of a skipped step had a loss that was not finite on this rank."""
        counts = message_hub.get_info(COUNTS, {})
        self.total: int = counts.get("total", 0)
        self.in_a_row: int = counts.get("in_a_row", 0)
        self._publish()

    def update_params(self, loss: torch.Tensor) -> None:
        """Backward pass, and at the end of an optimiser step the step, unless it must be left out."""
        self._losses.append(loss.detach())
        self._wrapper.backward(loss)
        if self._engine.is_gradient_accumulation_boundary():
            self._decide()
            self._optimizer.overflow = self.skipped
        self._wrapper.step()
        # In bf16 and fp32 nobody else takes the flag back, and it would be saved with a checkpoint.
        self._optimizer.overflow = False

    def _decide(self) -> None:
        bad = ~torch.isfinite(torch.stack(self._losses))
        anywhere = bad.any().to(torch.float32)
        all_reduce(anywhere, "max")
        self._optimizer.check_overflow()
        self._losses.clear()
        # fp16: the loss scaler overflows by design and answers for itself, in step().
        gradients = self._optimizer.overflow and self._optimizer.dtype != torch.float16
        self.skipped = bool(gradients or anywhere.item())
        self.bad_losses = bad.tolist() if self.skipped else []
        self.total += self.skipped
        self.in_a_row = self.in_a_row + 1 if self.skipped else 0
        self._publish()

    def _publish(self) -> None:
        self._hub.update_info(COUNTS, {"total": self.total, "in_a_row": self.in_a_row})
        self._hub.update_scalar("train/skipped_steps", self.total)


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Names, counts and bounds the optimiser steps that :class:`StepGuard` leaves out.

    The learning-rate schedule and the position in the data go on. The conversations of the micro-batches
    whose loss was not finite are named in the log, and all of them in ``nonfinite.jsonl`` of the work dir; if
    only a gradient was not finite, those of the whole step. ``skipped_steps`` is logged; the count is in
    every checkpoint.

    Args:
        max_in_a_row: skipped steps one after the other that the run survives; default 3.
        max_total: skipped steps of the run, resumed parts counted, that it survives; default 20.

    Raises:
        NonFiniteError: after a checkpoint, when there are more. The weights in it are those before the
            first of the skipped steps in a row; its position is after the last.
    """

    priority = 80  # after the schedule has moved on, before a checkpoint is due

    def __init__(self, max_in_a_row: int = 3, max_total: int = 20) -> None:
        if max_in_a_row < 0 or max_total < 0:
            raise GMAIError(
                f"max_in_a_row and max_total must be at least 0, got {max_in_a_row} and {max_total}"
            )
        self.max_in_a_row, self.max_total = max_in_a_row, max_total
        self._seen: list[tuple[int, list[str]]] = []
        self._too_many = ""

    def before_train(self, runner: FlexibleRunner) -> None:
        checkpoint_hook(runner, "NonFiniteHook stops a run with a checkpoint, and")
        self._guard = StepGuard(runner.optim_wrapper, runner.message_hub)
        runner.train_loop.optim_wrapper = self._guard
        self._seen.clear()

    def after_train_iter(
        self, runner: FlexibleRunner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._seen.append((runner.iter + 1, data_batch["data"]["ids"]))

    def after_step(self, runner: FlexibleRunner) -> None:
        if self._guard.skipped:
            self._log_skipped(runner)
            if self._guard.total > self.max_total or self._guard.in_a_row > self.max_in_a_row:
                self._stop(runner)
        self._seen.clear()

    def _log_skipped(self, runner: FlexibleRunner) -> None:
        rank, guard = get_rank(), self._guard
        mine = [
            {"rank": rank, "iteration": iteration, "loss_finite": not bad, "ids": ids}
            for (iteration, ids), bad in zip(self._seen, guard.bad_losses, strict=True)
        ]
        rows = [row for part in all_gather_object(mine) for row in part]
        bad = [row for row in rows if not row["loss_finite"]]
        file = Path(runner.work_dir) / LIST
        if is_main_process():
            with file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in bad or rows)
        ids = [name for row in bad or rows for name in row["ids"]]
        where = ", ".join(f"{row['iteration']} on rank {row['rank']}" for row in bad)
        cause = "all its losses are finite, but a gradient is not"
        if bad:
            cause = f"the loss of micro-batch {where} is not finite"
        more = f" and {len(ids) - IDS_IN_LOG} more" if len(ids) > IDS_IN_LOG else ""
        warn(
            f"Optimiser step skipped at iteration {runner.iter + 1}: {cause}. Nothing has changed in the "
            f"weights and the optimiser; {guard.total} skipped in total, {guard.in_a_row} in a row. "
            "Micro-batches that are not finite are left out of the logged loss. Samples: "
            f"{', '.join(ids[:IDS_IN_LOG])}{more}; all in {file}"
        )

    def after_train(self, runner: FlexibleRunner) -> None:
        if self._too_many:
            raise NonFiniteError(
                f"{self._too_many}; {self.max_in_a_row} in a row and {self.max_total} in total are allowed. "
                f"Their samples are in {Path(runner.work_dir) / LIST}. The checkpoint of iteration "
                f"{runner.iter} has the weights from before them. Look at the samples and the learning "
                "rate; then resume, with a larger default_hooks.nonfinite.max_in_a_row or max_total if "
                "these were to be expected"
            )

    def _stop(self, runner: FlexibleRunner) -> None:
        self._too_many = (
            f"{self._guard.in_a_row} optimiser steps in a row and {self._guard.total} in total were not "
            "finite"
        )
        # It comes next, and writes the checkpoint; the error follows when the loop has ended in good order.
        checkpoint_hook(runner, "NonFiniteHook").stop.ask(self._too_many)
