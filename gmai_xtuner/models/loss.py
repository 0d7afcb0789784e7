"""Cross entropy over the learnt tokens of a flat batch, without all of its logits.

Shapes: ``M`` learnt tokens, ``D`` width of the language model, ``V`` vocabulary.

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
        hidden_grad = torch.zeros_like(hidden) if hidden_learns else None
        # Summed over chunks in fp32: in bf16 each addition would round.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_learns else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_size):
            piece = slice(start, start + chunk_size)
            logits = F.linear(hidden[piece], weight).float()
            losses = F.cross_entropy(logits, targets[piece], reduction="none")
            total += (losses * weights[piece]).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            # d CE / d logits = softmax - one-hot
            slope = logits.softmax(-1)
            slope.scatter_add_(1, targets[piece, None], -torch.ones_like(losses)[:, None])
            slope = (slope * weights[piece, None]).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[piece] = slope @ weight
            if weight_grad is not None:
                weight_grad += (slope.T @ hidden[piece]).float()
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = outputs
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
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
        hidden: ``[M, D]`` hidden states at the positions *before* each learnt token.
        weight: ``[V, D]`` of the language-model head.
        targets: int64 ``[M]``.
        weights: float32 ``[M]``; what each token counts.
        chunk_size: tokens for which logits exist at a time.

    Returns:
        float32 scalar; zero, and connected to ``hidden``, if ``M`` is 0.
    """
    return _FusedLinearCrossEntropy.apply(hidden, weight, targets, weights, chunk_size)


def _forward(
    self: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    chunk_size: int = 2048,
) -> torch.Tensor:
    if targets is None or weights is None:
        return F.linear(hidden, self.weight, self.bias)
    return weighted_cross_entropy(hidden, self.weight, targets, weights, chunk_size=chunk_size)


def install_loss_head(head: nn.Linear) -> None:
    """Let ``head(hidden, targets, weights, chunk_size)`` give the loss; ``head(hidden)`` stays as it is.

    The loss is computed inside the module's own call because that is where ZeRO-3 has gathered its
    weight, and in one autograd node, so that the weight's gradient arrives once.

    Raises:
        ValueError: the head has a bias, which no supported language model has.
    """
    if head.bias is not None:
        raise ValueError("the language-model head must not have a bias")
    head.forward = types.MethodType(_forward, head)  # type: ignore[method-assign]
