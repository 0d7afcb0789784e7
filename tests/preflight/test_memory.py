"""Against figures worked out by hand, and against what they must do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gmai_xtuner
from gmai_xtuner.preflight.activations import Activations
from gmai_xtuner.preflight.memory import ALLOWANCE, estimate_memory, moment_bytes
from gmai_xtuner.preflight.parameters import PartCount
from gmai_xtuner.preflight.run_config import ZeroSettings, load_zero

W, T = 8_000_000_000, 4_000_000_000
COUNTS = {"llm": PartCount(W, T, 0, 2 * W, 100_000_000)}
NOTHING = Activations(0, 0, 0, "loss")


def estimate(name: str, *, gpus: int = 8, accumulation: int = 1, counts=COUNTS, **options):
    facts = {"moment_bytes": 8, "activations": NOTHING, **options}
    return estimate_memory(counts, load_zero(name), gpus=gpus, accumulation=accumulation, **facts)


def zero_0() -> ZeroSettings:
    return ZeroSettings.from_dict("zero0", {"bf16": {"enabled": True}})


@pytest.mark.parametrize(
    ("name", "weights", "gradients", "optimizer", "host"),
    [
        ("zero1", 2 * W, 2 * T + 2 * T // 8, 12 * T // 8, 0),
        ("zero2", 2 * W, 2 * T // 8, 12 * T // 8, 0),
        ("zero3", 2 * W // 8, 2 * T // 8, 12 * T // 8, 0),
        ("zero2_offload", 2 * W, 0, 0, 16 * T // 8),
        ("zero3_offload", 0, 0, 0, 16 * T // 8 + 2 * W // 8),
    ],
)
def test_states_under_each_shipped_file(name, weights, gradients, optimizer, host):
    memory = estimate(name)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.host) == (
        weights,
        gradients,
        optimizer,
        host,
    )


def test_without_zero_nothing_is_shared():
    memory = estimate_memory(
        COUNTS, zero_0(), gpus=8, accumulation=1, moment_bytes=8, activations=NOTHING
    )
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * W, 6 * T, 12 * T)
    assert memory.buffers == 0


def test_several_micro_batches_a_step_keep_two_shares_of_gradients():
    assert estimate("zero2", accumulation=4).gradients == 2 * (2 * T // 8)


def test_buffers_are_two_buckets_and_the_largest_gradient():
    assert estimate("zero2").buffers == 2 * (2 * 200_000_000 + 100_000_000)
    # stage 3: one bucket, and the weights that are gathered at a time
    assert estimate("zero3").buffers == 2 * (500_000_000 + 100_000_000 + 1_050_000_000)


def test_frozen_weights_cost_only_themselves():
    frozen = {"llm": PartCount(W, 0, 0, 2 * W, 0)}
    memory = estimate("zero2", counts=frozen)
    assert memory.total == 2 * W + ALLOWANCE


def test_the_larger_moment_counts():
    small = estimate("zero2", activations=Activations(10**9, 0, 0, "loss"))
    large = estimate("zero2", activations=Activations(10**9, 10**9, 50 * 10**9, "decoder layer"))
    lasting = 2 * W + 2 * T // 8 + 12 * T // 8 + ALLOWANCE
    assert (small.total, small.moment) == (lasting + 8 * T // 8, "optimiser step")
    assert (large.total, large.moment) == (lasting + 52 * 10**9 + large.buffers, "decoder layer")


@pytest.mark.parametrize("name", gmai_xtuner.compat.DEEPSPEED_NAMES)
def test_more_gpus_never_need_more(name):
    totals = [estimate(name, gpus=gpus).total for gpus in (1, 2, 8, 64)]
    assert totals == sorted(totals, reverse=True)


def test_4_bit_weights_take_a_quarter_and_their_scales():
    quantised = {"llm": PartCount(W, 0, W, 2 * W, 0)}
    assert estimate("zero2", counts=quantised).weights == pytest.approx(0.5625 * W)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AdamW", 8), ("torch.optim.AdamW", 8), ("bitsandbytes.optim.AdamW8bit", 2), ("SGD", 4)],
)
def test_moments_of_optimisers(name, expected):
    assert moment_bytes(name) == expected


def test_defaults_of_the_deepspeed_file_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name in gmai_xtuner.compat.DEEPSPEED_NAMES:
        path = Path(gmai_xtuner.__file__).parent / "engine" / "deepspeed" / f"{name}.json"
        theirs = DeepSpeedZeroConfig(**json.loads(path.read_text())["zero_optimization"])
        ours = load_zero(name)
        assert ours.reduce_bucket_size == theirs.reduce_bucket_size
        assert ours.overlap_comm == theirs.overlap_comm
        assert ours.contiguous_gradients == theirs.contiguous_gradients
        assert ours.max_live_parameters == theirs.max_live_parameters
        assert ours.prefetch_bucket_size == theirs.prefetch_bucket_size
        assert ours.sub_group_size == theirs.sub_group_size
