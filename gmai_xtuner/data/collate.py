# SPDX-License-Identifier: Apache-2.0

"""Packs -> one flat batch without padding.

Shapes: ``T`` tokens, ``S`` conversations, ``N`` images of ``P`` tokens each, ``M`` supervised tokens.

Two packs ``[A A A B B]`` and ``[C C C]`` (lower case: supervised)::

    input_ids        A a a B b C C c
    position_ids     0 1 2 0 1 0 1 2
    cu_seqlens       0     3   5     8
    label_positions  0 1   3     6        the token before each supervised one
    label_targets    a a   b     c
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import FUNCTIONS
from torch import Tensor

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.errors import GMAIError


@FUNCTIONS.register_module()
def collate_packs(
    packs: Sequence[dict[str, Any]], *, weighting: str = "token"
) -> dict[str, dict[str, Any]]:
    """Join the packs of a micro-batch.

    Args:
        packs: items of :class:`gmai_xtuner.data.dataset.SoftPackedDataset`.
        weighting: what a supervised token counts: ``token`` and ``micro_batch`` 1; ``sample`` 1/n and
            ``square`` 1/sqrt(n) in a conversation of n supervised tokens. In a config it is left out:
            training takes the batch sampler's.

    Returns:
        ``{"data": ...}`` as :meth:`gmai_xtuner.checkpoint.llava.GMAILLaVAModel.forward` takes it: besides
        the fields in the module's drawing ``lengths`` (S ints), ``pixel_values`` ``[N, 3, H, W]``,
        ``image_positions`` int64 ``[N * P]``, ``label_weights`` float32 ``[M]``, their sum
        ``label_weight`` (float: made here, the trainer need not wait for the device), ``num_tokens``,
        ``capacity`` (tokens the packs could hold), ``ids``. The training loop adds ``loss_denominator``.
    """
    input_ids = torch.cat([pack["input_ids"] for pack in packs])
    labels = torch.cat([pack["labels"] for pack in packs])
    lengths = [length for pack in packs for length in pack["lengths"]]
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    if int(starts[-1]) != len(input_ids) or len(labels) != len(input_ids):
        raise GMAIError(
            f"{len(input_ids)} tokens, {len(labels)} labels and lengths of {int(starts[-1])} in a batch"
        )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), starts.diff())
    # A conversation's first token must not be predicted from the end of the one before.
    labels[starts[:-1]] = IGNORE_INDEX
    supervised = torch.nonzero(labels != IGNORE_INDEX).flatten()
    weights = _weights(owner[supervised], len(lengths), weighting)
    return {
        "data": {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": (torch.arange(len(input_ids)) - starts[owner]).unsqueeze(0),
            "cu_seqlens": starts.to(torch.int32),
            "lengths": lengths,
            "pixel_values": torch.cat([pack["pixel_values"] for pack in packs]),
            "image_positions": torch.nonzero(input_ids == IMAGE_TOKEN_INDEX).flatten(),
            "label_positions": supervised - 1,
            "label_targets": labels[supervised],
            "label_weights": weights,
            "label_weight": float(weights.sum()),
            "num_tokens": sum(pack["num_tokens"] for pack in packs),
            "capacity": sum(pack["capacity"] for pack in packs),
            "ids": [name for pack in packs for name in pack["ids"]],
        }
    }


def _weights(owner: Tensor, conversations: int, weighting: str) -> Tensor:
    """float32 ``[M]``; ``owner`` is the conversation of each supervised token."""
    if weighting in ("token", "micro_batch"):
        return torch.ones(len(owner))
    if weighting not in ("sample", "square"):
        raise GMAIError(f"unknown weighting {weighting!r}")
    counts = torch.bincount(owner, minlength=conversations).to(torch.float32)[owner]
    return counts.reciprocal() if weighting == "sample" else counts.rsqrt()
