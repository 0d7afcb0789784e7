# SPDX-License-Identifier: Apache-2.0

"""A folder of weights -> a :class:`~gmai_xtuner.generate.Predictor`, whatever its layout.

Read are xtuner's LLaVA layout (our export and xtuner's own, with adapters or without) and whole LLaVA
folders (our ``--save-format huggingface``, transformers' LLaVA, the authors' release with InternLM2 inside,
the LLaVA repository's own form). No remote code is run. What a folder does not say, prompts above all, is
told in the log and can be said by ``prompt_template`` and ``add_bos``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast
from xtuner.model.modules import ProjectorConfig, ProjectorModel

import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
from gmai_xtuner.checkpoint.bases import (
    AS_STORED,
    load_language_model,
    load_vision_tower,
    stored_dtype,
)
from gmai_xtuner.checkpoint.layouts import ADAPTERS, SETTINGS, SETTINGS_FILE, Export
from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.checkpoint.training import first_rank_file
from gmai_xtuner.checkpoint.weights import adapter_base
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import read_json
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.data.tokenization import ChatTemplate
from gmai_xtuner.generate import Predictor
from gmai_xtuner.model.costs import cache_bytes, describe_parts, size
from gmai_xtuner.model.llava import num_image_tokens

TEMPLATES = {"<|im_end|>": "internlm2_chat", "<|eot_id|>": "llama3_chat", "<|end|>": "phi3_chat"}
"""A special token of the tokenizer, and the template that it speaks for."""
OTHERWISE = "vicuna"
XTUNERS_LAYER = -2
"""What the projector reads in xtuner where its config does not say."""


class _Sources(NamedTuple):
    """Where the bases come from: folders or hub names, adapters on top, weights that replace a base's."""

    llm: str
    vision: str
    llm_adapter: Path | None = None
    vision_adapter: Path | None = None
    tower: dict[str, torch.Tensor] | None = None


def load_model(
    folder: str | Path,
    *,
    llm: str | None = None,
    vision: str | None = None,
    dtype: torch.dtype | Literal["as stored"] | None = None,
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
        dtype: default: bf16 on a GPU, fp32 on the CPU; ``"as stored"``: each part in what its files have,
            so that loading rounds nothing.
        device: default: the GPU if there is one.
        prompt_template: name in xtuner's ``PROMPT_TEMPLATE``; default: what the folder says (our exports
            do), else by the tokenizer's special tokens, told in the log.
        add_bos: whether prompts begin with ``<s>``; default: what the folder says, else yes, and no for the
            authors' release, whose training code has none.

    Returns:
        the model; its ``settings`` are what ``gmai_vl.json`` says or would say.

    Raises:
        ModelLoadError: no layout that is known; a part is missing, which base to name; weights that do not
            fit their configuration.
    """
    export = Export(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if export.layout is None:
        raise ModelLoadError(_what_it_is_instead(export))
    find = _xtuner_sources if export.layout == "xtuner" else _llava_sources
    sources = find(export, llm, vision)
    layer = export.select_layer
    has_tokenizer = any(
        (export.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    )
    tokenizer = load_tokenizer(str(folder) if has_tokenizer else sources.llm)
    settings = _settings(export, tokenizer)
    given = {"prompt_template": prompt_template, "add_bos": add_bos}
    settings |= {name: value for name, value in given.items() if value is not None}
    settings["visual_select_layer"] = XTUNERS_LAYER if layer is None else layer
    model = GMAILLaVAModel(
        llm=load_language_model(sources.llm, torch_dtype=dtype, adapter=sources.llm_adapter),
        visual_encoder=load_vision_tower(
            sources.vision, torch_dtype=dtype, adapter=sources.vision_adapter, trained=sources.tower
        ),
        visual_select_layer=settings["visual_select_layer"],
        use_activation_checkpointing=False,
    )
    weights = export.weights("projector")
    model.projector = _projector(model, export, weights).to(
        stored_dtype(weights) if dtype == AS_STORED else dtype
    )
    predictor = Predictor(
        model.to(device),
        tokenizer=tokenizer,
        template=ChatTemplate.from_xtuner(settings["prompt_template"], add_bos=settings["add_bos"]),
        transform=ImageTransform.from_pretrained(sources.vision, mode=settings["image_mode"]),
    )
    predictor.settings = settings
    return predictor


def describe(predictor: Predictor) -> str:
    """What a loaded model takes: parameters, dtype and memory of its parts, and how it is asked."""
    model = predictor.model
    config, template = model.llm.config, predictor.encoder.template
    cache = cache_bytes(config, tokens=2048, dtype=model.llm.dtype)
    pads = "padded to a square" if predictor.transform.mode == "pad" else "resized"
    return (
        f"{describe_parts(model.parts())}\n"
        f"on {model.llm.device}; a conversation of 2,048 tokens adds {size(cache)}\n"
        f"an image: {num_image_tokens(model.visual_encoder.config)} tokens, {model.image_size} x "
        f"{model.image_size} pixels, {pads}; at most {config.max_position_embeddings:,} tokens; "
        f"prompts {'begin with' if template.add_bos else 'have no'} <s>"
    )


def _llava_sources(export: Export, llm: str | None, vision: str | None) -> _Sources:
    folder = str(export.folder)
    if llm is not None:
        raise ModelLoadError(f"{folder!r} has its own language model; leave llm out")
    if export.layout == "plain":
        if vision is not None:
            raise ModelLoadError(f"{folder!r} has its own vision tower; leave vision out")
        return _Sources(folder, folder)
    # Its config does not describe the tower: the base does, also where the weights were trained.
    vision = vision or export.config.get("mm_vision_tower")
    if not vision:
        raise ModelLoadError(
            f"{folder!r} does not say which vision tower it was trained with; name it with "
            "--vision in the shell, vision=... in Python"
        )
    return _Sources(folder, vision, tower=export.weights("visual_encoder") or None)


def _xtuner_sources(export: Export, llm: str | None, vision: str | None) -> _Sources:
    folder, tower = export.folder, export.folder / "visual_encoder"
    bases, missing, adapters = [], [], [folder / name for name in ADAPTERS]
    for what, option, base, adapter, inside, proof in (
        ("language model", "llm", llm, adapters[0], folder, folder / "config.json"),
        ("vision tower", "vision", vision, adapters[1], tower, tower),
    ):
        if base is None and adapter.is_dir():
            base = adapter_base(adapter)
            if not base:
                raise ModelLoadError(
                    f"{adapter} does not say which base it was trained on; name it with --{option} in "
                    f"the shell, {option}=... in Python"
                )
            info(f"{adapter} goes on {base}, as it says")
        if proof.exists() and base is not None:
            raise ModelLoadError(f"the export has its own {what}; leave {option} out")
        bases.append(str(inside) if proof.exists() else base or "")
        missing += [] if bases[-1] else [(what, option)]
    if missing:
        shell = " ".join(f"--{option} BASE" for _, option in missing)
        python = ", ".join(f"{option}=..." for _, option in missing)
        raise ModelLoadError(
            f"the export {str(folder)!r} has no {' and no '.join(what for what, _ in missing)}: its stage "
            f"did not train {'it' if len(missing) == 1 else 'them'}. Name what it was trained on, a folder "
            f"or a hub name: {shell} in the shell, {python} in Python"
        )
    on_llm, on_vision = (adapter if adapter.is_dir() else None for adapter in adapters)
    return _Sources(bases[0], bases[1], on_llm, on_vision)


def _what_it_is_instead(export: Export) -> str:
    folder = export.folder
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
    named = export.config.get("model_type")
    kind = f"; its config.json says model_type {named!r}" if export.config else ""
    return (
        f"{str(folder)!r} is neither in xtuner's layout (it has no projector/) nor a whole LLaVA "
        f"(config.json with text_config and vision_config, or with mm_hidden_size){kind}. "
        "Make an export with: xtuner convert pth_to_hf CONFIG CHECKPOINT FOLDER"
    )


def _projector(
    model: GMAILLaVAModel, export: Export, weights: Mapping[str, torch.Tensor]
) -> ProjectorModel:
    config = ProjectorConfig(
        visual_hidden_size=model.visual_encoder.config.hidden_size,
        llm_hidden_size=model.llm.config.hidden_size,
        **export.projector._asdict(),
    )
    projector = ProjectorModel(config)
    try:
        projector.load_state_dict(weights)
    except RuntimeError as error:  # names missing, unexpected and misshapen weights
        raise ModelLoadError(
            f"the projector of {str(export.folder)!r} does not fit between this vision tower and this "
            f"language model: {' '.join(str(error).split())}. Are these the bases that it was trained with?"
        ) from error
    return projector


def _settings(export: Export, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    file = export.folder / SETTINGS_FILE
    if file.is_file():
        return {**SETTINGS, **read_json(file)}
    settings: dict[str, Any] = dict(SETTINGS)
    pattern = r"^prompt_template\s*=\s*PROMPT_TEMPLATE\.(\w+)"
    if named := re.search(pattern, export.xtuner_config, re.MULTILINE):
        settings["prompt_template"] = named[1]
        return settings
    vocabulary = tokenizer.get_vocab()
    settings["prompt_template"] = next(
        (name for token, name in TEMPLATES.items() if token in vocabulary), OTHERWISE
    )
    if export.layout != "xtuner":
        # The authors' code trains on messages without <s>.
        text = export.config.get("text_config", {})
        settings["add_bos"] = text.get("model_type") != "internlm2"
    warn(
        f"{export.folder} does not say how prompts were written; taken are prompt_template="
        f"{settings['prompt_template']!r} and add_bos={settings['add_bos']}"
    )
    return settings
