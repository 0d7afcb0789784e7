# SPDX-License-Identifier: Apache-2.0

"""Cross entropy over the supervised tokens of a flat batch, without all of its logits.

Shapes: ``M`` supervised tokens, ``D`` width of the language model, ``V`` vocabulary.

The language-model head runs only on tokens that learn (image and user tokens need no logits), a chunk at
a time, and each chunk's gradients are taken at once, so that ``chunk_size * V`` logits exist at the most.
The idea is that of Liger-Kernel's fused linear cross entropy (arXiv 2410.10989, section 3.2), in plain torch.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """``sum(weights * CE(hidden @ weight.T, targets))`` with gradients of ``hidden`` and ``weight``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        chunk_size: int,
    ) -> torch.Tensor:
        hidden_learns, weight_learns = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if hidden_learns else None
        # Summed over chunks in fp32: in bf16 each addition would round.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_learns else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_size):
            piece = slice(start, start + chunk_size)
            # Of the chunk's logits one fp32 copy is made, which turns into its gradient in place.
            scores = F.log_softmax(F.linear(hidden[piece], weight), dim=-1, dtype=torch.float32)
            chosen = targets[piece, None]
            total -= (scores.gather(1, chosen)[:, 0] * weights[piece]).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            # d CE / d logits = softmax - one-hot
            scores.exp_().scatter_add_(1, chosen, scores.new_full((1, 1), -1.0).expand_as(chosen))
            slope = scores.mul_(weights[piece, None]).to(hidden.dtype)
            del scores
            if hidden_grad is not None:
                hidden_grad[piece] = slope @ weight
            if weight_grad is not None:
                weight_grad += slope.T @ hidden[piece]
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = outputs
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            # In fp32: a bf16 scale would make every gradient up to 0.4 % too large or too small.
            None if hidden_grad is None else (hidden_grad.float() * scale).to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def weighted_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int = 2048,
) -> torch.Tensor:
    """Sum of ``weights * CE``.

    Args:
        hidden: ``[M, D]`` hidden states at the positions *before* each supervised token.
        weight: ``[V, D]`` of the language-model head.
        targets: int64 ``[M]``.
        weights: float32 ``[M]``; what each token counts.
        chunk_size: tokens for which logits exist at a time.

    Returns:
        float32 scalar; zero, and connected to ``hidden``, if ``M`` is 0.
    """
    if not torch.is_grad_enabled():
        # A node is told that a parameter needs a gradient even where none is recorded.
        hidden, weight = hidden.detach(), weight.detach()
    return _FusedLinearCrossEntropy.apply(hidden, weight, targets, weights, chunk_size)


def _forward(
    self: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    chunk_size: int = 2048,
) -> torch.Tensor:
    if targets is None:
        return F.linear(hidden, self.weight, self.bias)
    if weights is None:
        with torch.no_grad():  # to look at and not to learn from
            pairs = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
            logits = ((F.linear(part, self.weight).float(), target) for part, target in pairs)
            return torch.cat([F.cross_entropy(*pair, reduction="none") for pair in logits])
    return weighted_cross_entropy(hidden, self.weight, targets, weights, chunk_size=chunk_size)


def install_loss_head(head: nn.Linear) -> None:
    """Let ``head(hidden, targets, weights, chunk_size)`` give the loss; ``head(hidden)`` stays as it is.

    With ``None`` for the weights it gives the loss of each token, without gradients.

    The loss is computed inside the module's own call because that is where ZeRO-3 has gathered its
    weight, and in one autograd node, so that the weight's gradient arrives once.

    Raises:
        ValueError: the head has a bias, which no supported language model has.
    """
    if head.bias is not None:
        raise ValueError("the language-model head must not have a bias")
    head.forward = types.MethodType(_forward, head)  # type: ignore[method-assign]
