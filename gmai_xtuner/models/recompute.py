"""Activation checkpointing that works under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled


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
