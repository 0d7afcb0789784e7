# SPDX-License-Identifier: Apache-2.0

"""Folders and repositories in the hub's layout: find them, read their JSON; no weights, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.strict_json import STRICT_JSON

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

    A ``ModelLoadError`` if the user has not.
    """
    if not pickle_allowed():
        raise ModelLoadError(
            f"the weights of {name} are a pickle, not safetensors. A pickle can carry a program. None is "
            "run, but it is read only when asked for: with --allow-pickle, or GMAI_ALLOW_PICKLE=1 in the "
            "environment of xtuner's commands. A copy in safetensors needs neither"
        )


def resolve_directory(name: str, *, weights: bool) -> Path:
    """Find the folder of a checkpoint, by itself or as a hub repository: ``internlm/internlm2_5-7b-chat``.

    The hub's offline switches (``HF_HUB_OFFLINE``) are honoured: the cache then answers. ``weights``: the
    weight files are wanted too, safetensors rather than bin. A ``ModelLoadError`` if it is neither a folder
    nor can be reached.
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

    A ``ModelLoadError`` if the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        content = STRICT_JSON.decode(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{path} is missing. Give the folder of a whole checkpoint in the hub's layout."
        ) from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}). Copy it again.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content


def shorten(names: Sequence[str], *, limit: int = 12) -> str:
    """Join names for a message, the first ``limit`` of them."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def layout_of(config: Mapping[str, Any]) -> str | None:
    """``plain`` or ``original`` by the content of a ``config.json``; None for what is no LLaVA."""
    if all(isinstance(config.get(part), dict) for part in ("text_config", "vision_config")):
        return "plain" if "llava" in str(config.get("model_type")) else None
    return "original" if {"mm_hidden_size", "mm_projector_type"} <= config.keys() else None


VISION_TOWERS = {"clip_vision_model": (224, 32), "siglip_vision_model": (224, 16)}
"""Kinds of towers, with the pixels of an image and of a patch where a configuration leaves them out."""


def vision_config(directory: Path) -> dict[str, Any]:
    """Read the configuration of the vision tower of a CLIP, a SigLIP or a whole LLaVA.

    A ``ModelLoadError`` if the file is missing or damaged, or says nothing about such a tower.
    """
    raw = read_json(directory / "config.json")
    layout = layout_of(raw)
    if layout == "original":
        raise ModelLoadError(
            f"{directory} has no configuration of its vision tower; it was trained with "
            f"{raw.get('mm_vision_tower')!r}. Name that one (GMAI_VISION, or vision=...)"
        )
    whole = raw.get("model_type") if raw.get("model_type") in ("clip", "siglip") else "clip"
    nested = raw.get("vision_config") if layout or raw.get("model_type") == whole else None
    config = raw if nested is None else {"model_type": f"{whole}_vision_model", **nested}
    if config.get("model_type") not in VISION_TOWERS:
        raise ModelLoadError(
            f"{directory / 'config.json'}: model_type {config.get('model_type')!r} is not supported "
            "as the vision tower; supported are 'clip', 'siglip' and their vision_model."
        )
    return config


def image_tokens(name: str) -> int:
    """Return how many patch tokens the tower of a folder or hub name makes of one image.

    576 for ViT-L/14 at 336 pixels; the class token is not counted. A ``ModelLoadError`` as of
    :func:`vision_config`.
    """
    config = vision_config(resolve_directory(name, weights=False))
    side, patch = VISION_TOWERS[config["model_type"]]
    return (config.get("image_size", side) // config.get("patch_size", patch)) ** 2
