# SPDX-License-Identifier: Apache-2.0

"""Attention that knows where one conversation ends and the next begins.

Shapes: ``T`` tokens of the flat batch, ``S`` conversations in it, ``H`` query heads, ``K`` key/value
heads, ``D`` width of a head.

A micro-batch is one flat sequence ``[1, T]`` without padding. Which tokens belong together is said by
:class:`SequenceBoundaries`, which travels in the place of the attention mask: transformers 4.48 drops
``flash_attn_kwargs`` under gradient checkpointing, but always hands the mask on, so the boundaries
also reach the recomputation in the backward pass.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_attn_mask_utils import AttentionMaskConverter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.log import info


def _public_varlen() -> Callable[..., Any] | None:
    """torch 2.11's function; torch 2.10 has one without ``scale`` and ``window_size``, 2.9 has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if _takes(varlen_attn, "scale", "window_size") else None


def _takes(function: Callable[..., Any] | None, *names: str) -> bool:
    return function is not None and set(names) <= set(inspect.signature(function).parameters)


_varlen_attn = _public_varlen()
# torch 2.11 looks at no head; a newer function wants to be told that they are grouped.
_GROUPED = {"enable_gqa": True} if _takes(_varlen_attn, "enable_gqa") else {}

ATTENTION_NAME = "gmai_boundaries"
"""Name under which the attention function is registered in transformers."""

BACKENDS = ("auto", "varlen", "sdpa_loop")

AttentionFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "SequenceBoundaries", float], torch.Tensor
]


@dataclass(frozen=True, slots=True)
class SequenceBoundaries:
    """Where each conversation of a flat batch begins and ends.

    Args:
        cu_seqlens: int32 ``[S + 1]`` on the device of the batch; ``0 ... T``, strictly increasing.
        lengths: the ``S`` lengths on the host, so that no kernel launch has to wait for the device.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]


def sdpa_loop_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: SequenceBoundaries,
    scaling: float,
) -> torch.Tensor:
    """One causal ``scaled_dot_product_attention`` for each conversation. Works on every device.

    ``query`` is ``[1, H, T, D]``, ``key`` and ``value`` ``[1, K, T, D]`` with ``K`` dividing ``H``, the
    result ``[1, T, H, D]``.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    split = (one.split(boundaries.lengths, dim=2) for one in (query, key, value))
    pieces = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in zip(*split, strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: SequenceBoundaries,
    scaling: float,
) -> torch.Tensor:
    """PyTorch's own variable-length flash kernel (CUDA, fp16 or bf16); no flash-attn build.

    ``torch.nn.attention.varlen.varlen_attn`` where this torch has it with a scale and a window (2.11),
    otherwise the operator it is made of, ``aten._flash_attention_forward``. Shapes as in
    :func:`sdpa_loop_attention`.
    """
    # [1, heads, T, D] -> [T, heads, D]. The kernel reads each key/value head for its group of query heads.
    q, k, v = (one[0].transpose(0, 1).contiguous() for one in (query, key, value))
    starts, longest = boundaries.cu_seqlens, max(boundaries.lengths)
    if _varlen_attn is None:
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scaling
        )[0]
    else:
        out = _varlen_attn(
            q,
            k,
            v,
            starts,
            starts,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),
            **_GROUPED,
        )
    return out.unsqueeze(0)


_FUNCTIONS: dict[str, tuple[AttentionFunction, str]] = {
    "varlen": (varlen_attention, "PyTorch's variable-length flash kernel"),
    "sdpa_loop": (sdpa_loop_attention, "one causal SDPA call for each conversation"),
}


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise GMAIError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")


HALF = (torch.float16, torch.bfloat16)


def _varlen_runs(device: torch.device, dtype: torch.dtype) -> bool:
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return capable and dtype in HALF


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend of :data:`BACKENDS` for this device and dtype.

    ``auto`` takes the variable-length kernel where it runs and the loop of SDPA calls everywhere else. Both
    keep conversations apart exactly. Asking for ``varlen`` where it can't run is a ``GMAIError``.
    """
    _check_name(name)
    runs = _varlen_runs(device, dtype)
    if name == "varlen" and not runs:
        raise GMAIError(
            "attention='varlen' needs an NVIDIA GPU of compute capability 8.0 or newer and fp16 or "
            f"bf16, got {device.type} and {dtype}. Use attention='auto'"
        )
    return ("varlen" if runs else "sdpa_loop") if name == "auto" else name


def boundary_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: SequenceBoundaries | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; with a plain mask (generation) it is transformers' SDPA."""
    if not isinstance(attention_mask, SequenceBoundaries):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise GMAIError(f"GMAI-VL trains without attention dropout, got {dropout}")
    if (total := sum(attention_mask.lengths)) != query.shape[2] or query.shape[0] != 1:
        raise GMAIError(
            f"boundaries cover {total} tokens of one flat sequence, the batch has shape "
            f"{tuple(query.shape)}"
        )
    backend = choose_backend(module.config.gmai_attention, query.device, query.dtype)
    _announce(backend, query.device.type)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    attend, _ = _FUNCTIONS[backend]
    return attend(query, key, value, attention_mask, scaling), None


@functools.cache
def _announce(backend: str, device: str) -> None:
    info(
        f"Attention on {device}: {_FUNCTIONS[backend][1]} ({backend}); "
        "conversations of a pack never see each other"
    )


def _update_causal_mask(self: LlamaModel, attention_mask, *args, **kwargs):
    if isinstance(attention_mask, SequenceBoundaries):
        return attention_mask
    mask = LlamaModel._update_causal_mask(self, attention_mask, *args, **kwargs)
    if mask is None:
        return None
    # Rows of left padding see nothing, which some kernels answer with NaN; LlamaModel lets them see all, but
    # only for the attention name "sdpa" (transformers 4.48.0, modeling_llama.py:671).
    return AttentionMaskConverter._unmask_unattended(mask, torch.finfo(mask.dtype).min)


def install_boundary_attention(llm: nn.Module, *, backend: str = "auto") -> None:
    """Make a Llama model take :class:`SequenceBoundaries` as its attention mask.

    Raises:
        GMAIError: if the model is not a ``LlamaForCausalLM`` of the pinned transformers; then nothing
            would keep the conversations of a pack apart, and training must not start.
    """
    _check_name(backend)
    if not isinstance(llm, LlamaForCausalLM) or not hasattr(LlamaModel, "_update_causal_mask"):
        raise GMAIError(
            f"packed training needs transformers' LlamaForCausalLM (transformers 4.48), got "
            f"{type(llm).__name__}: its attention can't be told where a conversation ends. "
            "Load the language model with gmai_xtuner.checkpoint.bases.load_language_model"
        )
    ALL_ATTENTION_FUNCTIONS.update({ATTENTION_NAME: boundary_attention_forward})
    llm.config._attn_implementation = ATTENTION_NAME
    llm.config.gmai_attention = backend
    llm.model._update_causal_mask = types.MethodType(_update_causal_mask, llm.model)
