# SPDX-License-Identifier: Apache-2.0

"""Values that a training config names once, for the parts of a run that need them too.

``model`` names the language model and the vision tower; the dataset and the exports take tokenizer and
image processor from there. ``optim_wrapper`` names the accumulation; the sampler takes it from there. They
are filled in when a run starts and not by the config's own text, so that they follow ``--cfg-options``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gmai_xtuner.core.errors import GMAIError


def tokenizer_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what builds the tokenizer: the config's own ``tokenizer``, or that of ``model.llm``."""
    return dict(cfg.get("tokenizer") or {}) or {
        "type": "gmai_xtuner.checkpoint.tokenizer.load_tokenizer",
        "pretrained_model_name_or_path": _base(cfg, "llm"),
        "padding_side": "right",
    }


def image_processor_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what builds the image processor: the config's own, or that of ``model.visual_encoder``."""
    return dict(cfg.get("image_processor") or {}) or {
        "type": "transformers.CLIPImageProcessor.from_pretrained",
        "pretrained_model_name_or_path": _base(cfg, "visual_encoder"),
    }


def dataset_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``train_dataloader.dataset`` with the model's ``tokenizer`` and ``vision``."""
    dataset = dict(cfg["train_dataloader"]["dataset"])
    if "tokenizer" not in dataset:
        dataset["tokenizer"] = tokenizer_config(cfg)
    if "vision" not in dataset:
        dataset["vision"] = _base(cfg, "visual_encoder")
    return dataset


def accumulation(cfg: Mapping[str, Any]) -> int:
    """Return the micro-batches of an optimiser step.

    ``xtuner train`` moves ``optim_wrapper.accumulative_counts`` to the DeepSpeed strategy before it starts. A
    ``GMAIError`` if the batch sampler names another number than the optimiser wrapper.
    """
    named = cfg["optim_wrapper"].get("accumulative_counts", 1)
    counts = int((cfg.get("strategy") or {}).get("gradient_accumulation_steps", named))
    sampler = cfg["train_dataloader"].get("batch_sampler") or {}
    if sampler.get("accumulative_counts", counts) != counts:
        raise GMAIError(
            f"optim_wrapper.accumulative_counts is {counts}, but train_dataloader.batch_sampler."
            f"accumulative_counts is {sampler['accumulative_counts']}. Leave the second out: the sampler "
            "takes the first"
        )
    return counts


def train_dataloader_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``train_dataloader`` with the values that stand elsewhere in the config.

    A ``GMAIError`` if the accumulation is named twice, and differently, or the model names no base.
    """
    loader = dict(cfg["train_dataloader"])
    loader["dataset"] = dataset_config(cfg)
    sampler = dict(loader.get("batch_sampler") or {})
    loader["batch_sampler"] = {**sampler, "accumulative_counts": accumulation(cfg)}
    collate = dict(loader.get("collate_fn") or {})
    if collate.get("type") == "collate_packs" and "weighting" in sampler:
        loader["collate_fn"] = {**collate, "weighting": sampler["weighting"]}
    return loader


def _base(cfg: Mapping[str, Any], part: str) -> str:
    name = (cfg["model"].get(part) or {}).get("pretrained_model_name_or_path")
    if not isinstance(name, str):
        raise GMAIError(
            f"model.{part}.pretrained_model_name_or_path must name a folder or a model of the hub, got "
            f"{name!r}"
        )
    return name
