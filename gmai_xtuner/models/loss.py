"""Cross entropy over the learnt tokens of a flat batch.

Shapes: ``M`` learnt tokens, ``D`` width of the language model, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def _piece(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    losses = F.cross_entropy(lm_head(hidden).float(), targets, reduction="none")
    return (losses * weights).sum()


def weighted_cross_entropy(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int = 2048,
) -> torch.Tensor:
    """Sum of ``weights * CE`` without ever holding all logits.

    The language-model head runs only on the tokens that learn (image and user tokens need no logits),
    in chunks whose logits are recomputed in the backward pass: at most ``chunk_size * V`` values exist
    at a time.

    Args:
        lm_head: maps ``[m, D]`` to logits ``[m, V]``.
        hidden: ``[M, D]`` hidden states at the positions *before* each learnt token.
        targets: int64 ``[M]``.
        weights: float32 ``[M]``; what each token counts.
        chunk_size: tokens for which logits exist at a time.

    Returns:
        float32 scalar; zero, and connected to ``hidden`` and the head, if ``M`` is 0.
    """
    if hidden.shape[0] == 0:
        return hidden.sum().float() * 0.0
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk_size):
        piece = slice(start, start + chunk_size)
        arguments = (lm_head, hidden[piece], targets[piece], weights[piece])
        if torch.is_grad_enabled() and hidden.shape[0] > chunk_size:
            total = total + checkpoint(_piece, *arguments, use_reentrant=False)
        else:
            total = total + _piece(*arguments)
    return total
