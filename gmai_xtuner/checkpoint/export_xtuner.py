"""A trained stage as a folder in xtuner's LLaVA layout.

``projector/`` always; ``visual_encoder/`` (tower and image processor) where it is not the base's; the
language model and tokenizer at the top where the stage trained it. ``gmai_vl.json`` says how prompts and
images were made in training. ``xtuner chat`` and :mod:`gmai_xtuner.loading` read the folder.

LoRA adapters are merged into the full-precision base, as Llama and CLIP; ``adapters/llm`` and
``adapters/visual_encoder`` hold them on their own too, in peft's format. Never ``llm_adapter`` or
``visual_encoder_adapter``: ``xtuner chat`` would apply those on top of the merged weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.export_parts import (
    check_shard_size,
    convert_dtype,
    export_dtype,
    new_folder,
    own_storage,
    trained_parts,
)
from gmai_xtuner.core.config import image_processor_config, tokenizer_config
from gmai_xtuner.model.costs import describe_parts
from gmai_xtuner.model.lora import adapter_layers, save_adapter

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
        cfg: the stage's config; tokenizer and image processor of its bases are saved along.
        save_dir: a new or empty folder.
        fp32: keep fp32 weights; otherwise the language model is saved in fp16, as xtuner does, or in
            ``export_dtype`` of the config.
        save_kwargs: ``max_shard_size`` and ``safe_serialization`` of ``save_pretrained``.

    Raises:
        GMAIError: the checkpoint lacks weights of a part that the config trains, a weight does not fit
            into fp16, ``max_shard_size`` is no size, or the folder is not empty. Nothing is written then.
    """
    dtype = export_dtype(cfg, fp32=fp32)
    if "max_shard_size" in save_kwargs:
        check_shard_size(save_kwargs["max_shard_size"])
    with new_folder(save_dir) as aside:
        parts = trained_parts(model, cfg, dtype=dtype)
        if "llm" in parts:
            convert_dtype(parts["llm"], dtype)
        for part in parts.values():
            own_storage(part)
        if "llm" in parts:
            BUILDER.build(tokenizer_config(cfg)).save_pretrained(aside)
            save_language_model(parts["llm"], aside, save_kwargs)
        if "visual_encoder" in parts:
            BUILDER.build(image_processor_config(cfg)).save_pretrained(aside / "visual_encoder")
            parts["visual_encoder"].save_pretrained(aside / "visual_encoder", **save_kwargs)
        model.projector.save_pretrained(aside / "projector", **save_kwargs)
        for name in ("llm", "visual_encoder"):
            if adapter_layers(getattr(model, name)):
                save_adapter(getattr(model, name), aside / "adapters" / name)
        save_settings(model, cfg, aside)
    print_log(
        f"Saved {', '.join(sorted(parts))} to {save_dir}\n"
        + describe_parts(parts, folder=Path(save_dir)),
        logger="current",
        level=logging.INFO,
    )


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


def save_settings(model: Any, cfg: Mapping[str, Any], folder: Path) -> None:
    """Write what inference must do as training did."""
    text = json.dumps(export_settings(model, cfg), indent=2)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def export_settings(model: Any, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """:data:`SETTINGS` of a run, and the tower's layer that the projector reads."""
    dataset = cfg["train_dataloader"]["dataset"]
    settings = {name: dataset.get(name, default) for name, default in SETTINGS.items()}
    return {**settings, "visual_select_layer": model.visual_select_layer}
