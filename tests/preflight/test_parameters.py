# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from gmai_xtuner.preflight.memory import count_parameters

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
