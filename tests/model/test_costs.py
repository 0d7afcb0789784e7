# SPDX-License-Identifier: Apache-2.0

"""Parameters and memory, by hand for InternLM2.5-7B and CLIP ViT-L/14-336, on the meta device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from xtuner.model.modules import ProjectorConfig, ProjectorModel

from gmai_xtuner.checkpoint.export_huggingface import llava_config
from gmai_xtuner.model.costs import cache_bytes, describe_parts, part_cost, size

TEXT = LlamaConfig(
    vocab_size=92544,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rope_scaling={"type": "dynamic", "factor": 2.0},
)
VISION = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


@pytest.fixture(scope="module")
def parts():
    with init_empty_weights(), torch.device("meta"):
        return {
            "llm": LlamaForCausalLM(TEXT).bfloat16(),
            "visual_encoder": CLIPVisionModel(VISION).bfloat16(),
            "projector": ProjectorModel(
                ProjectorConfig(visual_hidden_size=1024, llm_hidden_size=4096)
            ).bfloat16(),
        }


def test_the_7b_in_numbers(parts):
    assert describe_parts(parts).splitlines() == [
        "                    parameters  dtype          memory",
        "vision tower       303,507,456  bfloat16    578.9 MiB",
        "projector           20,979,712  bfloat16     40.0 MiB",
        "language model   7,737,708,544  bfloat16     14.4 GiB",
        "all              8,062,195,712               15.0 GiB",
    ]
    # 32 layers x (keys and values) x 8 heads x 128 x 2 bytes = 128 KiB a token
    assert cache_bytes(TEXT, tokens=2048, dtype=torch.bfloat16) == 2048 * 128 * 1024


def test_the_plain_form_of_the_7b():
    class Tokenizer(SimpleNamespace):
        def __len__(self):
            return 92545

        def convert_tokens_to_ids(self, token):
            return {"<image>": 92544}[token]

    tokenizer = Tokenizer(pad_token_id=2, bos_token_id=1, eos_token_id=2)
    config = llava_config(TEXT, VISION, tokenizer, torch.bfloat16)
    assert config.image_token_index == 92544
    assert config.image_seq_length == 576
    assert config.text_config.vocab_size == 92608
    assert config.text_config.rope_scaling is None
    assert TEXT.rope_scaling["factor"] == 2.0, "the argument is not changed"
    with init_empty_weights():
        llava = LlavaForConditionalGeneration(config)
    # 64 more rows of 4,096 in embedding and head
    assert part_cost(llava).parameters == 8_062_195_712 + 2 * 64 * 4096


def test_tied_weights_count_once_and_mixed_dtypes_are_named():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(4, 1).half())
    cost = part_cost(model)
    assert (cost.parameters, cost.dtypes, cost.bytes) == (21, ("float16", "float32"), 74)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**40, "3072.0 GiB"),
    ],
)
def test_sizes_for_people(number, text):
    assert size(number) == text
