"""A trained stage as a folder in xtuner's LLaVA layout.

``projector/`` always; ``visual_encoder/`` (tower and image processor) where it is not the base's; the
language model and tokenizer at the top where the stage trained it. ``gmai_vl.json`` says how prompts and
images were made in training. ``xtuner chat`` and :mod:`gmai_xtuner.inference` read the folder.

LoRA adapters are merged into the full-precision base, as Llama and CLIP; ``adapters/llm`` and
``adapters/visual_encoder`` hold them on their own too, in peft's format. Never ``llm_adapter`` or
``visual_encoder_adapter``: ``xtuner chat`` would apply those on top of the merged weights.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn
from xtuner.registry import BUILDER

from gmai_xtuner.errors import GMAIError, ModelLoadError
from gmai_xtuner.models.checkpoint_files import read_state_dict
from gmai_xtuner.models.lora import (
    adapter_layers,
    is_adapter_key,
    merged_weights,
    remove_adapters,
    save_adapter,
)
from gmai_xtuner.models.quantization import is_quantized

SETTINGS_FILE = "gmai_vl.json"
SETTINGS = {
    "prompt_template": "internlm2_chat",
    "add_bos": True,
    "image_mode": "pad",
    "max_length": 2048,
}
"""What inference must do as training did, with the defaults of the dataset."""


def save_xtuner_layout(
    model: Any,
    cfg: Mapping[str, Any],
    save_dir: str,
    *,
    fp32: bool,
    save_kwargs: dict[str, Any],
) -> None:
    """Write the trained parts; all of them or nothing.

    Args:
        model: a ``GMAILLaVAModel`` whose trained parts have weights (frozen ones may be on meta).
        cfg: the stage's config; its ``tokenizer`` and ``image_processor`` are saved along.
        save_dir: a new or empty folder.
        fp32: keep fp32 weights; otherwise the language model is saved in fp16, as xtuner does.
        save_kwargs: ``max_shard_size`` and ``safe_serialization`` of ``save_pretrained``.

    Raises:
        GMAIError: the checkpoint lacks weights of a part that the config trains, a weight does not fit
            into fp16, or the folder is not empty. Nothing is written then.
    """
    target = Path(save_dir)
    if target.is_dir() and any(target.iterdir()):
        raise GMAIError(f"{save_dir!r} is not empty. Choose a new folder, or remove it first")
    parts = _parts_to_save(model, cfg, fp32=fp32)

    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    aside.chmod(0o755)
    try:
        if "llm" in parts:
            BUILDER.build(cfg["tokenizer"]).save_pretrained(aside)
            save_language_model(parts["llm"], aside, save_kwargs)
        if "visual_encoder" in parts:
            BUILDER.build(cfg["image_processor"]).save_pretrained(aside / "visual_encoder")
            parts["visual_encoder"].save_pretrained(aside / "visual_encoder", **save_kwargs)
        model.projector.save_pretrained(aside / "projector", **save_kwargs)
        for name in ("llm", "visual_encoder"):
            if adapter_layers(getattr(model, name)):
                save_adapter(getattr(model, name), aside / "adapters" / name)
        _save_settings(model, cfg, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if target.is_dir():
        target.rmdir()
    os.replace(aside, target)
    print_log(
        f"Saved {', '.join(sorted(parts))} to {save_dir}", logger="current", level=logging.INFO
    )


def _parts_to_save(model: Any, cfg: Mapping[str, Any], *, fp32: bool) -> dict[str, Any]:
    """Whole models, adapters merged, of the parts that differ from their bases."""
    learnt = {
        "llm": not model.freeze_llm,
        # A frozen tower that has weights here came out of the checkpoint, so no base has it.
        "visual_encoder": not model.freeze_visual_encoder or _has_weights(model.visual_encoder),
    }
    parts: dict[str, Any] = {"projector": model.projector}
    for name, whole in learnt.items():
        part = getattr(model, name)
        adapted = adapter_layers(part)
        if adapted:
            own = dict(part.named_parameters())
            _require_weights(name, {key: own[key] for key in own if is_adapter_key(key)})
            parts[name] = _merge(name, part, cfg, fp32=fp32 or name != "llm")
        elif whole:
            parts[name] = part
    for name, part in parts.items():
        _require_weights(name, dict(part.named_parameters()))
    if "llm" in parts and not fp32:
        _half(parts["llm"])
    return parts


@torch.no_grad()
def _merge(name: str, part: Any, cfg: Mapping[str, Any], *, fp32: bool) -> Any:
    """The part as a plain model with its adapters merged; ``part`` keeps them.

    The base's weights are read where ``part`` has none (``xtuner convert pth_to_hf`` builds on meta) or
    only 4-bit ones.
    """
    if _has_weights(part) and not is_quantized(part):
        merged = copy.deepcopy(part)
        remove_adapters(merged)
    else:
        base = dict(cfg["model"][name])
        base.pop("quantization_config", None)
        if fp32:
            base["torch_dtype"] = "float32"
        merged = BUILDER.build(base)
    vanished = 0
    for layer, weight in merged_weights(part, merged):
        if not fp32:
            # At once: all of them in fp32 would need twice the memory.
            weight, lost = _to_half(f"{layer}.weight", weight)
            vanished += lost
        merged.get_submodule(layer).weight = nn.Parameter(weight, requires_grad=False)
    _warn_of(vanished)
    return merged


def _has_weights(part: nn.Module) -> bool:
    """Whether nothing but adapters, if at all, is on the meta device."""
    return not any(
        value.is_meta for key, value in part.named_parameters() if not is_adapter_key(key)
    )


def is_export(folder: str | Path) -> bool:
    """Whether a folder is what this module writes."""
    return (Path(folder) / "projector" / "config.json").is_file()


def read_export(folder: str | Path, llm: Any) -> dict[str, torch.Tensor]:
    """Projector and vision tower of an export, as a checkpoint has them.

    Args:
        folder: the export.
        llm: the model's language model, which must come from the export if that has one.

    Raises:
        ModelLoadError: the language model is another one than the export's.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and (
        Path(llm.name_or_path).resolve() != folder.resolve()
    ):
        raise ModelLoadError(
            f"{folder} is an export with its own language model, but the config takes the one of "
            f"{llm.name_or_path!r}. Name the export as the base too: GMAI_LLM={folder}"
        )
    state: dict[str, torch.Tensor] = {}
    for part in ("projector", "visual_encoder"):
        if (folder / part).is_dir():
            weights = read_state_dict(folder / part)
            state.update({f"{part}.{key}": value for key, value in weights.items()})
    return state


def save_language_model(llm: Any, folder: Path, save_kwargs: Mapping[str, Any]) -> None:
    """``save_pretrained`` as plain Llama, without what only training needs in its config."""
    kept = llm.config.rope_scaling, getattr(llm.config, "gmai_attention", None)
    # Some servers apply dynamic rotary scaling at every length; up to the 32,768 positions of
    # InternLM2.5 it is the identity, so the exported config goes without.
    if (kept[0] or {}).get("rope_type", (kept[0] or {}).get("type")) == "dynamic":
        llm.config.rope_scaling = None
    llm.config.__dict__.pop("gmai_attention", None)
    llm.config.use_cache = True
    try:
        llm.save_pretrained(folder, **save_kwargs)
    finally:
        llm.config.rope_scaling, llm.config.gmai_attention = kept
        llm.config.use_cache = False


def _save_settings(model: Any, cfg: Mapping[str, Any], folder: Path) -> None:
    dataset = cfg["train_dataloader"]["dataset"]
    settings = {name: dataset.get(name, default) for name, default in SETTINGS.items()}
    settings["visual_select_layer"] = model.visual_select_layer
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _require_weights(name: str, weights: Mapping[str, torch.Tensor]) -> None:
    missing = [key for key, value in weights.items() if value.is_meta]
    if missing:
        raise GMAIError(
            f"the checkpoint has no weights for {len(missing)} parameters of {name}, e.g. "
            f"{missing[0]}. Use the config of the stage that made the checkpoint"
        )


def _half(llm: Any) -> None:
    vanished = 0
    for name, parameter in llm.named_parameters():
        if parameter.dtype != torch.float16:
            parameter.data, lost = _to_half(name, parameter.data)
            vanished += lost
    _warn_of(vanished)
    llm.half()


def _warn_of(vanished: int) -> None:
    if vanished:
        print_log(
            f"{vanished} weights are too small for fp16 and become 0; --fp32 keeps them",
            logger="current",
            level=logging.WARNING,
        )


def _to_half(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A weight in fp16, and how many of its values became 0."""
    if weight.abs().max() > torch.finfo(torch.float16).max:
        raise GMAIError(f"{name} has values beyond the range of fp16. Convert with --fp32")
    half = weight.half()
    return half, int(((weight != 0) & (half == 0)).sum())
