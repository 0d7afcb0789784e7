# SPDX-License-Identifier: Apache-2.0

"""A trained stage as a folder in xtuner's LLaVA layout.

``projector/`` always; ``visual_encoder/`` (tower and image processor) where it is not the base's; the
language model and tokenizer at the top where the stage trained it. ``gmai_vl.json`` says how prompts and
images were made in training. ``xtuner chat`` and :mod:`gmai_xtuner.loading` read the folder.

LoRA adapters are merged into the full-precision base, as Llama and CLIP; ``adapters/llm`` and
``adapters/visual_encoder`` hold them on their own too, in peft's format. Never ``llm_adapter`` or
``visual_encoder_adapter``: ``xtuner chat`` would apply those on top of the merged weights.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from safetensors import SafetensorError
from torch import nn
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.layouts import SETTINGS, SETTINGS_FILE
from gmai_xtuner.core.config import image_processor_config, tokenizer_config
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import staged
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.model.costs import describe_parts
from gmai_xtuner.model.internlm2 import DTYPES, as_dtype
from gmai_xtuner.model.lora import (
    adapter_layers,
    is_adapter_key,
    is_quantized,
    merged_weights,
    remove_adapters,
    save_adapter,
)


def save_xtuner_layout(
    model: Any, cfg: Mapping[str, Any], save_dir: str, *, fp32: bool, save_kwargs: dict[str, Any]
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
        processors: dict[str, Any] = {}
        if "llm" in parts:
            convert_dtype(parts["llm"], dtype)
            processors["llm"] = BUILDER.build(tokenizer_config(cfg))
        if "visual_encoder" in parts:
            source = image_processor_config(cfg)["pretrained_model_name_or_path"]
            processors["visual_encoder"] = ImageTransform.from_pretrained(source).processor()
        write_xtuner(aside, parts, processors, settings=export_settings(model, cfg), **save_kwargs)
        for name in ("llm", "visual_encoder"):
            if adapter_layers(getattr(model, name)):
                save_adapter(getattr(model, name), aside / "adapters" / name)
    info(
        f"Saved {', '.join(sorted(parts))} to {save_dir}\n"
        + describe_parts(parts, folder=Path(save_dir))
    )


def write_xtuner(
    folder: Path,
    parts: Mapping[str, Any],
    processors: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    **save_kwargs: Any,
) -> None:
    """Write parts in their dtypes, each with its tokenizer or image processor.

    Args:
        folder: see :func:`new_folder`.
        parts: ``projector``, and ``llm`` and ``visual_encoder`` where they are not the bases'.
        processors: of ``llm`` and ``visual_encoder``.
        settings: what ``gmai_vl.json`` is to say; further arguments are of ``save_pretrained``.
    """
    for name, part in parts.items():
        for parameter in part.parameters():
            # What DeepSpeed gives back of a checkpoint are views of one flat buffer. torch.save writes a
            # view's whole buffer, and weights that share one are never divided over shards.
            size = 0 if parameter.is_meta else parameter.data.untyped_storage().nbytes()
            if size > parameter.nbytes:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        target = folder if name == "llm" else folder / name
        if name in processors:
            processors[name].save_pretrained(target)
        if name == "llm":
            save_language_model(part, target, save_kwargs)
        else:
            part.save_pretrained(target, **save_kwargs)
    write_json(folder / SETTINGS_FILE, settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for people too."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def without_dynamic_rope(scaling: Mapping[str, Any] | None) -> Any:
    """Leave out dynamic rotary scaling.

    Some servers apply it at every length; up to the 32,768 positions of InternLM2.5 it is the identity.
    """
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type"))
    return None if kind == "dynamic" else scaling


def save_language_model(llm: Any, folder: Path, save_kwargs: Mapping[str, Any]) -> None:
    """``save_pretrained`` as plain Llama, without what only training needs in its config."""
    kept = llm.config.rope_scaling, getattr(llm.config, "gmai_attention", None)
    llm.config.rope_scaling = without_dynamic_rope(kept[0])
    llm.config.__dict__.pop("gmai_attention", None)
    llm.config.use_cache = True
    try:
        llm.save_pretrained(folder, **save_kwargs)
    finally:
        llm.config.rope_scaling, llm.config.gmai_attention = kept
        llm.config.use_cache = False


def export_settings(model: Any, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """:data:`SETTINGS` of a run, and the tower's layer that the projector reads."""
    dataset = cfg["train_dataloader"]["dataset"]
    settings = {name: dataset.get(name, default) for name, default in SETTINGS.items()}
    return {**settings, "visual_select_layer": model.visual_select_layer}


def export_dtype(cfg: Mapping[str, Any], *, fp32: bool) -> torch.dtype:
    """Return what is written: fp32 with ``--fp32``, else the config's ``export_dtype``, else fp16."""
    named = cfg.get("export_dtype")
    if named is None:
        return torch.float32 if fp32 else torch.float16
    dtype = as_dtype(named)
    if dtype not in DTYPES:
        raise GMAIError(f"export_dtype must be float32, float16 or bfloat16, got {named!r}")
    if fp32 and dtype != torch.float32:
        raise GMAIError(
            f"--fp32 and export_dtype={named!r} contradict each other; give one of them"
        )
    return dtype


def check_new(target: str | Path) -> Path:
    """Return ``target`` as a path; refuse a file, and a folder that is not empty."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise GMAIError(f"{str(target)!r} is a file. Choose a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise GMAIError(f"{str(target)!r} is not empty. Choose a new folder, or remove it first")
    return target


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Give a folder to write into, renamed to ``target`` when all is there; removed if anything fails.

    A target that is a file, is not empty or can't be written is a ``GMAIError``.
    """
    target = check_new(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(target) as folder:
            folder.mkdir()
            yield folder
            _readable(folder)
    except Exception as error:
        of_system = "(os error " in str(error)  # in Exception itself, as tokenizers raises it
        if not of_system and not isinstance(error, (OSError, SafetensorError)):
            raise
        raise GMAIError(
            f"{str(target)!r} can't be written ({error}), and nothing is left of it. Make room, or choose "
            "another folder"
        ) from error


def _readable(folder: Path) -> None:
    """Give files the permissions that new files have here; safetensors makes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def trained_parts(model: Any, cfg: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    """Return whole models, adapters merged, of the parts that differ from their bases.

    ``dtype`` is what the language model will be written in; merging rounds only once.

    Raises:
        GMAIError: the checkpoint lacks weights of a part that the config trains.
    """
    # A frozen tower that has weights here came out of the checkpoint, so no base has it.
    tower_is_own = not model.freeze_visual_encoder or _has_weights(model.visual_encoder)
    parts: dict[str, Any] = {"projector": model.projector}
    for name, is_own, kind in (
        ("llm", not model.freeze_llm, dtype),
        ("visual_encoder", tower_is_own, torch.float32),
    ):
        part = getattr(model, name)
        if adapter_layers(part):
            parts[name] = _merged(name, part, cfg, kind)
        elif is_own:
            parts[name] = part
    for name, part in parts.items():
        _require_weights(name, dict(part.named_parameters()))
    return parts


def all_parts(model: Any, cfg: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    """:func:`trained_parts`, and from their bases those that the stage did not train."""
    parts = trained_parts(model, cfg, dtype=dtype)
    for name in {"llm", "visual_encoder"} - parts.keys():
        part = getattr(model, name)
        parts[name] = part if _is_as_exact(part, dtype) else _base(name, cfg, dtype)
    return parts


def _is_as_exact(part: Any, dtype: torch.dtype) -> bool:
    """Return True if a part has weights, and not coarser ones than its base may have."""
    rounded = is_quantized(part) or (dtype == torch.float32 and part.dtype != torch.float32)
    return _has_weights(part) and not rounded


def _base(name: str, cfg: Mapping[str, Any], dtype: torch.dtype) -> Any:
    base = dict(cfg["model"][name])
    base.pop("quantization_config", None)
    if dtype == torch.float32:
        base["torch_dtype"] = "float32"
    return BUILDER.build(base)


@torch.no_grad()
def _merged(name: str, part: Any, cfg: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return the part as a plain model with its adapters merged, on its own weights or its base's."""
    own = dict(part.named_parameters())
    _require_weights(name, {key: own[key] for key in own if is_adapter_key(key)})
    if _is_as_exact(part, dtype):
        whole = copy.deepcopy(part)
        remove_adapters(whole)
    else:
        whole = _base(name, cfg, dtype)
    with converting(dtype) as convert:
        for layer, weight in merged_weights(part, whole):
            # At once: all of them in fp32 would need twice the memory.
            merged = nn.Parameter(convert(f"{layer}.weight", weight), requires_grad=False)
            whole.get_submodule(layer).weight = merged
    return whole


def _has_weights(part: nn.Module) -> bool:
    """Return True if nothing but adapters, if at all, is on the meta device."""
    own = part.named_parameters()
    return not any(value.is_meta for key, value in own if not is_adapter_key(key))


def _require_weights(name: str, weights: Mapping[str, torch.Tensor]) -> None:
    missing = [key for key, value in weights.items() if value.is_meta]
    if missing:
        raise GMAIError(
            f"the checkpoint has no weights for {len(missing)} parameters of {name}, e.g. "
            f"{missing[0]}. Use the config of the stage that made the checkpoint"
        )


def convert_dtype(part: Any, dtype: torch.dtype) -> None:
    """Turn all weights of a part into ``dtype``.

    Buffers stay as they are: those of Llama and CLIP are not written, and rotary frequencies need fp32. A
    weight beyond the range of fp16, or that is no number, is a ``GMAIError``.
    """
    with converting(dtype) as convert:
        for name, parameter in part.named_parameters():
            # Also what has that dtype already: a merge may have gone beyond its range.
            parameter.data = convert(name, parameter.data)


def check_shard_size(max_shard_size: str | int) -> None:
    """Refuse a size that ``save_pretrained`` can't take, before anything is read or written."""
    with suppress(ValueError):
        size = max_shard_size
        if (parse_size_to_int(size) if isinstance(size, str) else size) > 0:
            return
    raise GMAIError(
        f"--max-shard-size must be a number above 0 with its unit (KB, MB, GB or TB), such as 2GB; "
        f"got {max_shard_size!r}"
    )


@contextmanager
def converting(dtype: torch.dtype) -> Iterator[Callable[[str, torch.Tensor], torch.Tensor]]:
    """Give the function that turns a named weight into ``dtype``; at the end, tell what became 0."""
    vanished = 0

    def convert(name: str, weight: torch.Tensor) -> torch.Tensor:
        nonlocal vanished
        weight, lost = as_written(name, weight, dtype)
        vanished += lost
        return weight

    yield convert
    if vanished:
        warn(
            f"{vanished} weights are too small for fp16 and become 0; --fp32 keeps them (import_model: "
            "--dtype float32)"
        )


def as_written(name: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Return a weight in ``dtype``, and how many of its values became 0."""
    if not torch.isfinite(weight).all():
        raise GMAIError(
            f"{name} has values that are no numbers (NaN or infinite). Take another checkpoint"
        )
    if dtype != torch.float16:
        return weight.to(dtype), 0
    if weight.abs().max() > torch.finfo(torch.float16).max:
        raise GMAIError(
            f"{name} has values beyond the range of fp16. Convert with --fp32, or with "
            "--cfg-options export_dtype=bfloat16; import_model with --dtype float32 or bfloat16"
        )
    half = weight.half()
    return half, int(((weight != 0) & (half == 0)).sum())
