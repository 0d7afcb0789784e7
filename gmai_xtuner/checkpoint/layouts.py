"""Folders that hold a whole LLaVA: which layout it is, and the weights of each part under plain names.

=============  ======================================================  ============================
layout         told by ``config.json``                                 names of weights
=============  ======================================================  ============================
``plain``      ``text_config``: transformers' LLaVA, our own export,   ``language_model.model.``,
               the authors' release (``enhanced_llava`` with an        ``vision_tower.``,
               InternLM2 ``text_config``; no remote code is run)       ``multi_modal_projector.``
               or, from transformers 4.52 on                           ``model.language_model.``, ...
``original``   ``mm_hidden_size``: the LLaVA repository's, xtuner's    ``model.layers.``,
               ``--save-format official``                              ``model.vision_tower.vision_tower.``,
                                                                       ``model.mm_projector.``
=============  ======================================================  ============================

Plain names are those of ``LlamaForCausalLM`` (or of InternLM2), ``CLIPVisionModel`` and xtuner's
``ProjectorModel``. Tensors stay memory-mapped: a part that is not asked for is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gmai_xtuner.checkpoint.weight_files import read_json, read_state_dict, shorten
from gmai_xtuner.core.errors import ModelLoadError

PARTS = ("llm", "visual_encoder", "projector")
_PLAIN = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", "visual_encoder", "vision_model."),
    (r"(model\.)?multi_modal_projector\.linear_1\.", "projector", "model.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", "projector", "model.2."),
    (r"language_model\.(?=model\.|lm_head\.|output\.)", "llm", ""),
    (r"model\.language_model\.(?=embed_tokens|tok_embeddings|layers|norm)", "llm", "model."),
    (r"(?=lm_head\.)", "llm", ""),
)
_ORIGINAL = (
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "visual_encoder", "vision_model."),
    (r"model\.mm_projector\.(?=\d+\.)", "projector", "model."),
    (r"(?=model\.(embed_tokens|layers|norm)\.|lm_head\.)", "llm", ""),
)
#: Buffers of early checkpoints, computed anew.
_IGNORED = ("rotary_emb.inv_freq", "embeddings.position_ids")
#: What ``InternLM2Config`` means where a nested ``text_config`` leaves a size out, as transformers does with
#: values that equal a default.
INTERNLM2_DEFAULTS = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@dataclass(frozen=True, slots=True)
class Projector:
    """How an image feature becomes an embedding: ``depth`` linear layers with an activation between."""

    depth: int
    hidden_act: str
    bias: bool


def layout_of(config: Mapping[str, Any]) -> str | None:
    """``plain`` or ``original`` by the content of a ``config.json``; None for what is no LLaVA."""
    if isinstance(config.get("text_config"), dict) and isinstance(
        config.get("vision_config"), dict
    ):
        return "plain" if "llava" in str(config.get("model_type")) else None
    if "mm_hidden_size" in config and "mm_projector_type" in config:
        return "original"
    return None


def is_llava(folder: str | Path) -> bool:
    """Whether a folder holds a whole LLaVA in one of the layouts."""
    file = Path(folder) / "config.json"
    return file.is_file() and layout_of(read_json(file)) is not None


def split_weights(
    weights: Mapping[str, torch.Tensor], layout: str, *, source: str
) -> dict[str, dict[str, torch.Tensor]]:
    """Weights by part, under plain names; a part may be empty.

    Raises:
        ModelLoadError: a weight that belongs to no part.
    """
    rules = _PLAIN if layout == "plain" else _ORIGINAL
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    strange = []
    for key, value in weights.items():
        for pattern, part, replacement in rules:
            if found := re.match(pattern, key):
                name = replacement + key[found.end() :]
                if not name.endswith(_IGNORED):
                    parts[part][name] = value
                break
        else:
            strange.append(key)
    if strange:
        raise ModelLoadError(
            f"{source} has {len(strange)} weights that a LLaVA of this layout does not have: "
            f"{shorten(sorted(strange), limit=4)}. Take config and weights from the same checkpoint"
        )
    return parts


def text_model(
    directory: Path, *, weights: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and weights of the language model of a folder, be it that alone or a LLaVA.

    Args:
        directory: the folder.
        weights: read them; otherwise they are empty.

    Raises:
        ModelLoadError: a file is missing or damaged.
    """
    raw = read_json(directory / "config.json")
    layout = layout_of(raw)
    if layout is None:
        return with_rope(raw), read_state_dict(directory) if weights else {}
    if layout == "plain":
        text = dict(raw["text_config"])
        text.setdefault("model_type", "llama")
        if text["model_type"] == "internlm2":
            text = {**INTERNLM2_DEFAULTS, **text}
        if text.get("torch_dtype") is None and text.get("dtype") is None:
            text["torch_dtype"] = raw.get("torch_dtype") or raw.get("dtype")
    else:
        text = {**raw, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    part = _part(directory, layout, "llm") if weights else {}
    return with_rope(text), part


def vision_model(
    directory: Path, *, weights: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and weights of the vision tower of a LLaVA.

    Raises:
        ModelLoadError: a file is missing or damaged, or the folder has no tower of its own.
    """
    raw = read_json(directory / "config.json")
    layout = layout_of(raw)
    if layout != "plain":
        raise ModelLoadError(
            f"{directory} has no configuration of its vision tower; it was trained with "
            f"{raw.get('mm_vision_tower')!r}. Name that one (GMAI_VISION, or vision=...)"
        )
    config = dict(raw["vision_config"])
    config.setdefault("model_type", "clip_vision_model")
    return config, _part(directory, layout, "visual_encoder") if weights else {}


def tower_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Weights of the vision tower that a LLaVA brings along; empty where it uses its base's."""
    layout = layout_of(read_json(directory / "config.json"))
    return _part(directory, layout, "visual_encoder") if layout else {}


def projector_model(directory: Path) -> tuple[Projector, dict[str, torch.Tensor]]:
    """Form and weights of a LLaVA's projector.

    Raises:
        ModelLoadError: a file is missing or damaged, or it is no chain of linear layers.
    """
    raw = read_json(directory / "config.json")
    layout = layout_of(raw)
    if layout == "plain":
        form = Projector(
            depth=2,
            hidden_act=raw.get("projector_hidden_act", "gelu"),
            bias=raw.get("multimodal_projector_bias", True),
        )
    else:
        kind = str(raw.get("mm_projector_type"))
        match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
        if kind != "linear" and match is None:
            raise ModelLoadError(
                f"{directory}: mm_projector_type {kind!r} is not supported; supported are 'linear' and "
                "'mlp<N>x_gelu'"
            )
        form = Projector(depth=int(match[1]) if match else 1, hidden_act="gelu", bias=True)
    weights = _part(directory, str(layout), "projector")
    if not weights:
        raise ModelLoadError(f"{directory} has no weights of the projector. Finish the copy")
    return form, weights


def select_layer(config: Mapping[str, Any], *, source: str) -> int:
    """The tower's hidden state that the projector reads.

    Raises:
        ModelLoadError: several layers, or the class token as well.
    """
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    strategy = config.get("vision_feature_select_strategy", "default")
    features = config.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or strategy != "default" or features != "patch":
        raise ModelLoadError(
            f"{source}: only one layer's patch tokens are supported (vision_feature_layer a number, "
            f"vision_feature_select_strategy 'default'), got {layer!r} and {strategy!r}"
        )
    return layer


def with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5 as ``rope_theta`` and ``rope_scaling``, which 4.48 reads.

    Left as it is, 4.48 would take the default base of 10,000 without a word.
    """
    values = dict(config)
    rope = values.pop("rope_parameters", None)
    if rope:
        rope = dict(rope)
        if (theta := rope.pop("rope_theta", None)) is not None:
            values["rope_theta"] = theta
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = rope
    return values


def _part(directory: Path, layout: str, part: str) -> dict[str, torch.Tensor]:
    return split_weights(read_state_dict(directory), layout, source=str(directory))[part]
