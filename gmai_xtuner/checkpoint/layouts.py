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

Plain names are those of ``LlamaForCausalLM`` (or of InternLM2), ``CLIPVisionModel`` (or SigLIP's) and
xtuner's ``ProjectorModel``. Tensors stay memory-mapped: a part that is not asked for is not read.

A stage starts from an exported folder (``model.pretrained_pth``, ``GMAI_STAGE1``, ``GMAI_STAGE2``) in one
of these layouts or in xtuner's. Projector and vision tower are loaded from it; the language model is a base,
so a folder that has one of its own must be named as ``GMAI_LLM`` as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
PLAIN_NAMES = (
    ("llm", "", "language_model."),
    ("visual_encoder", "", "vision_tower."),
    ("projector", "model.0.", "multi_modal_projector.linear_1."),
    ("projector", "model.2.", "multi_modal_projector.linear_2."),
)
"""Part, how its plain names begin, and how those of the ``plain`` layout do; as we write them."""
_RULES = {
    "plain": (
        (r"(model\.)?vision_tower\.(vision_model\.)?", "visual_encoder", "vision_model."),
        (r"(model\.)?multi_modal_projector\.linear_1\.", "projector", "model.0."),
        (r"(model\.)?multi_modal_projector\.linear_2\.", "projector", "model.2."),
        (r"language_model\.(?=model\.|lm_head\.|output\.)", "llm", ""),
        (r"model\.language_model\.(?=embed_tokens|tok_embeddings|layers|norm)", "llm", "model."),
        (r"(?=lm_head\.)", "llm", ""),
    ),
    "original": (
        (r"model\.vision_tower\.vision_tower\.vision_model\.", "visual_encoder", "vision_model."),
        (r"model\.mm_projector\.(?=\d+\.)", "projector", "model."),
        (r"(?=model\.(embed_tokens|layers|norm)\.|lm_head\.)", "llm", ""),
    ),
}
"""Layout -> how names begin there, the part they belong to, and how their plain names begin."""
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


class Projector(NamedTuple):
    """How an image feature becomes an embedding: ``depth`` linear layers with an activation between."""

    depth: int = 2
    hidden_act: str = "gelu"
    bias: bool = True


class Export:
    """A folder of exported weights in one of the layouts; weights are read when they are asked for.

    ``layout`` is ``xtuner``, ``plain`` or ``original``; ``None`` for what is no export.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / "config.json"
        self.config = read_json(file) if file.is_file() else {}
        self.layout = "xtuner" if is_xtuner_layout(folder) else layout_of(self.config)

    @property
    def projector(self) -> Projector:
        """Form of the projector.

        Raises:
            ModelLoadError: its description is missing or damaged, or it is no chain of linear layers.
        """
        if self.layout == "xtuner":
            own = read_json(self.folder / "projector" / "config.json")
            return Projector(**{key: own[key] for key in Projector._fields if key in own})
        if self.layout == "plain":
            return Projector(
                hidden_act=self.config.get("projector_hidden_act", "gelu"),
                bias=self.config.get("multimodal_projector_bias", True),
            )
        kind = str(self.config.get("mm_projector_type"))
        match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
        if kind != "linear" and match is None:
            raise ModelLoadError(
                f"{self.folder}: mm_projector_type {kind!r} is not supported; supported are 'linear' and "
                "'mlp<N>x_gelu'"
            )
        return Projector(depth=int(match[1]) if match else 1)

    @property
    def select_layer(self) -> int | None:
        """The tower's hidden state that the projector reads; ``None``: the folder does not say.

        Raises:
            ModelLoadError: no number, several layers, or the class token as well.
        """
        if self.layout == "xtuner":
            file = self.folder / SETTINGS_FILE
            if not file.is_file():
                match = re.search(r"\bvisual_select_layer\s*=\s*(-?\d+)", self.xtuner_config)
                return int(match[1]) if match else None
            layer = read_json(file).get("visual_select_layer")
            if layer is not None and not isinstance(layer, int):
                raise ModelLoadError(
                    f"{file}: visual_select_layer must be a whole number, such as -2; got {layer!r}"
                )
            return layer
        get = self.config.get
        layer = get("vision_feature_layer", get("mm_vision_select_layer", -2))
        strategy = get("vision_feature_select_strategy", "default")
        kind = get("vision_config", {}).get("model_type")
        wanted = "full" if kind == "siglip_vision_model" else "default"  # SigLIP has no class token
        features = get("mm_vision_select_feature", "patch")
        if not isinstance(layer, int) or strategy != wanted or features != "patch":
            raise ModelLoadError(
                f"{self.folder}: only one layer's patch tokens are supported (vision_feature_layer a number, "
                f"vision_feature_select_strategy {wanted!r}), got {layer!r} and {strategy!r}"
            )
        return layer

    @property
    def xtuner_config(self) -> str:
        """The config that xtuner's converter puts beside an export, as text: it is code, and not run."""
        file = self.folder / "xtuner_config.py"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def weights(self, part: str) -> dict[str, torch.Tensor]:
        """Return the weights of a part under plain names; empty where the folder has none.

        Raises:
            ModelLoadError: a file is missing or damaged, a weight belongs to no part, or there is no
                projector.
        """
        if self.layout == "xtuner":
            own = self.folder / part
            return read_state_dict(own) if own.is_dir() else {}
        found = split_weights(self.folder, str(self.layout))[part]
        if part == "projector" and not found:
            raise ModelLoadError(f"{self.folder} has no weights of the projector. Finish the copy")
        return found


def is_xtuner_layout(folder: str | Path) -> bool:
    """Return True for a folder in xtuner's LLaVA layout: ``projector/`` and what else was trained."""
    return (Path(folder) / "projector" / "config.json").is_file()


def is_llava(folder: str | Path) -> bool:
    """Return True for a folder that holds a whole LLaVA in one of the layouts."""
    return Export(folder).layout in _RULES


def is_export(folder: str | Path) -> bool:
    """Return True for a folder of exported weights, in xtuner's layout or as a whole LLaVA."""
    return Export(folder).layout is not None


def split_weights(folder: Path, layout: str) -> dict[str, dict[str, torch.Tensor]]:
    """Read the weights of a whole LLaVA by part, under plain names; a part may be empty.

    Raises:
        ModelLoadError: a weight that belongs to no part.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {
        part: {} for part in ("llm", "visual_encoder", "projector")
    }
    strange = []
    for key, value in read_state_dict(folder).items():
        for pattern, part, replacement in _RULES[layout]:
            if found := re.match(pattern, key):
                name = replacement + key[found.end() :]
                if not name.endswith(_IGNORED):
                    parts[part][name] = value
                break
        else:
            strange.append(key)
    if strange:
        raise ModelLoadError(
            f"{folder} has {len(strange)} weights that a LLaVA of this layout does not have: "
            f"{shorten(sorted(strange), limit=4)}. Take config and weights from the same checkpoint"
        )
    return parts


def plain_weights(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the weights of all parts under the names of the ``plain`` layout."""
    return {
        theirs + key.removeprefix(ours): value
        for part, ours, theirs in PLAIN_NAMES
        for key, value in parts[part].items()
        if key.startswith(ours)
    }


def text_model(
    directory: Path, *, weights: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read configuration and, if asked for, weights of a folder's language model, alone or in a LLaVA.

    A file that is missing or damaged is a ``ModelLoadError``.
    """
    raw = read_json(directory / "config.json")
    layout = layout_of(raw)
    if layout is None:
        return with_rope(raw), read_state_dict(directory) if weights else {}
    if layout == "plain":
        text = {"model_type": "llama", **raw["text_config"]}
        if text["model_type"] == "internlm2":
            text = {**INTERNLM2_DEFAULTS, **text}
        if text.get("torch_dtype") is None and text.get("dtype") is None:
            text["torch_dtype"] = raw.get("torch_dtype") or raw.get("dtype")
    else:
        text = {**raw, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return with_rope(text), split_weights(directory, layout)["llm"] if weights else {}


def vision_model(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read configuration and weights of the vision tower of a folder, be it a CLIP, a SigLIP or a LLaVA.

    Raises:
        ModelLoadError: a file is missing or damaged, or the folder has no tower of its own.
    """
    config = vision_config(directory)
    if not is_llava(directory):
        return config, read_state_dict(directory)
    return config, split_weights(directory, "plain")["visual_encoder"]


def with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``rope_parameters`` of transformers 5 as ``rope_theta`` and ``rope_scaling``, which 4.48 reads.

    Left as it is, 4.48 would take the default base of 10,000 without a word.
    """
    values = dict(config)
    rope = dict(values.pop("rope_parameters", None) or {})
    if (theta := rope.pop("rope_theta", None)) is not None:
        values["rope_theta"] = theta
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    return values


def read_export(folder: str | Path, model: Any) -> dict[str, torch.Tensor]:
    """Read projector and vision tower of an export, as the checkpoint that ``model`` starts from has them.

    Raises:
        ModelLoadError: the folder has a language model that the config does not take, adapters that are
            not merged, or a projector that reads another layer of the tower or is of another form.
    """
    export, base = Export(folder), str(model.llm.name_or_path)
    if export.config and Path(base).resolve() != export.folder.resolve():
        raise ModelLoadError(
            f"{folder} is an export with its own language model, but the config takes the one of "
            f"{base!r}. Name the export as the base too: GMAI_LLM={folder}"
        )
    for name in ADAPTERS if export.layout == "xtuner" else ():
        if (export.folder / name).exists():
            raise ModelLoadError(
                f"{str(folder)!r} has {name}/, which is not merged. Write a folder with everything "
                f"merged first: python -m gmai_xtuner.import_model {folder} OUT"
            )
    layer = export.select_layer
    if layer is not None and layer != model.visual_select_layer:
        raise ModelLoadError(
            f"the projector of {str(folder)!r} reads layer {layer} of the vision tower, the config says "
            f"{model.visual_select_layer}. Set model.visual_select_layer={layer}"
        )
    form, own = export.projector, model.projector.config
    if form != (own.depth, own.hidden_act, own.bias):
        raise ModelLoadError(
            f"the projector of {str(folder)!r} has depth {form.depth}, {form.hidden_act}, bias {form.bias}; "
            f"the config's has depth {own.depth}, {own.hidden_act}, bias {own.bias}"
        )
    return {
        f"{part}.{key}": value
        for part in ("projector", "visual_encoder")
        for key, value in export.weights(part).items()
    }
