# SPDX-License-Identifier: Apache-2.0

"""The learning rate against values by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train.schedule import OptimizerStepScheduleHook, WarmupCosineLR


def rates(total, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupCosineLR(optimizer, by_epoch=False, begin=0, end=total, **options)
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_warm_up_then_cosine():
    values = rates(10, warmup_ratio=0.2)
    assert values[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert values[6] == pytest.approx(1.0)  # half of the cosine
    assert values[9] == pytest.approx(1 + math.cos(math.pi * 7 / 8))


@pytest.mark.parametrize("total", [1, 2, 5])
def test_a_run_too_short_for_a_warm_up_starts_at_the_full_rate(total):
    values = rates(total, warmup_ratio=0.03)
    assert values[0] == 2.0
    assert all(value > 0 for value in values)


def test_lowest_rate():
    scheduler = rates(4, warmup_ratio=0.0, eta_min_ratio=0.5)
    assert scheduler[0] == 2.0
    assert scheduler[2] == pytest.approx(1.5)


@pytest.mark.parametrize("options", [{"warmup_ratio": 1.0}, {"eta_min_ratio": -0.1}])
def test_impossible_shares_are_refused(options):
    with pytest.raises(ValueError, match="must be in"):
        rates(4, **options)


def runner_with(
    configured: float, *, resumed: bool = False, engine: float = 1.0, steps: int = 10
) -> SimpleNamespace:
    """As much of a runner as the hook needs; the engine's rates are ``engine`` times the schedule's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    warnings: list[str] = []
    scheduler = WarmupCosineLR(optimizer, by_epoch=False, begin=0, end=steps)
    engines = [{"lr": 2.0 * engine}] if engine != 1.0 else optimizer.param_groups
    return SimpleNamespace(
        param_schedulers=[scheduler],
        train_loop=SimpleNamespace(
            total_steps=steps, step=0, resumed_from="it" if resumed else None
        ),
        model=SimpleNamespace(optimizer=SimpleNamespace(param_groups=engines)),
        cfg={"optim_wrapper": {"optimizer": {"lr": configured}}},
        logger=SimpleNamespace(warning=warnings.append),
        warnings=warnings,
    )


@pytest.mark.parametrize(("configured", "told"), [(2.0, False), (0.5, True)])
def test_a_rate_of_the_config_that_a_resumed_run_does_not_take_is_told(configured, told):
    runner = runner_with(configured, resumed=True)
    OptimizerStepScheduleHook().before_train(runner)
    assert bool(runner.warnings) is told
    assert not told or "goes on from the 2 that this run began with" in runner.warnings[0]


@pytest.mark.parametrize(
    ("steps", "rate", "says"),
    [
        (1, 2.0, "1 optimiser step, whose learning rates add up to 2"),
        (9, 2.0, "9 optimiser steps"),
        (10, 2.0, None),
        (16, 1e-5, "16 optimiser steps, whose learning rates add up to 8e-05"),
        (40, 1e-5, None),
    ],
)
def test_a_run_that_is_too_small_says_so(steps, rate, says):
    runner = runner_with(2.0, steps=steps)
    runner.param_schedulers[0].base_values[:] = [rate]
    runner.cfg["optim_wrapper"]["optimizer"]["lr"] = rate
    OptimizerStepScheduleHook().before_train(runner)
    assert bool(runner.warnings) is (says is not None)
    assert says is None or says in runner.warnings[0]


def test_a_new_run_that_does_not_begin_with_the_configs_rate_is_refused():
    with pytest.raises(
        GMAIError, match=r"built with the learning rate 2, but the config's is 0\.5"
    ):
        OptimizerStepScheduleHook().before_train(runner_with(0.5))


def test_an_engine_that_does_not_step_with_the_schedules_rate_stops_the_run():
    hook = OptimizerStepScheduleHook()
    with pytest.raises(GMAIError, match=r"step 1 has the lr \[0.0\], but the schedule .* \[2.0\]"):
        hook.before_train(runner_with(2.0, engine=0.0))
    runner = runner_with(2.0)
    hook.before_train(runner)
    hook.after_step(runner)
    runner.model.optimizer.param_groups[0]["lr"] = 5e-5  # as DeepSpeed's own scheduler does
    with pytest.raises(GMAIError, match="something else sets it"):
        hook.after_step(runner)
