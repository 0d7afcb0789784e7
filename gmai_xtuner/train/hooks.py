# SPDX-License-Identifier: Apache-2.0

"""What the log and TensorBoard show."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner

from gmai_xtuner.model.costs import ModelFlops, device_peak_flops


def is_due(step: int, interval: int, begin: int = 0) -> bool:
    """Return whether ``step`` is one of every ``interval`` steps from ``begin`` on; 0 means never."""
    return interval > 0 and step >= begin and (step - begin) % interval == 0


@HOOKS.register_module()
class ProgressHook(Hook):
    """Loss, useful tokens, conversations and images a second, pack fill and gradient norm.

    ``loss``: weighted mean over the supervised tokens of all ranks since the last value. (What the model
    returns to learn from is scaled for the optimiser step and would jump with every micro-batch.) A
    micro-batch whose loss is not finite is left out, and reported by :class:`NonFiniteHook`; NaN means that
    nothing else came since the last value.
    ``tokens_per_second``: tokens of conversations (there is no padding) that this rank trained, over
    wall time including data loading; multiply by the number of GPUs for the run. ``pack_fill``: tokens
    over what the packs could hold. ``grad_norm``: global norm before clipping, of the last step. ``mfu``:
    share of the device's peak that the model's work takes, on devices whose peak is known, see
    :mod:`gmai_xtuner.model.costs`.

    Values are made when the logger shows them, each over the micro-batches since the one before, and so are
    mmengine's means of times; in between nothing waits for the device.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self) -> None:
        self._from_the_start, self._first, self._last = True, math.nan, math.nan
        self._norm: Any = None
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._counts = dict.fromkeys(("tokens", "capacity", "images", "samples", "flops"), 0)
        self._sums: list[torch.Tensor] = []

    def before_train(self, runner: FlexibleRunner) -> None:
        loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
        self._logger = loggers[0] if loggers else LoggerHook()
        self._model_flops = ModelFlops.of(runner.model.module)
        self._peak_flops = device_peak_flops()
        self._from_the_start = runner.iter == 0
        self._reset()

    def after_train_iter(
        self, runner: FlexibleRunner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        data = data_batch["data"]
        trained = bool(data["num_tokens"])  # else it keeps a rank in step
        for name, number in (
            ("tokens", data["num_tokens"]),
            ("capacity", data["capacity"]),
            ("images", trained * data["pixel_values"].shape[0]),
            ("samples", trained * len(data["lengths"])),
            ("flops", self._model_flops.of_batch(data)),
        ):
            self._counts[name] += int(number)
        weighted_sum = runner.train_loop.weighted_sum
        weights = torch.full_like(weighted_sum, data["label_weight"])
        pair = torch.stack([weighted_sum, weights])
        self._sums.append(torch.where(weighted_sum.isfinite(), pair, torch.zeros_like(pair)))
        if runner.train_loop.step_end:
            self._norm = runner.model.get_global_grad_norm()
        if self._is_shown(runner, batch_idx) or self.is_last_train_iter(runner):
            self._publish(runner)

    def after_train(self, runner: FlexibleRunner) -> None:
        """Say so if the last logged loss of a whole run is no lower than the first."""
        if self._from_the_start and self._last > self._first and runner.iter >= runner.max_iters:
            runner.logger.warning(
                f"The loss has not fallen ({self._first:.4f} at first, {self._last:.4f} at last): nothing "
                "was learnt that it could show"
            )

    def _is_shown(self, runner: FlexibleRunner, batch_idx: int) -> bool:
        """Return whether the logger shows this micro-batch: ``LoggerHook.after_train_iter``."""
        interval = self._logger.interval
        if self.every_n_inner_iters(batch_idx, interval):
            return True
        length = len(runner.train_dataloader)
        return batch_idx + 1 == length and (not self._logger.ignore_last or length <= interval)

    def before_val(self, runner: FlexibleRunner) -> None:
        """Stop the clock: validation and sample answers are no training time."""
        self._paused = time.perf_counter()

    def after_val(self, runner: FlexibleRunner) -> None:
        self._started += time.perf_counter() - self._paused

    def _publish(self, runner: FlexibleRunner) -> None:
        sums = torch.stack(self._sums).sum(0)
        all_reduce(sums)
        seconds = time.perf_counter() - self._started
        hub = runner.message_hub
        loss = float(sums[0] / sums[1])
        runner.log_processor.window_size = len(self._sums)
        self._first, self._last = loss if math.isnan(self._first) else self._first, loss
        hub.update_scalar("train/loss", loss)
        if self._norm is not None:
            hub.update_scalar("train/grad_norm", float(self._norm))
        counts = self._counts
        hub.update_scalar("train/pack_fill", counts["tokens"] / max(1, counts["capacity"]))
        for name in ("tokens", "images", "samples"):
            hub.update_scalar(f"train/{name}_per_second", counts[name] / seconds)
        if self._peak_flops is not None:
            hub.update_scalar("train/mfu", counts["flops"] / seconds / self._peak_flops)
        self._reset()

    def rank_state_dict(self) -> dict[str, Any]:
        """Return the counts since the last value, so that a resumed run shows the same next value."""
        sums = torch.stack(self._sums).cpu() if self._sums else None
        norm = None if self._norm is None else float(self._norm)
        seconds = time.perf_counter() - self._started
        return {**self._counts, "seconds": seconds, "sums": sums, "norm": norm}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        self._started = time.perf_counter() - state["seconds"]
        # Checkpoints of earlier versions have no samples and no norm.
        self._norm = state.get("norm")
        self._counts = {name: state.get(name, 0) for name in self._counts}
        self._sums = [] if state["sums"] is None else list(state["sums"].to(get_device()))
