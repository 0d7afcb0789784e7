"""What the log and TensorBoard show beside the loss."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Useful tokens a second, pack fill, images and gradient norm.

    ``tokens_per_second``: tokens of conversations (there is no padding) that this rank trained, over
    wall time including data loading, since the last value; multiply by the number of GPUs for the run.
    ``pack_fill``: tokens over what the packs could hold. ``grad_norm``: global norm before clipping, of
    the last optimiser step.

    Args:
        interval: iterations between two values; the logger's interval.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._tokens = self._capacity = self._images = 0

    def before_train(self, runner: FlexibleRunner) -> None:
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
        self._images += data["pixel_values"].shape[0]
        if data["step_end"]:
            norm = runner.model.get_global_grad_norm()
            if norm is not None:
                runner.message_hub.update_scalar("train/grad_norm", float(norm))
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            seconds = time.perf_counter() - self._started
            hub = runner.message_hub
            hub.update_scalar("train/tokens_per_second", self._tokens / seconds)
            hub.update_scalar("train/pack_fill", self._tokens / self._capacity)
            hub.update_scalar("train/images_per_second", self._images / seconds)
            self._reset()
