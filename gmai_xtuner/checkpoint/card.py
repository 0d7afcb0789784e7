# SPDX-License-Identifier: Apache-2.0

"""The model card of an export: what it is, what it takes, how to use it, what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from gmai_xtuner.core.templates import environment
from gmai_xtuner.model.costs import cache_bytes, folder_bytes, size
from gmai_xtuner.model.lora import adapter_layers


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a model comes from.

    Args:
        stage: name of the stage, for the title.
        trained: what that stage trained.
        llm: folder or hub name of the language model's base.
        vision: the same of the vision tower.
    """

    stage: str
    trained: str
    llm: str
    vision: str


def provenance_of(model: Any, cfg: Mapping[str, Any]) -> Provenance:
    """By a stage's config and its ``GMAILLaVAModel``."""
    return Provenance(
        stage=str(cfg["train_dataloader"]["dataset"].get("stage", "stage unknown")),
        trained=_trained(model),
        llm=str(cfg["model"]["llm"]["pretrained_model_name_or_path"]),
        vision=str(cfg["model"]["visual_encoder"]["pretrained_model_name_or_path"]),
    )


def write_model_card(
    folder: Path,
    *,
    provenance: Provenance,
    costs: str,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    config: LlavaConfig,
    mean_colour: tuple[int, ...],
) -> None:
    """Write ``README.md``.

    Args:
        folder: the export, its weights already written.
        provenance: where the model comes from.
        costs: the table of parameters, dtype and memory.
        settings: what inference must do as training did.
        dtype: of the weights.
        config: of the whole.
        mean_colour: with which images are padded, 0 to 255.
    """
    tokens = settings["max_length"]
    templates = environment("gmai_xtuner.checkpoint", keep_trailing_newline=True)
    text = templates.get_template("card.md.j2").render(
        bases=[base for base in (provenance.llm, provenance.vision) if _is_hub_name(base)],
        stage=provenance.stage,
        trained=provenance.trained,
        llm=_shown(provenance.llm),
        vision=_shown(provenance.vision),
        dtype=str(dtype).removeprefix("torch."),
        image_tokens=config.image_seq_length,
        side=config.vision_config.image_size,
        vocabulary=config.text_config.vocab_size,
        image_id=config.image_token_index,
        max_length=tokens,
        template=settings["prompt_template"],
        add_bos=settings["add_bos"],
        costs=costs,
        on_disk=size(folder_bytes(folder)),
        cache=size(cache_bytes(config.text_config, tokens=tokens, dtype=dtype)),
        pads=settings["image_mode"] == "pad",
        colour=mean_colour,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _trained(model: Any) -> str:
    def how(part: Any, frozen: bool, name: str) -> str | None:
        if adapter_layers(part):
            return f"{name} (LoRA, merged)"
        return None if frozen else name

    return ", ".join(
        text
        for text in (
            "projector",
            how(model.visual_encoder, model.freeze_visual_encoder, "vision tower"),
            how(model.llm, model.freeze_llm, "language model"),
        )
        if text
    )


def _shown(base: str) -> str:
    """A hub name as it is; of a folder its last part, since a card is passed on and paths are not."""
    return f"`{base}`" if _is_hub_name(base) else f"`{Path(base).name}` (a folder)"


def _is_hub_name(base: str) -> bool:
    return base.count("/") == 1 and not Path(base).exists() and not base.startswith((".", "~"))
