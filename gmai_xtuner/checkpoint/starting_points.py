"""Exported folders as what a stage starts from (``model.pretrained_pth``, ``GMAI_STAGE1``, ``GMAI_STAGE2``).

Projector and vision tower are loaded from the folder; the language model is a base, so a folder that has one
of its own must be named as ``GMAI_LLM`` as well.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gmai_xtuner.checkpoint.export_xtuner import SETTINGS_FILE
from gmai_xtuner.checkpoint.layouts import (
    Projector,
    is_llava,
    projector_model,
    select_layer,
    tower_weights,
)
from gmai_xtuner.checkpoint.weight_files import read_json, read_state_dict
from gmai_xtuner.core.errors import ModelLoadError

ADAPTERS = ("llm_adapter", "visual_encoder_adapter")


def is_xtuner_layout(folder: str | Path) -> bool:
    """Whether a folder is in xtuner's LLaVA layout: ``projector/`` and what else was trained."""
    return (Path(folder) / "projector" / "config.json").is_file()


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds exported weights, in xtuner's layout or as a whole LLaVA."""
    return is_xtuner_layout(folder) or is_llava(folder)


def read_export(folder: str | Path, model: Any) -> dict[str, torch.Tensor]:
    """Projector and vision tower of an export, as a checkpoint has them.

    Args:
        folder: the export.
        model: the ``GMAILLaVAModel`` that is to start from it.

    Raises:
        ModelLoadError: the folder has a language model that the config does not take, adapters that are
            not merged, or a projector that reads another layer of the tower or is of another form.
    """
    folder = Path(folder)
    check_language_model(folder, str(model.llm.name_or_path))
    state: dict[str, torch.Tensor] = {}
    if is_xtuner_layout(folder):
        for name in ADAPTERS:
            if (folder / name).exists():
                raise ModelLoadError(
                    f"{str(folder)!r} has {name}/, which is not merged. Write a folder with everything "
                    f"merged first: python -m gmai_xtuner.import_model {folder} OUT"
                )
        _check_layer(xtuner_select_layer(folder), folder, model)
        _check_form(xtuner_projector(folder), folder, model)
        for part in ("projector", "visual_encoder"):
            if (folder / part).is_dir():
                weights = read_state_dict(folder / part)
                state.update({f"{part}.{key}": value for key, value in weights.items()})
        return state
    _check_layer(select_layer(read_json(folder / "config.json"), source=str(folder)), folder, model)
    form, weights = projector_model(folder)
    _check_form(form, folder, model)
    state.update({f"projector.{key}": value for key, value in weights.items()})
    state.update({f"visual_encoder.{key}": value for key, value in tower_weights(folder).items()})
    return state


def xtuner_projector(folder: str | Path) -> Projector:
    """Form of the projector of a folder in xtuner's layout.

    Raises:
        ModelLoadError: its config.json is missing or damaged.
    """
    own = read_json(Path(folder) / "projector" / "config.json")
    return Projector(
        depth=own.get("depth", 2),
        hidden_act=own.get("hidden_act", "gelu"),
        bias=own.get("bias", True),
    )


def xtuner_select_layer(folder: str | Path) -> int | None:
    """The tower's hidden state that the projector of a folder in xtuner's layout reads; None: not said.

    Raises:
        ModelLoadError: what the folder says is no number.
    """
    file = Path(folder) / SETTINGS_FILE
    if file.is_file():
        layer = read_json(file).get("visual_select_layer")
        if layer is not None and not isinstance(layer, int):
            raise ModelLoadError(
                f"{file}: visual_select_layer must be a whole number, such as -2; got {layer!r}"
            )
        return layer
    named = re.search(r"\bvisual_select_layer\s*=\s*(-?\d+)", xtuner_config(folder))
    return int(named[1]) if named else None


def xtuner_config(folder: str | Path) -> str:
    """The config that xtuner's converter puts beside an export, as text: it is code, and not run."""
    file = Path(folder) / "xtuner_config.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _check_layer(layer: int | None, folder: Path, model: Any) -> None:
    if layer is not None and layer != model.visual_select_layer:
        raise ModelLoadError(
            f"the projector of {str(folder)!r} reads layer {layer} of the vision tower, the config says "
            f"{model.visual_select_layer}. Set model.visual_select_layer={layer}"
        )


def _check_form(form: Projector, folder: Path, model: Any) -> None:
    own = model.projector.config
    if (form.depth, form.hidden_act, form.bias) != (own.depth, own.hidden_act, own.bias):
        raise ModelLoadError(
            f"the projector of {str(folder)!r} has depth {form.depth}, {form.hidden_act}, bias {form.bias}; "
            f"the config's has depth {own.depth}, {own.hidden_act}, bias {own.bias}"
        )


def check_language_model(folder: Path, name: str) -> None:
    """Whether a config takes the language model that an export has.

    Args:
        folder: the export.
        name: the base that the config takes.

    Raises:
        ModelLoadError: it takes another one.
    """
    if (folder / "config.json").is_file() and Path(name).resolve() != folder.resolve():
        raise ModelLoadError(
            f"{folder} is an export with its own language model, but the config takes the one of "
            f"{name!r}. Name the export as the base too: GMAI_LLM={folder}"
        )
