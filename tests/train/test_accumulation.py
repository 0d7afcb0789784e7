# SPDX-License-Identifier: Apache-2.0

"""DeepSpeed adds up the gradients of a step, all of them, and in fp32, under the files we ship."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import gmai_xtuner
from gmai_xtuner.train.loop import rendezvous_alone

SIZE = 48


def error_of_a_step(name: str, micro_batches: int, *, offload: bool = False) -> float:
    """Relative error of the weights' change after two steps of SGD whose gradients are known."""
    rendezvous_alone()
    folder = Path(gmai_xtuner.__file__).parent / "train" / "deepspeed"
    config = json.loads((folder / f"{name}.json").read_text())
    config.update(gradient_accumulation_steps=micro_batches, train_micro_batch_size_per_gpu=1)
    config["gradient_clipping"] = 0.0
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    torch.manual_seed(0)
    model = nn.Linear(SIZE, SIZE, bias=False)
    start = model.weight.detach().bfloat16().float()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config
    )
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(SIZE, SIZE, generator=generator)
    exact = torch.zeros(SIZE, SIZE)
    for _ in range(2 * micro_batches):
        noise = torch.randn(SIZE, SIZE, generator=generator)
        gradient = (common + 0.5 * noise).bfloat16()
        exact += gradient.float() / micro_batches
        identity = torch.eye(SIZE, dtype=torch.bfloat16)
        engine.backward((engine(identity) * gradient.T).sum().float())
        engine.step()
    change = start - safe_get_full_fp32_param(engine.module.weight).view(SIZE, SIZE)
    return ((change - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        ("zero2", 256),
        ("zero2_offload", 4),
        ("zero2_offload", 256),
        ("zero3", 128),
        ("zero3_offload", 128),
    ],
)
def test_the_gradients_of_a_step_add_up(name, micro_batches):
    assert error_of_a_step(name, micro_batches) < 0.003


def test_a_step_of_zero1_with_offloading_does_not_hold_the_step_before():
    # Summed in bf16 here, so not as exact.
    assert error_of_a_step("zero1", 4, offload=True) < 0.02


@pytest.mark.parametrize(
    ("name", "exchange"),
    [
        ("zero1", "deepspeed.comm.all_reduce"),
        ("zero2", "deepspeed.comm.all_reduce"),
        ("zero3", "deepspeed.runtime.zero.stage3.reduce_scatter_coalesced"),
    ],
)
def test_gradients_are_exchanged_in_fp32(name, exchange, monkeypatch):
    module, _, function = exchange.rpartition(".")
    original = getattr(importlib.import_module(module), function)
    dtypes = set()

    def spy(tensors, *args, **options):
        every = tensors if isinstance(tensors, list) else [tensors]
        dtypes.update(one.dtype for one in every if one.numel() >= SIZE * SIZE)
        return original(tensors, *args, **options)

    monkeypatch.setattr(exchange, spy)
    error_of_a_step(name, 1)
    assert dtypes == {torch.float32}
