"""A trained stage as a folder in xtuner's LLaVA layout.

``projector/`` always; ``visual_encoder/`` (tower and image processor) where the stage trained it; the
language model and tokenizer at the top where the stage trained it. ``gmai_vl.json`` says how prompts and
images were made in training. ``xtuner chat`` and :mod:`gmai_xtuner.inference` read the folder.
"""

from __future__ import annotations

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

from gmai_xtuner.errors import GMAIError

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
    trained: dict[str, nn.Module] = {"projector": model.projector}
    if not model.freeze_visual_encoder:
        trained["visual_encoder"] = model.visual_encoder
    if not model.freeze_llm:
        trained["llm"] = model.llm
    for name, part in trained.items():
        _require_weights(name, part)
    if "llm" in trained and not fp32:
        _half(model.llm)

    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    aside.chmod(0o755)
    try:
        if "llm" in trained:
            _save_language_model(model.llm, cfg, aside, save_kwargs)
        if "visual_encoder" in trained:
            BUILDER.build(cfg["image_processor"]).save_pretrained(aside / "visual_encoder")
            model.visual_encoder.save_pretrained(aside / "visual_encoder", **save_kwargs)
        model.projector.save_pretrained(aside / "projector", **save_kwargs)
        _save_settings(model, cfg, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if target.is_dir():
        target.rmdir()
    os.replace(aside, target)
    print_log(
        f"Saved {', '.join(sorted(trained))} to {save_dir}", logger="current", level=logging.INFO
    )


def _save_language_model(
    llm: Any, cfg: Mapping[str, Any], folder: Path, save_kwargs: dict[str, Any]
) -> None:
    BUILDER.build(cfg["tokenizer"]).save_pretrained(folder)
    kept = llm.config.rope_scaling, llm.config.gmai_attention
    # Some servers apply dynamic rotary scaling at every length; up to the 32,768 positions of
    # InternLM2.5 it is the identity, so the exported config goes without.
    if (kept[0] or {}).get("rope_type", (kept[0] or {}).get("type")) == "dynamic":
        llm.config.rope_scaling = None
    del llm.config.gmai_attention
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


def _require_weights(name: str, part: nn.Module) -> None:
    missing = [key for key, value in part.named_parameters() if value.device.type == "meta"]
    if missing:
        raise GMAIError(
            f"the checkpoint has no weights for {len(missing)} parameters of {name}, e.g. "
            f"{missing[0]}. Use the config of the stage that made the checkpoint"
        )


def _half(llm: Any) -> None:
    limit = torch.finfo(torch.float16).max
    vanished = 0
    for name, parameter in llm.named_parameters():
        if parameter.dtype == torch.float16:
            continue
        if parameter.abs().max() > limit:
            raise GMAIError(f"{name} has values beyond the range of fp16. Convert with --fp32")
        vanished += int(((parameter != 0) & (parameter.half() == 0)).sum())
    if vanished:
        print_log(
            f"{vanished} weights are too small for fp16 and become 0; --fp32 keeps them",
            logger="current",
            level=logging.WARNING,
        )
    llm.half()
