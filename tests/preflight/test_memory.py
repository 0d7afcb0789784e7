# SPDX-License-Identifier: Apache-2.0

"""Memory of a step that DeepSpeed's engine runs on fake tensors, against counts of others and by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.preflight.activations import MicroBatch
from gmai_xtuner.preflight.memory import (
    ALLOWANCE,
    GIB,
    CannotCount,
    Memory,
    Step,
    count_memory,
    count_parameters,
    moment_bytes,
)
from gmai_xtuner.preflight.run_config import ZeroSettings
from gmai_xtuner.train.settings import read
from tests.preflight.bases import CLIP_VIT_L_14_336, INTERNLM2_5_7B
from tests.preflight.test_activations import LLM, STAGES
from tests.preflight.test_activations import VISION as TOWER


def a_step(name: str, *, stage: int = 3, gpus: int = 8, true: bool = False, **options) -> Step:
    llm, tower = (INTERNLM2_5_7B, CLIP_VIT_L_14_336) if true else (LLM, TOWER)
    freeze_llm, freeze_vision = STAGES[stage]
    model = {
        "type": GMAILLaVAModel,
        "llm": {"type": LlamaForCausalLM, "config": LlamaConfig(**{key: llm[key] for key in LLM})},
        "visual_encoder": {
            "type": CLIPVisionModel,
            "config": CLIPVisionConfig(**{key: tower[key] for key in TOWER}),
        },
        "freeze_llm": freeze_llm,
        "freeze_visual_encoder": freeze_vision,
        **options,
    }
    settled = read(name, {"train_dataloader": {}, "optim_wrapper": {}}).settings
    tokens, images = ((15_877, 18) if stage == 1 else (8_123, 8)) if true else (512, 2)
    batch = MicroBatch(1, tokens, tokens // 4, images, torch.bfloat16)
    return Step(model, ZeroSettings.from_dict(name, settled), batch, gpus, 4, "AdamW")


# Counted by another program, which ran the engine on fake tensors as well, with AdamW one tensor at a time.
@pytest.mark.parametrize(
    ("stage", "name", "gpus", "gib"),
    [
        pytest.param(1, "zero2", 8, 23.58, marks=pytest.mark.slow),
        pytest.param(2, "zero2", 1, 24.78, marks=pytest.mark.slow),
        (3, "zero2", 8, 37.54),
    ],
)
def test_the_7b_takes_what_another_program_counted(stage, name, gpus, gib):
    found = count_memory(a_step(name, stage=stage, gpus=gpus, true=True))
    assert (found.total - ALLOWANCE) / GIB == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(
    ("name", "weights", "states", "on_host"),
    [
        ("zero2", 2, 12 / 8, 0),
        ("zero3", 2 / 8, 12 / 8, 0),
        # fp32 weights, moments, the sum of the micro-batches and the gradient that is stepped with
        ("zero2_offload", 2, 0, 20 / 8),
        ("zero3_offload", 0, 0, 22 / 8),
    ],
)
def test_each_shipped_file_shares_and_offloads_its_part(name, weights, states, on_host):
    """Bytes for each of the weights, all of which learn, on one of eight GPUs."""
    step = a_step(name)
    found = count_memory(step)
    with torch.device("meta"):
        numbers = BUILDER.build(step.model).parameters()
        number = sum(one.numel() for one in numbers)
    # Weights below stage3_param_persistence_threshold are whole on every GPU, a fifth of this tiny model.
    assert found.weights / number == pytest.approx(weights, rel=0.02, abs=0.02)
    assert found.optimizer / number == pytest.approx(states, rel=0.02)
    assert found.host / number == pytest.approx(on_host, rel=0.25, abs=0.01)


def test_gradients_that_are_summed_wait_beside_those_of_a_micro_batch():
    several, one = (count_memory(replace(a_step("zero2"), accumulation=n)) for n in (4, 1))
    assert (several.weights, several.optimizer) == (one.weights, one.optimizer)
    share = several.optimizer / 12
    # fp32 gradients and one temporary, as AdamW steps on a GPU
    assert several.peaks["optimizer step"] == pytest.approx(8 * share, rel=0.05)
    # The fp32 sum so far; of a single micro-batch there is none.
    assert several.peaks["forward pass"] - one.peaks["forward pass"] == pytest.approx(
        4 * share, rel=0.05
    )


def test_recomputed_layers_liger_and_quantised_weights_are_known():
    plain = count_memory(a_step("zero2", stage=1))
    kept = count_memory(a_step("zero2", stage=1, recomputed_layers=0))
    step = a_step("zero2", stage=1, recomputed_layers=0, liger=True)
    liger = count_memory(replace(step, in_4_bit=1_000_000))
    assert plain.kept < liger.kept < 0.8 * kept.kept
    assert plain.weights - liger.weights == 1_437_500


def test_what_can_not_be_counted_says_why():
    with pytest.raises(CannotCount, match=r"no_such_option"):
        count_memory(a_step("zero2", no_such_option=1))


def test_the_highest_moment_counts():
    found = Memory(5, 3, 0, {"forward pass": 1, "backward pass": 2, "optimizer step": 4}, 0)
    assert (found.total, found.moment) == (12 + ALLOWANCE, "optimizer step")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AdamW", 8), ("torch.optim.AdamW", 8), ("bitsandbytes.optim.AdamW8bit", 2), ("SGD", 4)],
)
def test_moments_of_optimisers(name, expected):
    assert moment_bytes(name) == expected


def test_an_optimiser_that_needs_a_gpu_keeps_its_moments():
    step = replace(a_step("zero2", gpus=1), optimizer="bitsandbytes.optim.AdamW8bit")
    found = count_memory(step)
    assert found.optimizer / found.weights == pytest.approx((4 + 2) / 2, rel=0.01)


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


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero3_is_neither_taken_nor_offered_for_a_4_bit_base(preflight, corpus, name):
    found = preflight(
        corpus.mixture,
        deepspeed=name,
        need_weights=False,
        gpu_memory=1e-6,
        options={"model.llm.quantization_config": {"type": "x", "load_in_4bit": True}},
    )
    said = " ".join(map(str, (*found.findings.of("fail"), *found.findings.of("warn"))))
    assert ("ZeRO-3 can't partition 4-bit weights" in said) == (name == "zero3")
    assert "--deepspeed zero3" not in said


def test_a_tied_weight_is_counted_once():
    from torch import nn

    model = nn.Module()
    model.first, model.second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    model.second.weight = model.first.weight
    assert {name: part.total for name, part in count_parameters(model).items()} == {"first": 12}
