# SPDX-License-Identifier: Apache-2.0

"""The model on the meta device: its real structure, without one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from xtuner.registry import BUILDER


@dataclass(frozen=True, slots=True)
class PartCount:
    """Parameters of one part of the model.

    Args:
        total: all.
        trainable: those that the optimiser moves.
        in_4_bit: those that a 4-bit base (QLoRA) keeps quantised.
        own_bytes: bytes of all in the types that the config gives them.
        largest_trainable: elements of the largest trainable tensor.
    """

    total: int
    trainable: int
    in_4_bit: int
    own_bytes: int
    largest_trainable: int


def build_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """Build ``cfg.model`` on the meta device; only ``config.json`` files are read.

    ``pretrained_pth`` is left out (see :mod:`gmai_xtuner.preflight.checks`), and a quantised base is
    built as what it was before.

    Raises:
        GMAIError: whatever the model raises for its config.
    """
    model = {key: value for key, value in config.items() if key != "pretrained_pth"}
    if "quantization_config" in model.get("llm", {}):
        model["llm"] = {k: v for k, v in model["llm"].items() if k != "quantization_config"}
    with init_empty_weights():
        return BUILDER.build(model)


def quantises_to_4_bit(config: Mapping[str, Any]) -> bool:
    """Whether the config's language model is loaded in 4 bit."""
    quantisation = config.get("llm", {}).get("quantization_config") or {}
    return bool(quantisation.get("load_in_4bit", False))


def count_parameters(model: nn.Module, *, llm_in_4_bit: bool = False) -> dict[str, PartCount]:
    """Parameters of each part, which is a direct child of the model that has any.

    Args:
        model: on any device.
        llm_in_4_bit: bitsandbytes quantises the linear layers of ``llm``, all but the head.
    """
    counts: dict[str, PartCount] = {}
    seen: set[int] = set()
    for name, part in model.named_children():
        quantised = _linear_weights(part) if llm_in_4_bit and name == "llm" else set()
        # Tied weights are one parameter, and belong to the part that comes first.
        own = {id(parameter): parameter for parameter in part.parameters()}
        parameters = [value for key, value in own.items() if key not in seen]
        seen |= own.keys()
        if not parameters:
            continue
        learns = [parameter.numel() for parameter in parameters if parameter.requires_grad]
        counts[name] = PartCount(
            total=sum(parameter.numel() for parameter in parameters),
            trainable=sum(learns),
            in_4_bit=sum(
                parameter.numel() for parameter in parameters if id(parameter) in quantised
            ),
            own_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            largest_trainable=max(learns, default=0),
        )
    return counts


def _linear_weights(llm: nn.Module) -> set[int]:
    return {
        id(module.weight)
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear)
        and "lora_" not in name
        and name.rpartition(".")[2] != "lm_head"
        and not module.weight.requires_grad
    }
