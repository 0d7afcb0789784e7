"""Checkpoint folders in the hub's layout: find them, read their JSON and their weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from gmai_xtuner.checkpoint.pickles import read_weights
from gmai_xtuner.core.errors import ModelLoadError

#: Index (sharded) and single-file names, in the order in which they are looked for.
WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
TEXT_PATTERNS = ("*.json", "*.model", "*.jinja")

ALLOW_PICKLE = "GMAI_ALLOW_PICKLE"


def pickle_allowed() -> bool:
    """Return whether the user has asked for weights in pickles: ``--allow-pickle`` sets the variable."""
    return os.environ.get(ALLOW_PICKLE, "0") not in ("", "0")


def check_pickle_allowed(name: str) -> None:
    """Refuse weights in a pickle file unless the user has asked for them.

    Raises:
        ModelLoadError: the user has not.
    """
    if not pickle_allowed():
        raise ModelLoadError(
            f"the weights of {name} are a pickle, not safetensors. A pickle can carry a program. None is "
            "run, but it is read only when asked for: with --allow-pickle, or GMAI_ALLOW_PICKLE=1 in the "
            "environment of xtuner's commands. A copy in safetensors needs neither"
        )


def building_on_meta() -> bool:
    """Whether new parameters currently land on the meta device.

    ``xtuner convert pth_to_hf`` builds models this way (``accelerate.init_empty_weights``) and
    fills them afterwards, so there is no point in reading the base weights.
    """
    return torch.nn.Linear(1, 1).weight.device.type == "meta"


def resolve_directory(name: str, *, weights: bool) -> Path:
    """Find the folder of a checkpoint.

    Args:
        name: a folder, or the name of a hub repository such as ``internlm/internlm2_5-7b-chat``.
            The hub's offline switches (``HF_HUB_OFFLINE``) are honoured: the cache then answers.
        weights: whether the weight files are wanted too, safetensors rather than bin.

    Raises:
        ModelLoadError: ``name`` is neither a folder nor a repository that can be reached.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    try:
        found = _download(name, TEXT_PATTERNS)
        if weights and not has_weights(_download(name, ("*.safetensors",))):
            check_pickle_allowed(name)
            found = _download(name, ("*.bin",))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"{name!r} is no folder, and no hub repository of that name could be read "
            f"({type(error).__name__}: {error}). Give the folder that holds config.json, or "
            "download the repository first."
        ) from error
    return found


def _download(name: str, patterns: Sequence[str]) -> Path:
    return Path(snapshot_download(name, allow_patterns=list(patterns)))


def has_weights(directory: Path) -> bool:
    return any((directory / name).is_file() for pair in WEIGHT_FILES for name in pair)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelLoadError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{path} is missing. Give the folder of a whole checkpoint in the hub's layout."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}). Copy it again.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content


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

    Raises:
        ModelLoadError: it is cut short or damaged, or a pickle that the user has not asked for.
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


def shorten(names: Sequence[str], *, limit: int = 12) -> str:
    """Join names for a message, the first ``limit`` of them."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
