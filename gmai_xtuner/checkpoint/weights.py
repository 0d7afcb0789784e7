# SPDX-License-Identifier: Apache-2.0

"""Weights on disk: safetensors or pickles, in one file or in shards, and LoRA adapters on top of them.

Adapters of peft are added to the weights of their base without building it. xtuner's own ``llm_adapter`` and
``visual_encoder_adapter`` stand on the base's own names, for InternLM2 with queries, keys and values in one
matrix (``attention.wqkv``), so they are added before anything is renamed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gmai_xtuner.checkpoint.pickles import read_weights
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import WEIGHT_FILES, check_pickle_allowed, read_json, shorten

_PREFIX = "base_model.model."
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OTHER_FORMS = ("use_dora", "fan_in_fan_out", "modules_to_save", "alora_invocation_tokens")


def read_state_dict(directory: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a checkpoint folder: safetensors or bin, in one file or in shards.

    The tensors are memory-mapped, so that ranks of one machine share the pages and a tensor that
    is never touched is never read.

    Raises:
        ModelLoadError: no weights, a missing or damaged shard, or a key that the index promises
            and no shard has.
    """
    for index_name, single_name in WEIGHT_FILES:
        if (directory / index_name).is_file():
            return _read_shards(directory, directory / index_name)
        if (directory / single_name).is_file():
            return read_weights_file(directory / single_name)
    expected = ", ".join(name for pair in WEIGHT_FILES for name in pair)
    raise ModelLoadError(f"{directory} has no weights. Expected one of {expected}.")


def _read_shards(directory: Path, index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no 'weight_map'. Copy it again.")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ModelLoadError(
            f"{directory}: {len(missing)} of {len(names)} weight files named in {index.name} are "
            f"missing: {', '.join(missing)}. Finish the download or the copy."
        )
    state_dict: dict[str, torch.Tensor] = {}
    for name in names:
        state_dict.update(read_weights_file(directory / name))
    if lost := sorted(set(weight_map) - set(state_dict)):
        raise ModelLoadError(
            f"{directory}: {index.name} names weights that no file holds: {shorten(lost)}."
        )
    return state_dict


def read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    """Read one file of weights, memory-mapped.

    One that is cut short or damaged, or a pickle that the user has not asked for, is a ``ModelLoadError``.
    """
    if path.suffix != ".safetensors":
        check_pickle_allowed(str(path))
        return read_weights(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ModelLoadError(
            f"{path} can't be read ({type(error).__name__}: {error}). "
            "The file is cut short or damaged: copy it again."
        ) from error


def adapter_base(folder: Path) -> str | None:
    """The base that an adapter names."""
    return read_json(folder / "adapter_config.json").get("base_model_name_or_path")


@torch.no_grad()
def add_adapter(weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """``W + alpha / r * B A`` for every matrix that the adapter has; in fp32, rounded once.

    Weights of the base have its own names; the folder holds ``adapter_config.json`` and ``adapter_model``.

    Raises:
        ModelLoadError: another kind of adapter, or one of another base; names the weights.
    """
    config = read_json(folder / "adapter_config.json")
    others = [key for key in _OTHER_FORMS if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or others:
        raise ModelLoadError(
            f"{folder}: only LoRA without biases can be merged, got peft_type "
            f"{config.get('peft_type')!r}, bias {config.get('bias')!r}"
            + (f", {', '.join(others)}" if others else "")
        )
    adapter = _read(folder)
    layers = sorted({key.split(".lora_")[0] for key in adapter})
    result = dict(weights)
    if strange := [layer for layer in layers if f"{layer}.weight" not in weights]:
        raise ModelLoadError(
            f"{folder} has adapters for {len(strange)} layers that the base does not have: "
            f"{shorten(strange, limit=4)}. Name the base that it was trained on"
        )
    for layer in layers:
        down, up = (adapter[f"{layer}.lora_{half}.weight"].float() for half in "AB")
        base = weights[f"{layer}.weight"]
        if (up.shape[0], down.shape[1]) != tuple(base.shape):
            raise ModelLoadError(
                f"{folder}: the adapter of {layer} is for a matrix of {up.shape[0]} x {down.shape[1]}, the "
                f"base has {tuple(base.shape)}. Name the base that it was trained on"
            )
        scale = _scale(config, layer, down.shape[0])
        result[f"{layer}.weight"] = (base.float() + scale * (up @ down)).to(base.dtype)
    return result


def _read(folder: Path) -> dict[str, torch.Tensor]:
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelLoadError(f"{folder} has neither {' nor '.join(_FILES)}. Finish the copy")
    weights = {
        key.removeprefix(_PREFIX).replace(".default.", "."): value
        for key, value in read_weights_file(file).items()
    }
    layers = {key.split(".lora_")[0] for key in weights}
    wanted = {f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
    if wrong := sorted(set(weights) ^ wanted):
        raise ModelLoadError(
            f"{folder} is no whole LoRA adapter: {shorten(wrong, limit=4)} missing or unexpected"
        )
    return weights


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if layer.endswith(pattern):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
