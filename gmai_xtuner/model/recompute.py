# SPDX-License-Identifier: Apache-2.0

"""Activation checkpointing that works under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

from gmai_xtuner.core.errors import GMAIError


def use_reentrant() -> bool:
    """Which of torch's two implementations to take.

    The newer one compares the tensors that it saves in the forward and in the recomputed pass. ZeRO-3
    gathers each weight for the moment of its use, so their shapes differ and it raises; weights below
    ``stage3_param_persistence_threshold`` are never released, which hides this on tiny models. Under
    ZeRO-3 the older, re-entrant one is right: its only condition, an input that needs a gradient, always
    holds here, because the projector learns in every stage.
    """
    return is_deepspeed_zero3_enabled()


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` now, and again in the backward pass instead of keeping its activations."""
    return checkpoint(function, *arguments, use_reentrant=use_reentrant())


def recompute_first_layers(decoder: Any, layers: int) -> None:
    """Let a Llama decoder with checkpointing recompute its first ``layers`` layers only.

    The last ones keep their activations: the backward pass frees those first, before any layer is
    recomputed.

    Args:
        decoder: transformers' ``LlamaModel`` after ``gradient_checkpointing_enable``.
        layers: 0 to all of its layers.

    Raises:
        GMAIError: the decoder does not have so many layers.
    """
    total = len(decoder.layers)
    if not 0 <= layers <= total:
        raise GMAIError(f"recomputed_layers must be 0 to {total}, the model's layers, got {layers}")
    recomputed = decoder._gradient_checkpointing_func

    def choose(call: Any, *arguments: Any) -> Any:
        kept = call.__self__.self_attn.layer_idx >= layers
        return call(*arguments) if kept else recomputed(call, *arguments)

    decoder._gradient_checkpointing_func = choose
