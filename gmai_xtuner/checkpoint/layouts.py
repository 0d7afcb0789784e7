# SPDX-License-Identifier: Apache-2.0

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

A stage starts from an exported folder (``model.pretrained_pth``, ``GMAI_STAGE1``, ``GMAI_STAGE2``) in one
of these layouts or in xtuner's. Projector and vision tower are loaded from it; the language model is a base,
so a folder that has one of its own must be named as ``GMAI_LLM`` as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gmai_xtuner.checkpoint.weights import read_state_dict
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import layout_of, read_json, shorten, vision_config

SETTINGS_FILE = "gmai_vl.json"
SETTINGS = {
    "prompt_template": "internlm2_chat",
    "add_bos": True,
    "image_mode": "pad",
    "max_length": 2048,
}
"""What inference must do as training did, with the defaults of the dataset."""


ADAPTERS = ("llm_adapter", "visual_encoder_adapter")
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
    """Read configuration and weights of the vision tower of a LLaVA.

    Raises:
        ModelLoadError: a file is missing or damaged, or the folder has no tower of its own.
    """
    config = vision_config(directory)
    return config, _part(directory, "plain", "visual_encoder") if weights else {}


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


def is_xtuner_layout(folder: str | Path) -> bool:
    """Whether a folder is in xtuner's LLaVA layout: ``projector/`` and what else was trained."""
    return (Path(folder) / "projector" / "config.json").is_file()


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds exported weights, in xtuner's layout or as a whole LLaVA."""
    return is_xtuner_layout(folder) or is_llava(folder)


def read_export(folder: str | Path, model: Any) -> dict[str, torch.Tensor]:
    """Projector and vision tower of an export, as a checkpoint has them.

    Args:
        folder: the export.
        model: the ``GMAILLaVAModel`` that is to start from it.

    Raises:
        ModelLoadError: the folder has a language model that the config does not take, adapters that are
            not merged, or a projector that reads another layer of the tower or is of another form.
    """
    folder = Path(folder)
    check_language_model(folder, str(model.llm.name_or_path))
    state: dict[str, torch.Tensor] = {}
    if is_xtuner_layout(folder):
        for name in ADAPTERS:
            if (folder / name).exists():
                raise ModelLoadError(
                    f"{str(folder)!r} has {name}/, which is not merged. Write a folder with everything "
                    f"merged first: python -m gmai_xtuner.import_model {folder} OUT"
                )
        _check_layer(xtuner_select_layer(folder), folder, model)
        _check_form(xtuner_projector(folder), folder, model)
        for part in ("projector", "visual_encoder"):
            if (folder / part).is_dir():
                weights = read_state_dict(folder / part)
                state.update({f"{part}.{key}": value for key, value in weights.items()})
        return state
    _check_layer(select_layer(read_json(folder / "config.json"), source=str(folder)), folder, model)
    form, weights = projector_model(folder)
    _check_form(form, folder, model)
    state.update({f"projector.{key}": value for key, value in weights.items()})
    state.update({f"visual_encoder.{key}": value for key, value in tower_weights(folder).items()})
    return state


def xtuner_projector(folder: str | Path) -> Projector:
    """Form of the projector of a folder in xtuner's layout.

    Raises:
        ModelLoadError: its config.json is missing or damaged.
    """
    own = read_json(Path(folder) / "projector" / "config.json")
    return Projector(
        depth=own.get("depth", 2),
        hidden_act=own.get("hidden_act", "gelu"),
        bias=own.get("bias", True),
    )


def xtuner_select_layer(folder: str | Path) -> int | None:
    """The tower's hidden state that the projector of a folder in xtuner's layout reads; None: not said.

    Raises:
        ModelLoadError: what the folder says is no number.
    """
    file = Path(folder) / SETTINGS_FILE
    if file.is_file():
        layer = read_json(file).get("visual_select_layer")
        if layer is not None and not isinstance(layer, int):
            raise ModelLoadError(
                f"{file}: visual_select_layer must be a whole number, such as -2; got {layer!r}"
            )
        return layer
    named = re.search(r"\bvisual_select_layer\s*=\s*(-?\d+)", xtuner_config(folder))
    return int(named[1]) if named else None


def xtuner_config(folder: str | Path) -> str:
    """The config that xtuner's converter puts beside an export, as text: it is code, and not run."""
    file = Path(folder) / "xtuner_config.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _check_layer(layer: int | None, folder: Path, model: Any) -> None:
    if layer is not None and layer != model.visual_select_layer:
        raise ModelLoadError(
            f"the projector of {str(folder)!r} reads layer {layer} of the vision tower, the config says "
            f"{model.visual_select_layer}. Set model.visual_select_layer={layer}"
        )


def _check_form(form: Projector, folder: Path, model: Any) -> None:
    own = model.projector.config
    if (form.depth, form.hidden_act, form.bias) != (own.depth, own.hidden_act, own.bias):
        raise ModelLoadError(
            f"the projector of {str(folder)!r} has depth {form.depth}, {form.hidden_act}, bias {form.bias}; "
            f"the config's has depth {own.depth}, {own.hidden_act}, bias {own.bias}"
        )


def check_language_model(folder: Path, name: str) -> None:
    """Whether a config takes the language model that an export has.

    Args:
        folder: the export.
        name: the base that the config takes.

    Raises:
        ModelLoadError: it takes another one.
    """
    if (folder / "config.json").is_file() and Path(name).resolve() != folder.resolve():
        raise ModelLoadError(
            f"{folder} is an export with its own language model, but the config takes the one of "
            f"{name!r}. Name the export as the base too: GMAI_LLM={folder}"
        )
