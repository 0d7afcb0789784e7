# SPDX-License-Identifier: Apache-2.0

"""What a model takes: parameters, dtype and memory of its parts, where a person looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

LABELS = {
    "visual_encoder": "vision tower",
    "projector": "projector",
    "llm": "language model",
}
"""Parts in the order in which an image passes them."""


@dataclass(frozen=True, slots=True)
class PartCost:
    """Parameters of a part, their dtypes, and bytes in memory; tied weights count once."""

    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


def part_cost(part: nn.Module) -> PartCost:
    """Count a part, quantised weights by what they take."""
    weights = list(part.parameters())
    return PartCost(
        # A 4-bit weight holds two numbers in a byte.
        parameters=sum(_numbers(weight) for weight in weights),
        dtypes=tuple(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})),
        bytes=sum(weight.nbytes for weight in weights),
    )


def _numbers(weight: Any) -> int:
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(torch.Size(state.shape).numel())


def cache_bytes(config: Any, *, tokens: int, dtype: torch.dtype) -> int:
    """Memory of keys and values of one conversation.

    Args:
        config: of the language model.
        tokens: length of the conversation, image tokens counted.
        dtype: of the model.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens
    return values * torch.empty(0, dtype=dtype).element_size()


def describe_parts(parts: Mapping[str, nn.Module], *, folder: Path | None = None) -> str:
    """A table: a line a part, their sum, and what a folder takes on disk.

    Args:
        parts: ``llm``, ``visual_encoder`` and ``projector``, or some of them.
        folder: where they have been written.
    """
    costs = {LABELS[name]: part_cost(parts[name]) for name in LABELS if name in parts}
    rows = [
        (name, f"{cost.parameters:,}", "/".join(cost.dtypes), size(cost.bytes))
        for name, cost in costs.items()
    ]
    rows.append(
        (
            "all",
            f"{sum(cost.parameters for cost in costs.values()):,}",
            "",
            size(sum(cost.bytes for cost in costs.values())),
        )
    )
    lines = [f"{'':14}  {'parameters':>14}  {'dtype':<9}  {'memory':>10}"]
    lines += [
        f"{name:14}  {count:>14}  {dtype:<9}  {memory:>10}" for name, count, dtype, memory in rows
    ]
    if folder is not None:
        lines.append(f"on disk: {size(folder_bytes(folder))} in {folder}")
    return "\n".join(line.rstrip() for line in lines)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def size(number: float) -> str:
    """Bytes for people: ``14.4 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
