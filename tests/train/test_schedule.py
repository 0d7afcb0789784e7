"""The learning rate against values by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

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


@pytest.mark.parametrize(("configured", "told"), [(2.0, False), (0.5, True)])
def test_a_rate_of_the_config_that_a_resumed_run_does_not_take_is_told(configured, told):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    warnings: list[str] = []
    runner = SimpleNamespace(
        param_schedulers=[WarmupCosineLR(optimizer, by_epoch=False, begin=0, end=4)],
        train_loop=SimpleNamespace(total_steps=4),
        cfg={"optim_wrapper": {"optimizer": {"lr": configured}}},
        logger=SimpleNamespace(warning=warnings.append),
    )
    OptimizerStepScheduleHook().before_train(runner)
    assert bool(warnings) is told
    assert not told or "goes on from the 2 that this run began with" in warnings[0]
