# SPDX-License-Identifier: Apache-2.0

"""Linear warm-up, then half a cosine, counted in optimiser steps."""

from __future__ import annotations

import math
from typing import Any

from mmengine.config import ConfigDict
from mmengine.hooks import ParamSchedulerHook
from mmengine.optim import DefaultOptimWrapperConstructor, _ParamScheduler
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from mmengine.runner import FlexibleRunner
from torch import nn

from gmai_xtuner.core.errors import GMAIError

LEAST_STEPS = 10
LEAST_RATES = 1e-4
"""Optimiser steps, and the sum of their learning rates, below which a run is said to be small: Adam moves a
weight by about the rate in a step, and the weights of a 7B have a spread of 0.02."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RatesByPart(DefaultOptimWrapperConstructor):
    """Give each part of the model a group of parameters, with the learning rate that is named for it."""

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, *_: Any, **__: Any
    ) -> None:
        for name, part in module.named_children():
            weights = [weight for weight in part.parameters() if weight.requires_grad]
            if weights:
                rate = self.paramwise_cfg.get(name, self.base_lr)
                params.append({"params": weights, "lr": rate, "part": name})


def set_rates_by_part(runner: FlexibleRunner) -> None:
    """Let ``optim_wrapper.optimizer.lr_by_part`` decide how the optimiser is built; before it is.

    ``xtuner train`` hands on nothing of ``optim_wrapper`` but its ``optimizer``.
    """
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, dict) and "lr_by_part" in wrapper["optimizer"]:
        optimizer = dict(wrapper["optimizer"])
        rates = dict(optimizer.pop("lr_by_part") or {})
        by_part = {"constructor": "RatesByPart", "paramwise_cfg": rates} if rates else {}
        runner.optim_wrapper = ConfigDict({**wrapper, **by_part, "optimizer": optimizer})


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """Learning rate by optimiser step, from one formula for the whole run.

    One scheduler instead of mmengine's ``LinearLR`` followed by ``CosineAnnealingLR``: that pair raises
    "end should be larger than begin" in runs so short that the warm-up rounds to no iteration, and its
    recursive form drifts. Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), without restarts.

    Args:
        optimizer: optimiser or wrapper.
        end: optimiser steps of the run. The runner first fills in its iterations;
            :class:`OptimizerStepScheduleHook` puts it right before training.
        warmup_ratio: share of the run in which the rate rises from ``1 / warm-up steps`` of the base
            rate to the base rate.
    """

    def __init__(
        self,
        optimizer: Any,
        *args: Any,
        warmup_ratio: float = 0.03,
        **kwargs: Any,
    ) -> None:
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be at least 0 and below 1, got {warmup_ratio}")
        self.warmup_ratio = warmup_ratio
        super().__init__(optimizer, *args, **kwargs)

    def factor(self, step: int, total: int) -> float:
        """Share of the base rate at optimiser step ``step`` of ``total``."""
        warmup = int(self.warmup_ratio * total)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def set_total_steps(self, total: int) -> None:
        """Say how many optimiser steps the run has; takes effect at once."""
        self.end = self.begin + total
        for group, value in zip(self.optimizer.param_groups, self._get_value(), strict=True):
            group[self.param_name] = value

    def _get_value(self) -> list[float]:
        share = self.factor(self.last_step, int(self.end - self.begin))
        return [base * share for base in self.base_values]


@HOOKS.register_module()
class OptimizerStepScheduleHook(ParamSchedulerHook):
    """Moves the schedule on when the optimiser has stepped, not with every micro-batch.

    So the rate of step ``n`` does not depend on how a step is split into micro-batches and ranks.
    """

    def before_train(self, runner: FlexibleRunner) -> None:
        for scheduler in self._schedules(runner):
            scheduler.set_total_steps(runner.train_loop.total_steps)
            _log_if_the_rate_is_another(runner, scheduler.base_values)
            _log_if_small(runner, scheduler)
        self._check(runner)

    def before_train_iter(self, runner: FlexibleRunner, *args: Any, **kwargs: Any) -> None:
        """Show the rate of each part; mmengine shows that of the first group alone."""
        for group in runner.model.optimizer.param_groups:
            if "part" in group:
                runner.message_hub.update_scalar(f"train/{group['part']}_lr", group["lr"])

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: mmengine's would count micro-batches."""

    def after_step(self, runner: FlexibleRunner) -> None:
        self._check(runner)
        for scheduler in runner.param_schedulers or ():
            scheduler.step()

    @staticmethod
    def _schedules(runner: FlexibleRunner) -> list[WarmupCosineLR]:
        return [one for one in runner.param_schedulers or () if isinstance(one, WarmupCosineLR)]

    def _check(self, runner: FlexibleRunner) -> None:
        """Refuse to go on if something else sets the rate, before the first step and after each."""
        for scheduler in self._schedules(runner):
            name = scheduler.param_name
            rates = [group[name] for group in runner.model.optimizer.param_groups]
            # mmengine adds its base settings to several groups
            expected = scheduler._get_value()[: len(rates)]
            if len(rates) != len(expected) or not all(map(math.isclose, rates, expected)):
                raise GMAIError(
                    f"step {runner.train_loop.step + 1} has the {name} {rates}, but the schedule of the "
                    f"config {expected}: something else sets it, perhaps a scheduler of DeepSpeed or a hook "
                    "of your own. Remove that, or the config's param_scheduler"
                )


def _log_if_the_rate_is_another(runner: FlexibleRunner, base: list[float]) -> None:
    """Warn that a resumed run keeps the rates it began with; refuse a new run that has not the config's."""
    optimizer = runner.cfg.get("optim_wrapper", {}).get("optimizer", {})
    rates, default = optimizer.get("lr_by_part") or {}, optimizer.get("lr")
    groups = runner.model.optimizer.param_groups
    base = base[: len(groups)]
    configured = [
        rates.get(group.get("part"), own if default is None else default)
        for group, own in zip(groups, base, strict=True)
    ]
    if rates:
        parts = (f"{group['part']} {rate:g}" for group, rate in zip(groups, base, strict=True))
        runner.logger.info(f"Learning rate by part: {', '.join(parts)}")
    if configured == base:
        return
    shown = [", ".join(f"{rate:g}" for rate in values) for values in (base, configured)]
    if runner.train_loop.resumed_from is None:
        raise GMAIError(
            f"the engine was built with the learning rate {shown[0]}, but the config's is {shown[1]}: "
            "something else sets it, perhaps a scheduler of DeepSpeed"
        )
    runner.logger.warning(
        f"The learning rate goes on from the {shown[0]} that this run began with; the config's "
        f"{shown[1]} is not used. For another rate start a new run from its weights "
        "(model.pretrained_pth)"
    )


def _log_if_small(runner: FlexibleRunner, scheduler: WarmupCosineLR) -> None:
    steps, rate = runner.train_loop.total_steps, max(scheduler.base_values)
    rates = sum(rate * scheduler.factor(step, steps) for step in range(steps))
    if steps < LEAST_STEPS or rates < LEAST_RATES:
        runner.logger.warning(
            f"This run is too small to learn much: {steps} optimiser step{'s' * (steps != 1)}, whose "
            f"learning rates add up to {rates:.1g} (expected: {LEAST_STEPS} steps and {LEAST_RATES:g} at "
            "least). Take the config small_data, more epochs (train_cfg.max_epochs), fewer packs a step "
            "(train_dataloader.batch_size, optim_wrapper.accumulative_counts) or a higher "
            "optim_wrapper.optimizer.lr"
        )
