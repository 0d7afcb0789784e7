# SPDX-License-Identifier: Apache-2.0

"""Against figures worked out by hand, and against what they must do."""

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from gmai_xtuner.compat import deepspeed as deepspeed_compat
from gmai_xtuner.preflight.activations import Activations
from gmai_xtuner.preflight.memory import (
    ALLOWANCE,
    PartCount,
    count_parameters,
    estimate_memory,
    moment_bytes,
)
from gmai_xtuner.preflight.run_config import ZeroSettings
from gmai_xtuner.train.names import DEEPSPEED_NAMES
from gmai_xtuner.train.settings import read

W, T = 8_000_000_000, 4_000_000_000
COUNTS = {"llm": PartCount(W, T, 0, 2 * W, 100_000_000)}
NOTHING = Activations(0, 0, "forward pass")


def estimate(name: str, *, gpus: int = 8, accumulation: int = 1, counts=COUNTS, **options):
    facts = {"moment_bytes": 8, "activations": NOTHING, **options}
    return estimate_memory(counts, load_zero(name), gpus=gpus, accumulation=accumulation, **facts)


def load_zero(name: str) -> ZeroSettings:
    config = {"train_dataloader": {}, "optim_wrapper": {}}
    return ZeroSettings.from_dict(name, read(name, config).settings)


def zero_0() -> ZeroSettings:
    return ZeroSettings.from_dict("zero0", {"bf16": {"enabled": True}})


def summed_in(dtype: str | None, stage: int) -> ZeroSettings:
    content = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    if dtype:
        content["data_types"] = {"grad_accum_dtype": dtype}
    return ZeroSettings.from_dict("own", content)


def gradients(zero: ZeroSettings, *, accumulation: int) -> tuple[int, int, int]:
    memory = estimate_memory(
        COUNTS, zero, gpus=8, accumulation=accumulation, moment_bytes=8, activations=NOTHING
    )
    return memory.gradients, memory.summing, memory.step


@pytest.mark.parametrize(
    ("name", "weights", "gradients", "optimizer", "host"),
    [
        ("zero1", 2 * W, 2 * T + 2 * T // 8, 12 * T // 8, 0),
        ("zero2", 2 * W, 2 * T // 8, 12 * T // 8, 0),
        ("zero3", 2 * W // 8, 4 * T // 8, 12 * T // 8, 0),
        ("zero2_offload", 2 * W, 0, 0, 16 * T // 8),
        ("zero3_offload", 0, 0, 0, 20 * T // 8 + 2 * W // 8),
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


@pytest.mark.parametrize(
    ("dtype", "stage", "accumulation", "bytes_of_a_share"),
    [
        # gradients at the end of the backward pass; added while they are summed; added at the step
        (None, 2, 1, (2, 0, 8)),
        (None, 2, 4, (2 + 2, 0, 8)),
        ("bf16", 2, 4, (2 + 2, 0, 8)),
        ("fp32", 2, 1, (2, 4, 8 - 2)),
        ("fp32", 2, 4, (2 + 4, 4, 8 - 6)),
        (None, 3, 4, (2, 0, 8)),
        ("fp32", 3, 1, (4, 0, 8)),
        ("fp32", 3, 4, (4, 0, 8)),
        # of all weights, not of a share
        ("fp32", 1, 4, (8 * (2 + 4), 0, 8)),
    ],
)
def test_gradients_take_the_bytes_in_which_they_are_summed(
    dtype, stage, accumulation, bytes_of_a_share
):
    share = T // 8
    expected = tuple(number * share for number in bytes_of_a_share)
    assert gradients(summed_in(dtype, stage), accumulation=accumulation) == expected


def test_shipped_files_sum_in_fp32():
    bytes_each = {name: load_zero(name).grad_accum_bytes for name in DEEPSPEED_NAMES}
    assert bytes_each.pop("zero1") == 2
    assert set(bytes_each.values()) == {4}


def test_offloaded_sums_are_on_the_host():
    states_and_gradient = 16 * T // 8
    assert estimate("zero2_offload", accumulation=4).host == states_and_gradient + 4 * T // 8
    assert estimate("zero3_offload", accumulation=4).host == (
        states_and_gradient + 4 * T // 8 + 2 * W // 8
    )


def test_bytes_of_a_sum_are_those_of_the_workaround():
    """What stands in memory at the end of each backward pass, of a real ZeRO-2 partition."""
    numel, seen = 1000, []
    weight = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
    zero = object.__new__(DeepSpeedZeroOptimizer)
    zero.gradient_accumulation_dtype, zero.use_grad_accum_attribute = torch.float32, False
    deepspeed_compat.accumulate_all_gradients_in_fp32()
    total = None
    for _ in range(2):
        weight.grad = torch.ones(numel, dtype=torch.bfloat16)
        (part,) = zero.get_flat_partition(
            [weight], 0, numel, dtype=torch.float32, device="cpu", return_tensor_list=True
        )
        alive = {tensor.data_ptr(): tensor.nbytes for tensor in (weight.grad, part)}
        if total is not None:
            alive[total.data_ptr()] = total.nbytes
        seen.append(sum(alive.values()) // numel)
        total = part if total is None else total.add_(part)
    counted = [sum(gradients(summed_in("fp32", 2), accumulation=n)[:2]) // (T // 8) for n in (1, 2)]
    assert seen == counted == [6, 10]


def test_buffers_are_two_buckets_and_the_largest_gradient():
    exchanged = 4 * 200_000_000  # one bucket, in fp32 while it is exchanged
    assert estimate("zero2").buffers == 2 * (2 * 200_000_000 + 100_000_000) + exchanged
    # stage 3: one bucket, and the weights that are gathered at a time
    assert estimate("zero3").buffers == 2 * (200_000_000 + 100_000_000 + 1_050_000_000) + exchanged


def test_frozen_weights_cost_only_themselves():
    frozen = {"llm": PartCount(W, 0, 0, 2 * W, 0)}
    memory = estimate("zero2", counts=frozen)
    assert memory.total == 2 * W + ALLOWANCE


def test_the_larger_moment_counts():
    lasting = 2 * W // 8 + 4 * T // 8 + 12 * T // 8 + ALLOWANCE
    small = estimate("zero3", activations=Activations(10**8, 0, "forward pass"))
    large = estimate("zero3", activations=Activations(2 * 10**9, 50 * 10**9, "backward pass"))
    assert small.buffers < 8 * T // 8
    assert (small.total, small.moment) == (lasting + 8 * T // 8, "optimiser step")
    assert (large.total, large.moment) == (lasting + 52 * 10**9 + large.buffers, "backward pass")


def test_gradients_may_need_most_while_they_are_summed():
    lasting = 2 * W + 6 * T // 8 + 12 * T // 8 + ALLOWANCE
    for activations, moment, extra in (
        (10**9, "gradient sum", 4 * T // 8),
        (3 * 10**9, "forward pass", 3 * 10**9),
    ):
        memory = estimate(
            "zero2", accumulation=4, activations=Activations(activations, 0, "forward pass")
        )
        assert (memory.total, memory.moment) == (lasting + memory.buffers + extra, moment)


def test_4_bit_weights_take_a_quarter_and_their_scales():
    quantised = {"llm": PartCount(W, 0, W, 2 * W, 0)}
    assert estimate("zero2", counts=quantised).weights == pytest.approx(0.5625 * W)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AdamW", 8), ("torch.optim.AdamW", 8), ("bitsandbytes.optim.AdamW8bit", 2), ("SGD", 4)],
)
def test_moments_of_optimisers(name, expected):
    assert moment_bytes(name) == expected


LANGUAGE, VISION, PROJECTOR = 7_737_708_544, 303_507_456, 20_979_712


@pytest.mark.parametrize(
    ("stage", "trainable"),
    [
        ("stage1_shallow", (0, 0, PROJECTOR)),
        ("stage2_deep", (0, VISION, PROJECTOR)),
        ("stage3_instruct", (LANGUAGE, VISION, PROJECTOR)),
    ],
)
def test_true_geometry_from_config_files_alone(preflight, corpus, true_bases, stage, trainable):
    assert not list(true_bases.rglob("*.safetensors"))
    found = preflight(corpus.mixture, stage, bases=true_bases, need_weights=False)
    assert {name: part.total for name, part in found.counts.items()} == {
        "llm": LANGUAGE,
        "visual_encoder": VISION,
        "projector": PROJECTOR,
    }
    assert tuple(part.trainable for part in found.counts.values()) == trainable


def test_adapters_count_as_what_they_are(preflight, corpus, true_bases):
    lora = {"type": "peft.LoraConfig", "r": 8}
    found = preflight(
        corpus.mixture,
        "stage3_instruct",
        bases=true_bases,
        need_weights=False,
        options={"model.llm_lora": lora, "model.freeze_visual_encoder": True},
    )
    widths = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    widths |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    adapters = 32 * 8 * sum(sum(pair) for pair in widths.values())
    assert found.counts["llm"].total == LANGUAGE + adapters
    assert found.counts["llm"].trainable == adapters
    assert found.counts["visual_encoder"].trainable == 0


def test_a_4_bit_base_keeps_embedding_norms_and_head(preflight, corpus, true_bases):
    found = preflight(
        corpus.mixture,
        bases=true_bases,
        need_weights=False,
        options={"model.llm.quantization_config": {"type": "x", "load_in_4bit": True}},
    )
    llm = found.counts["llm"]
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert llm.in_4_bit == 32 * layer
    assert llm.total - llm.in_4_bit == 2 * 92544 * 4096 + 65 * 4096


def test_a_tied_weight_is_counted_once():
    from torch import nn

    model = nn.Module()
    model.first, model.second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    model.second.weight = model.first.weight
    assert {name: part.total for name, part in count_parameters(model).items()} == {"first": 12}
