# SPDX-License-Identifier: Apache-2.0

"""The count of activations against counts made by hand and by another program."""

import inspect

import pytest
import torch
from accelerate import init_empty_weights
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.compat import multiply_in_fp32
from gmai_xtuner.model.liger import install_liger
from gmai_xtuner.preflight.activations import (
    GPU,
    Activations,
    LiveMemory,
    MicroBatch,
    count_activations,
)
from tests.preflight.bases import CLIP_VIT_L_14_336, INTERNLM2_5_7B

LLM = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
STAGES = {1: (True, True), 2: (True, False), 3: (False, False)}
GIB = 2**30


def count(
    stage: int,
    batch: MicroBatch,
    *,
    llm: dict | None = None,
    vision: dict | None = None,
    liger: bool = False,
    **options,
) -> Activations:
    freeze_llm, freeze_vision = STAGES[stage]
    with init_empty_weights():
        model = GMAILLaVAModel(
            LlamaForCausalLM(LlamaConfig(**{**LLM, **(llm or {})})),
            CLIPVisionModel(CLIPVisionConfig(**{**VISION, **(vision or {})})),
            freeze_llm=freeze_llm,
            freeze_visual_encoder=freeze_vision,
            **options,
        )
    if liger:
        install_liger(model.llm)
    return count_activations(model, batch)


def small(supervised: int = 64, images: int = 4, dtype=torch.bfloat16) -> MicroBatch:
    return MicroBatch(1, 2048, supervised, images, dtype)


def test_storages_count_from_their_making_to_their_end():
    with FakeTensorMode():
        before = torch.zeros(1000, device=GPU)
        with LiveMemory([before]) as memory:
            doubled = before * 2  # 4,000 bytes
            view = doubled[:10]
            tripled = doubled + before  # 8,000 at a time
            del doubled
            assert (memory.live, memory.peak) == (8000, 8000)  # a view keeps it
            host = tripled.cpu()
            assert memory.host == host.nbytes
            assert bool((tripled > 0).any()) is False  # it has no content
            del view, tripled, host
    assert (memory.live, memory.peak, memory.host) == (0, 9001, 0)


# Counted by another program on the true geometry, without recomputation, with grouped heads.
@pytest.mark.parametrize(
    ("stage", "tokens", "images", "gib"),
    [
        pytest.param(1, 15_877, 18, 47.0, marks=pytest.mark.slow),
        (2, 8_123, 8, 28.9),
        pytest.param(3, 8_123, 8, 41.6, marks=pytest.mark.slow),
    ],
)
def test_the_7b_with_liger_takes_what_another_program_counted(stage, tokens, images, gib):
    names = set(LLM)
    llm = {key: value for key, value in INTERNLM2_5_7B.items() if key in names}
    vision = {key: value for key, value in CLIP_VIT_L_14_336.items() if key in VISION}
    batch = MicroBatch(1, tokens, 2000, images, torch.bfloat16)
    options = {"liger": True, "use_activation_checkpointing": False}
    found = count(stage, batch, llm=llm, vision=vision, **options)
    assert found.total / GIB == pytest.approx(gib, rel=0.01)


def test_what_else_this_process_has_changed_does_not_count(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", inspect.unwrap(torch.nn.Linear.forward))
    frozen = count(1, small(), use_activation_checkpointing=False).kept
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)  # an engine does so
    monkeypatch.setenv("GMAI_ALLOW_CPU", "1")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    multiply_in_fp32()
    assert count(1, small(), use_activation_checkpointing=False).kept == frozen


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_layers_keep_their_input_alone(stage):
    kept = [count(stage, small(), recomputed_layers=layers).kept for layers in (4, 2, 0)]
    # Each layer that is recomputed keeps [2048, 256] in bf16 instead of all that it computes.
    assert kept[0] < kept[1] < kept[2]
    assert kept[1] - kept[0] == pytest.approx(kept[2] - kept[1], rel=0.01)


def test_the_loss_holds_logits_of_a_chunk():
    vocabulary = 16384
    whole, chunks = (
        count(1, small(1024), llm={"vocab_size": vocabulary}, loss_chunk_size=size)
        for size in (2048, 128)
    )
    # Its highest moment: logits in bf16 and fp32, or fp32 logits and their logarithm.
    assert whole.total - chunks.total > 0.5 * (1024 - 128) * vocabulary * 6
    assert whole.moment == "forward pass"


def test_fp32_takes_nearly_twice_as_much():
    half, single = (count(3, small(dtype=dtype)).total for dtype in (torch.bfloat16, torch.float32))
    assert 1.5 < single / half < 2


def test_a_micro_batch_without_images_runs_a_blank_one():
    side = VISION["image_size"]
    none, one = (count(2, small(images=images)).kept for images in (0, 1))
    assert none == pytest.approx(one, rel=0.01)
    assert count(2, small(images=9)).kept - one > 8 * 3 * side**2 * 4


def test_adapters_and_their_dropout_keep_more():
    lora = {"type": "peft.LoraConfig", "r": 16}
    totals = [
        count(1, small(), llm_lora=adapters).total
        for adapters in (None, lora, {**lora, "lora_dropout": 0.05})
    ]
    assert totals == sorted(totals)
    assert totals[2] > 1.2 * totals[1] > 1.2 * totals[0]
