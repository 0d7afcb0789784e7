# SPDX-License-Identifier: Apache-2.0

"""A folder of weights -> a :class:`~gmai_xtuner.generate.Predictor`, whatever its layout.

Read are xtuner's LLaVA layout (our export and xtuner's own, with adapters or without) and whole LLaVA
folders (our ``--save-format huggingface``, transformers' LLaVA, the authors' release with InternLM2 inside,
the LLaVA repository's own form). No remote code is run. What a folder does not say, prompts above all, is
told in the log and can be said by ``prompt_template`` and ``add_bos``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from mmengine.logging import print_log
from transformers import PreTrainedTokenizerFast
from xtuner.model.modules import ProjectorConfig, ProjectorModel

import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
from gmai_xtuner.checkpoint.bases import load_language_model, load_vision_tower
from gmai_xtuner.checkpoint.export import DTYPES
from gmai_xtuner.checkpoint.layouts import (
    SETTINGS,
    SETTINGS_FILE,
    Projector,
    is_llava,
    is_xtuner_layout,
    projector_model,
    select_layer,
    text_model,
    tower_weights,
    vision_model,
    xtuner_config,
    xtuner_projector,
    xtuner_select_layer,
)
from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.checkpoint.training import first_rank_file
from gmai_xtuner.checkpoint.weights import adapter_base, read_state_dict
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import layout_of, read_json, resolve_directory, shorten
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.tokenization import ChatTemplate
from gmai_xtuner.generate import Predictor
from gmai_xtuner.model.costs import cache_bytes, describe_parts, size
from gmai_xtuner.model.llava import num_image_tokens

TEMPLATES = {
    "<|im_end|>": "internlm2_chat",
    "<|eot_id|>": "llama3_chat",
    "<|end|>": "phi3_chat",
}
"""A special token of the tokenizer, and the template that it speaks for."""
OTHERWISE = "vicuna"
AS_STORED: Final = "as stored"
"""As a dtype: each part in what its files have, so that loading rounds nothing."""
XTUNERS_LAYER = -2
"""What the projector reads in xtuner where its config does not say."""


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where each part comes from: folders or hub names, adapters on top, weights that replace a base's."""

    llm: str
    vision: str
    projector: Projector
    projector_weights: dict[str, torch.Tensor]
    select_layer: int
    llm_adapter: Path | None = None
    vision_adapter: Path | None = None
    tower: dict[str, torch.Tensor] | None = None


def load_model(
    folder: str | Path,
    *,
    llm: str | None = None,
    vision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    prompt_template: str | None = None,
    add_bos: bool | None = None,
) -> Predictor:
    """Load exported or released weights.

    Args:
        folder: a folder in one of the layouts above.
        llm: the language model's base, where the folder has none (stages 1 and 2 in xtuner's layout), or
            has an adapter that does not say its base.
        vision: the same for the vision tower.
        dtype: default: bf16 on a GPU, fp32 on the CPU.
        device: default: the GPU if there is one.
        prompt_template: name in xtuner's ``PROMPT_TEMPLATE``; default: what the folder says (our exports
            do), else by the tokenizer's special tokens, told in the log.
        add_bos: whether prompts begin with ``<s>``; default: what the folder says, else yes, and no for the
            authors' release, whose training code has none.

    Raises:
        ModelLoadError: no layout that is known; a part is missing, which base to name; weights that do not
            fit their configuration.
    """
    predictor, _ = load_with_settings(
        folder,
        llm=llm,
        vision=vision,
        dtype=dtype,
        device=device,
        prompt_template=prompt_template,
        add_bos=add_bos,
    )
    return predictor


def load_with_settings(
    folder: str | Path,
    *,
    llm: str | None = None,
    vision: str | None = None,
    dtype: torch.dtype | Literal["as stored"] | None = None,
    device: str | torch.device | None = None,
    prompt_template: str | None = None,
    add_bos: bool | None = None,
) -> tuple[Predictor, dict[str, Any]]:
    """:func:`load_model`, and what ``gmai_vl.json`` says or would say.

    ``dtype`` may be :data:`AS_STORED` as well.
    """
    folder = Path(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if is_xtuner_layout(folder):
        sources = _xtuner_sources(folder, llm, vision)
    elif is_llava(folder):
        sources = _llava_sources(folder, llm, vision)
    else:
        raise ModelLoadError(_what_it_is_instead(folder))
    tokenizer = load_tokenizer(_tokenizer_folder(folder, sources.llm))
    settings = _settings(folder, tokenizer)
    if prompt_template is not None:
        settings["prompt_template"] = prompt_template
    if add_bos is not None:
        settings["add_bos"] = add_bos
    model = GMAILLaVAModel(
        llm=load_language_model(
            sources.llm,
            torch_dtype=_stored(_llm_weights(sources)) if dtype == AS_STORED else dtype,
            adapter=sources.llm_adapter,
        ),
        visual_encoder=load_vision_tower(
            sources.vision,
            torch_dtype=_stored(_tower_weights(sources)) if dtype == AS_STORED else dtype,
            adapter=sources.vision_adapter,
            trained=sources.tower,
        ),
        visual_select_layer=sources.select_layer,
        use_activation_checkpointing=False,
    )
    model.projector = _projector(model, sources, folder).to(
        _stored(sources.projector_weights) if dtype == AS_STORED else dtype
    )
    settings["visual_select_layer"] = sources.select_layer
    predictor = Predictor(
        model.to(device),
        tokenizer=tokenizer,
        template=ChatTemplate.from_xtuner(settings["prompt_template"], add_bos=settings["add_bos"]),
        transform=ImageTransform.from_pretrained(sources.vision, mode=settings["image_mode"]),
    )
    return predictor, settings


def describe(predictor: Predictor) -> str:
    """What a loaded model takes: parameters, dtype and memory of its parts, and how it is asked."""
    model = predictor.model
    parts = {name: getattr(model, name) for name in ("visual_encoder", "projector", "llm")}
    config, template = model.llm.config, predictor.encoder.template
    tokens = 2048
    cache = cache_bytes(config, tokens=tokens, dtype=model.llm.dtype)
    pads = "padded to a square" if predictor.transform.mode == "pad" else "resized"
    return (
        f"{describe_parts(parts)}\n"
        f"on {model.llm.device}; a conversation of {tokens:,} tokens adds {size(cache)}\n"
        f"an image: {num_image_tokens(model.visual_encoder.config)} tokens, {model.image_size} x "
        f"{model.image_size} pixels, {pads}; at most {config.max_position_embeddings:,} tokens; "
        f"prompts {'begin with' if template.add_bos else 'have no'} <s>"
    )


def _stored(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    """A dtype that holds all weights exactly; what a config says of them may be another."""
    dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes < set(DTYPES) else torch.float32


def _llm_weights(sources: _Sources) -> dict[str, torch.Tensor]:
    return text_model(resolve_directory(sources.llm, weights=True))[1]


def _tower_weights(sources: _Sources) -> Mapping[str, torch.Tensor]:
    if sources.tower is not None:
        return sources.tower
    folder = resolve_directory(sources.vision, weights=True)
    return vision_model(folder)[1] if is_llava(folder) else read_state_dict(folder)


def _llava_sources(folder: Path, llm: str | None, vision: str | None) -> _Sources:
    raw = read_json(folder / "config.json")
    if llm is not None:
        raise ModelLoadError(f"{str(folder)!r} has its own language model; leave llm out")
    form, weights = projector_model(folder)
    tower: dict[str, torch.Tensor] | None = None
    if layout_of(raw) == "plain":
        if vision is not None:
            raise ModelLoadError(f"{str(folder)!r} has its own vision tower; leave vision out")
        vision = str(folder)
    else:
        # Its config does not describe the tower: the base does, also where the weights were trained.
        vision = vision or raw.get("mm_vision_tower")
        if not vision:
            raise ModelLoadError(
                f"{str(folder)!r} does not say which vision tower it was trained with; name it with "
                "--vision in the shell, vision=... in Python"
            )
        tower = tower_weights(folder) or None
    return _Sources(
        llm=str(folder),
        vision=vision,
        projector=form,
        projector_weights=weights,
        select_layer=select_layer(raw, source=str(folder)),
        tower=tower,
    )


def _xtuner_sources(folder: Path, llm: str | None, vision: str | None) -> _Sources:
    adapters = {
        name: folder / name if (folder / name).is_dir() else None
        for name in ("llm_adapter", "visual_encoder_adapter")
    }
    llm = _base_of(adapters["llm_adapter"], llm, option="llm")
    vision = _base_of(adapters["visual_encoder_adapter"], vision, option="vision")
    llm = _part(folder, folder / "config.json", llm, "language model", "llm")
    tower = folder / "visual_encoder"
    vision = _part(tower, tower, vision, "vision tower", "vision")
    if llm is None or vision is None:
        raise ModelLoadError(_name_the_bases(folder, llm, vision))
    layer = xtuner_select_layer(folder)
    return _Sources(
        llm=llm,
        vision=vision,
        projector=xtuner_projector(folder),
        projector_weights=read_state_dict(folder / "projector"),
        select_layer=XTUNERS_LAYER if layer is None else layer,
        llm_adapter=adapters["llm_adapter"],
        vision_adapter=adapters["visual_encoder_adapter"],
    )


def _base_of(adapter: Path | None, base: str | None, *, option: str) -> str | None:
    if adapter is None or base is not None:
        return base
    named = adapter_base(adapter)
    if not named:
        raise ModelLoadError(
            f"{adapter} does not say which base it was trained on; name it with --{option} in "
            f"the shell, {option}=... in Python"
        )
    print_log(f"{adapter} goes on {named}, as it says", logger="current", level=logging.INFO)
    return named


def _part(inside: Path, proof: Path, base: str | None, what: str, option: str) -> str | None:
    """Where a part is: in the export, or its base; None: it must be named."""
    if proof.exists() and base is not None:
        raise ModelLoadError(f"the export has its own {what}; leave {option} out")
    return str(inside) if proof.exists() else base


def _name_the_bases(folder: Path, llm: str | None, vision: str | None) -> str:
    parts = (("language model", "llm", llm), ("vision tower", "vision", vision))
    missing = [(what, option) for what, option, base in parts if base is None]
    shell = " ".join(f"--{option} BASE" for _, option in missing)
    python = ", ".join(f"{option}=..." for _, option in missing)
    return (
        f"the export {str(folder)!r} has no {' and no '.join(what for what, _ in missing)}: its stage did "
        f"not train {'it' if len(missing) == 1 else 'them'}. Name what it was trained on, a folder or a "
        f"hub name: {shell} in the shell, {python} in Python"
    )


def _what_it_is_instead(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"there is no folder {str(folder)!r}. Give an export or a released model; a checkpoint becomes "
            "one with: xtuner convert pth_to_hf CONFIG CHECKPOINT FOLDER"
        )
    if (folder / "last_checkpoint").is_file() or first_rank_file(folder):
        return (
            f"{str(folder)!r} holds checkpoints of training. Export one first: "
            "xtuner convert pth_to_hf CONFIG CHECKPOINT FOLDER"
        )
    kind = ""
    if (folder / "config.json").is_file():
        kind = f"; its config.json says model_type {read_json(folder / 'config.json').get('model_type')!r}"
    return (
        f"{str(folder)!r} is neither in xtuner's layout (it has no projector/) nor a whole LLaVA "
        f"(config.json with text_config and vision_config, or with mm_hidden_size){kind}. "
        "Make an export with: xtuner convert pth_to_hf CONFIG CHECKPOINT FOLDER"
    )


def _projector(model: GMAILLaVAModel, sources: _Sources, folder: Path) -> ProjectorModel:
    form = sources.projector
    config = ProjectorConfig(
        visual_hidden_size=model.visual_encoder.config.hidden_size,
        llm_hidden_size=model.llm.config.hidden_size,
        depth=form.depth,
        hidden_act=form.hidden_act,
        bias=form.bias,
    )
    projector = ProjectorModel(config)
    own, weights = projector.state_dict(), sources.projector_weights
    wrong = sorted(set(own) ^ set(weights))
    wrong += [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if wrong:
        raise ModelLoadError(
            f"the projector of {str(folder)!r} does not fit between this vision tower and this language "
            f"model: {shorten(wrong, limit=4)}. Are these the bases that it was trained with?"
        )
    projector.load_state_dict(weights)
    return projector


def _tokenizer_folder(folder: Path, llm: str) -> str:
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return str(folder) if has_own else llm


def _settings(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    if file.is_file():
        return {**SETTINGS, **read_json(file)}
    settings: dict[str, Any] = dict(SETTINGS)
    told = xtuner_config(folder)
    named = re.search(r"^prompt_template\s*=\s*PROMPT_TEMPLATE\.(\w+)", told, re.MULTILINE)
    if named:
        settings["prompt_template"] = named[1]
        return settings
    vocabulary = tokenizer.get_vocab()
    settings["prompt_template"] = next(
        (name for token, name in TEMPLATES.items() if token in vocabulary), OTHERWISE
    )
    if is_llava(folder):
        raw = read_json(folder / "config.json")
        # The authors' code trains on messages without <s>.
        settings["add_bos"] = raw.get("text_config", {}).get("model_type") != "internlm2"
    print_log(
        f"{folder} does not say how prompts were written; taken are prompt_template="
        f"{settings['prompt_template']!r} and add_bos={settings['add_bos']}",
        logger="current",
        level=logging.WARNING,
    )
    return settings
