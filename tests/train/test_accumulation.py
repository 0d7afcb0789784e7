# SPDX-License-Identifier: Apache-2.0

"""DeepSpeed adds up the gradients of a step, all of them, and in fp32, under the files we ship."""

import importlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import gmai_xtuner
from gmai_xtuner.checkpoint.training import first_rank_file
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train.elastic import SavedOptimizer
from gmai_xtuner.train.loop import rendezvous_alone
from gmai_xtuner.train.resume import (
    check_layout,
    preserved_random_state,
    random_state,
    set_random_state,
)

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
        ("zero3", 32),
        ("zero3_offload", 32),
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


# --- Random generators come back to where they were ---


def draw() -> tuple:
    dropped = torch.nn.functional.dropout(torch.ones(64), 0.5)
    return random.random(), np.random.rand(), np.random.randn(), tuple(dropped.tolist())


@pytest.fixture(autouse=True)
def _seeded():
    with preserved_random_state():
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        np.random.randn()  # leaves a second normal number in numpy's store
        yield


def test_every_generator_draws_the_same_again_after_a_round_through_a_file(tmp_path):
    torch.save(random_state(), tmp_path / "state.pt")
    first = draw()
    assert draw() != first
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


def test_what_validation_draws_is_not_noticed():
    state = random_state()
    first = draw()
    set_random_state(state)
    with preserved_random_state():
        draw()
    assert draw() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_again():
    state = random_state()
    first = torch.rand(8, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(8, device="cuda"), first)


def test_a_state_with_cuda_is_taken_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_random_state({**random_state(), "cuda": torch.zeros(16, dtype=torch.uint8)})


def state_of(folder, world_size: int, stage: int, bf16: bool) -> None:
    settings = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    state = {"dp_world_size": world_size, "ds_config": settings}
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ((1, 2, True), ""),
        ((4, 2, True), "GPUs: 4 -> 1"),
        ((4, 3, True), "GPUs: 4 -> 1, ZeRO stage: 3 -> 2"),
    ],
)
def test_another_layout_is_named_and_another_precision_refused(tmp_path, written, told):
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    runner = SimpleNamespace(strategy=SimpleNamespace(config=config))
    state_of(tmp_path / "iter_2.pth", *written)
    assert check_layout(tmp_path / "iter_2.pth", runner) == told
    config["bf16"]["enabled"] = False
    with pytest.raises(
        GMAIError, match=r"can't go on from .*iter_2.pth: bf16: True -> False\. Resume"
    ):
        check_layout(tmp_path / "iter_2.pth", runner)


WEIGHTS = torch.arange(1.0, 10)
"""Of a parameter ``a`` of five elements and ``b`` of four."""


@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_are_read_wherever_two_ranks_have_their_parts(tmp_path, stage):
    if stage == 2:  # end to end, the last rank's part padded in the moments
        parts, names = (
            [WEIGHTS[:6], WEIGHTS[6:]],
            ("single_partition_of_fp32_groups", "base_optimizer_state"),
        )
        padded = [parts[0], torch.cat([parts[1], torch.zeros(3)])]
    else:  # half of each: 1 2 3 | 4 5 -, then 6 7 | 8 9
        parts = padded = [torch.tensor([1.0, 2, 3, 6, 7]), torch.tensor([4.0, 5, 0, 8, 9])]
        names = ("fp32_flat_groups", "optimizer_state_dict")
    for rank, (part, moment) in enumerate(zip(parts, padded, strict=True)):
        state = {0: {"step": torch.tensor(7.0), "exp_avg": -moment}}
        shard = {names[0]: [part], names[1]: {"state": state, "param_groups": [{"lr": 0.5}]}}
        file = tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": shard}, file)
    zero = {"zero_optimization": {"stage": stage}}
    shared = {"ds_config": zero, "ds_version": "0", "dp_world_size": 2}
    shapes = [{"a": torch.Size([5]), "b": torch.Size([2, 2])}]
    torch.save({**shared, "param_shapes": shapes}, tmp_path / "mp_rank_00_model_states.pt")
    saved = SavedOptimizer(tmp_path)
    assert saved.alike == {"step": 7.0}
    assert saved.keys == ["fp32", "exp_avg"]
    pieces = [("a", 1, 5), (None, 0, 2), ("b", 0, 3)]
    assert saved.read("fp32", pieces).tolist() == [2, 3, 4, 5, 0, 0, 6, 7, 8]
    assert saved.read("exp_avg", [("b", 1, 4)]).tolist() == [-7, -8, -9]
    with pytest.raises(GMAIError, match="has not trained c, which this config trains"):
        saved.read("fp32", [("c", 0, 1)])
    zero["zero_optimization"]["round_robin_gradients"] = True
    torch.save({**shared, "param_shapes": shapes}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(GMAIError, match="round_robin_gradients"):
        SavedOptimizer(tmp_path)


def test_what_all_ranks_share_is_read_from_the_first(tmp_path):
    assert first_rank_file(tmp_path) is None
    for rank in (11, 2, 0, 1):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    assert first_rank_file(tmp_path).name == "zero_pp_rank_0_mp_rank_00_model_states.pt"
    assert first_rank_file(tmp_path / "epoch_1.pth") is None
