"""What the log and TensorBoard show, and when a checkpoint is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner


@HOOKS.register_module()
class ProgressHook(Hook):
    """Loss, useful tokens a second, pack fill, images a second and gradient norm.

    ``loss``: weighted mean over the learnt tokens of all ranks since the last value. (What the model
    returns to learn from is scaled for the optimiser step and would jump with every micro-batch.)
    ``tokens_per_second``: tokens of conversations (there is no padding) that this rank trained, over
    wall time including data loading; multiply by the number of GPUs for the run. ``pack_fill``: tokens
    over what the packs could hold. ``grad_norm``: global norm before clipping, of the last step.

    Values are made as often as the logger shows them; in between nothing waits for the device.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._tokens = self._capacity = self._images = 0
        self._sums: list[torch.Tensor] = []

    def before_train(self, runner: FlexibleRunner) -> None:
        loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
        self._interval = loggers[0].interval if loggers else 10
        self._reset()

    def after_train_iter(
        self,
        runner: FlexibleRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        data = (data_batch or {})["data"]
        self._tokens += data["num_tokens"]
        self._capacity += data["capacity"]
        self._images += data["pixel_values"].shape[0] if data["num_tokens"] else 0
        weighted_sum = runner.train_loop.weighted_sum
        self._sums.append(torch.stack([weighted_sum, data["label_weights"].sum().to(weighted_sum)]))
        if data["step_end"]:
            norm = runner.model.get_global_grad_norm()
            if norm is not None:
                runner.message_hub.update_scalar("train/grad_norm", float(norm))
        if self.every_n_train_iters(runner, self._interval) or self.is_last_train_iter(runner):
            self._publish(runner)

    def _publish(self, runner: FlexibleRunner) -> None:
        sums = torch.stack(self._sums).sum(0)
        all_reduce(sums)
        seconds = time.perf_counter() - self._started
        hub = runner.message_hub
        hub.update_scalar("train/loss", float(sums[0] / sums[1].clamp(min=1e-12)))
        hub.update_scalar("train/tokens_per_second", self._tokens / seconds)
        hub.update_scalar("train/pack_fill", self._tokens / max(1, self._capacity))
        hub.update_scalar("train/images_per_second", self._images / seconds)
        self._reset()


@HOOKS.register_module()
class StepCheckpointHook(CheckpointHook):
    """Writes a due checkpoint at the end of the optimiser step, when no gradients are under way.

    Takes the options of mmengine's ``CheckpointHook``; ``interval`` counts micro-batches.
    """

    _due = False

    def after_train_iter(
        self,
        runner: FlexibleRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._due |= self.every_n_train_iters(runner, self.interval, self.save_begin)
        last = self.save_last and self.is_last_train_iter(runner)
        if (data_batch or {})["data"]["step_end"] and (self._due or last):
            self._due = False
            runner.logger.info(f"Saving checkpoint at {runner.iter + 1} iterations")
            self._save_checkpoint(runner)
