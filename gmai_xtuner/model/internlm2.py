# SPDX-License-Identifier: Apache-2.0

"""InternLM2 and InternLM2.5 checkpoints as transformers' own ``LlamaForCausalLM``.

InternLM2 computes what Llama computes; its checkpoints differ in names and in one layout. With
``K`` key-value heads, ``G`` query heads for each of them and ``H`` the width of a head,
``attention.wqkv`` holds rows ``[K, G + 2, H]``: per key-value head its ``G`` queries, its key and
its value. Nothing is permuted for the rotary embedding, so the conversion is exact and no remote
code is run.

Source of the layout: xtuner 0.2.0, ``xtuner/_lite/modelings/internlm2/modeling_internlm2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig

from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import shorten

#: Modules of the model, then of one layer: InternLM2 name -> Llama name.
MODEL_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
#: Buffers that early checkpoints carry and the model computes anew.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""What InternLM2 means where its ``config.json`` leaves a key out."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def raise_on_keys(missing: list[str], unexpected: list[str], where: str) -> None:
    if not missing and not unexpected:
        return
    parts = [
        f"{len(keys)} {kind} ({shorten(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    raise ModelLoadError(
        f"{where}: the weights don't fit config.json: {'; '.join(parts)}. "
        "Take config and weights from the same checkpoint."
    )


def check_fit(
    weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Compare names and shapes before anything is built.

    transformers 4.48 can't be asked: with ``low_cpu_mem_usage`` all parameters look tied to each
    other, and missing ones keep their random start without a word.
    """
    raise_on_keys(
        sorted(set(shapes) - set(weights)),
        sorted(key for key in set(weights) - set(shapes) if not key.endswith(IGNORED_SUFFIX)),
        where,
    )
    wrong = [
        f"{key} {tuple(weights[key].shape)} instead of {shape}"
        for key, shape in shapes.items()
        if tuple(weights[key].shape) != shape
    ]
    if wrong:
        raise ModelLoadError(
            f"{where}: other shapes than config.json says: {shorten(wrong)}. "
            "Take config and weights from the same checkpoint."
        )


def shapes_of(kind: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint that a config of a model class of transformers describes."""
    with init_empty_weights():
        state_dict = kind(config).state_dict()
    if getattr(config, "tie_word_embeddings", False):
        state_dict.pop("lm_head.weight", None)
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def as_dtype(torch_dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"`` or ``"torch.bfloat16"`` as a dtype; a dtype is returned as it is."""
    if isinstance(torch_dtype, torch.dtype):
        return torch_dtype
    dtype = getattr(torch, torch_dtype.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelLoadError(
            f"torch_dtype {torch_dtype!r} is unknown; write e.g. 'bfloat16', 'float16', 'float32'."
        )
    return dtype


def own_dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    own = raw.get("torch_dtype") or raw.get("dtype")
    return None if own is None else as_dtype(own)


def llama_config(internlm2_config: Mapping[str, Any]) -> LlamaConfig:
    """Translate InternLM2's ``config.json``.

    Keys that the file leaves out take InternLM2's defaults (``bias`` is true there), not Llama's.

    Raises:
        ModelLoadError: a size is missing, or the heads don't divide.
    """
    raw = internlm2_config
    if absent := [key for key in REQUIRED_KEYS if raw.get(key) is None]:
        raise ModelLoadError(f"InternLM2 config.json lacks {', '.join(absent)}.")
    heads = raw["num_attention_heads"]
    key_value_heads = raw.get("num_key_value_heads") or heads
    if raw["hidden_size"] % heads or heads % key_value_heads:
        raise ModelLoadError(
            f"InternLM2 config.json: hidden_size {raw['hidden_size']}, num_attention_heads {heads} "
            f"and num_key_value_heads {key_value_heads} don't divide."
        )
    scaling = raw.get("rope_scaling")
    if scaling is not None and scaling.get("type") not in ("linear", "dynamic"):
        raise ModelLoadError(
            f"InternLM2 config.json: rope_scaling {scaling!r} should be null or have the type "
            "'linear' or 'dynamic'."
        )
    return LlamaConfig(
        **{key: raw[key] for key in REQUIRED_KEYS},
        **{key: raw.get(key, default) for key, default in DEFAULTS.items()},
        num_key_value_heads=key_value_heads,
        attention_bias=raw.get("bias", True),
        rope_theta=float(raw.get("rope_theta", 10000)),
        rope_scaling=None if scaling is None else dict(scaling),
        torch_dtype=own_dtype(raw),
        architectures=["LlamaForCausalLM"],
    )


def internlm2_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an InternLM2 checkpoint, the reverse of what the conversion makes."""
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    head = width // config.num_attention_heads
    wqkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }
    biases = {"attention.wqkv.bias": (wqkv,), "attention.wo.bias": (width,)}
    # The order decides the random weights of the tiny bases.
    layer: dict[str, tuple[int, ...]] = {
        "attention.wqkv.weight": (wqkv, width),
        "attention.wo.weight": (width, width),
        **(biases if config.attention_bias else {}),
        "feed_forward.w1.weight": (inner, width),
        "feed_forward.w3.weight": (inner, width),
        "feed_forward.w2.weight": (width, inner),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: LlamaConfig
) -> dict[str, torch.Tensor]:
    """Rename InternLM2 weights to Llama's and split ``wqkv``; the argument is not changed.

    Raises:
        ModelLoadError: a weight is missing, unexpected or of the wrong shape, or an output matrix
            differs from the embedding it is said to be tied to.
    """
    weights = {key: value for key, value in state_dict.items() if not key.endswith(IGNORED_SUFFIX)}
    shapes = internlm2_shapes(config)
    if config.tie_word_embeddings:
        output, embedding = (
            weights.get(name) for name in ("output.weight", "model.tok_embeddings.weight")
        )
        if output is not None and embedding is not None and not torch.equal(output, embedding):
            raise ModelLoadError(
                "config.json ties the output matrix to the embedding, but output.weight differs from "
                "model.tok_embeddings.weight. Set tie_word_embeddings to false."
            )
        weights.pop("output.weight", None)
        del shapes["output.weight"]
    check_fit(weights, shapes, where="InternLM2 weights")
    converted: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        module, _, kind = key.rpartition(".")
        if module in MODEL_NAMES:
            converted[f"{MODEL_NAMES[module]}.{kind}"] = weight
            continue
        _, _, index, name = module.split(".", 3)
        layer = f"model.layers.{index}"
        if name == "attention.wqkv":
            for part, value in zip("qkv", _split_wqkv(weight, config), strict=True):
                converted[f"{layer}.self_attn.{part}_proj.{kind}"] = value
        else:
            converted[f"{layer}.{LAYER_NAMES[name]}.{kind}"] = weight
    return converted


def _split_wqkv(wqkv: torch.Tensor, config: LlamaConfig) -> list[torch.Tensor]:
    """Weight ``[K * (G + 2) * H, D]`` or bias ``[K * (G + 2) * H]`` to q, k and v."""
    key_value_heads = config.num_key_value_heads
    queries = config.num_attention_heads // key_value_heads
    head = config.hidden_size // config.num_attention_heads
    rest = wqkv.shape[1:]
    grouped = wqkv.reshape(key_value_heads, queries + 2, head, *rest)
    parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
    return [part.reshape(-1, *rest).contiguous() for part in parts]
