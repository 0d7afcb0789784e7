# SPDX-License-Identifier: Apache-2.0

"""Liger's Triton kernels in a Llama model: RMSNorm, rotary embedding and SwiGLU in one pass each.

What is replaced, for one model instance and not for the whole process (Liger's own patches exchange
functions of transformers for every model): the forward of each ``LlamaRMSNorm``, of each ``LlamaMLP`` and
the rotary embedding of each ``LlamaAttention``. Parameters and their names stay.

What is not:

* Liger's fused cross entropy: it has one normalisation for all tokens, ours has a weight for each
  (:mod:`gmai_xtuner.model.loss`), which ``sample`` and ``square`` need, and it runs on supervised tokens
  only;
* layer norms of the vision tower: PyTorch's own is one fused kernel already.

Source: Liger-Kernel (Hsu et al. 2024, arXiv 2410.10989), ``liger_kernel.ops``.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.log import info

_INSTALL = 'pip install "gmai-xtuner[liger]"'


def require_liger() -> None:
    """Check that the kernels can run here; call it before weights are read.

    Raises:
        GMAIError: no CUDA device, or no liger-kernel that can be imported; says what to do.
    """
    if not torch.cuda.is_available():
        raise GMAIError(
            "liger=True needs a CUDA device, and torch sees none. Set liger=False: the results are "
            "the same but for rounding"
        )
    _operations()


def _operations() -> tuple[Any, Any, Any]:
    names = {
        "rms_norm": "LigerRMSNormFunction",
        "rope": "LigerRopeFunction",
        "swiglu": "LigerSiLUMulFunction",
    }
    try:
        return tuple(
            getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
            for module, name in names.items()
        )
    except (ImportError, AttributeError) as error:
        raise GMAIError(
            f"liger=True needs the package liger-kernel ({error}). Install it with {_INSTALL}, or set "
            "liger=False"
        ) from error


def install_liger(llm: nn.Module) -> None:
    """Let a ``LlamaForCausalLM`` compute its norms, rotary embedding and SwiGLU with Liger.

    Adapters may be put on the linear layers before or after.

    Raises:
        GMAIError: the package is missing, or the model is not a Llama with SiLU.
    """
    activation = getattr(getattr(llm, "config", None), "hidden_act", "no activation")
    if not isinstance(llm, modeling_llama.LlamaForCausalLM) or activation != "silu":
        raise GMAIError(
            f"liger=True is for LlamaForCausalLM with SiLU, got {type(llm).__name__} with {activation}. "
            "Set liger=False"
        )
    rms_norm, rope, silu_mul = _operations()

    def normalise(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        # The last argument forbids to write the input's gradient over the output's.
        return rms_norm.apply(
            hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False
        )

    def feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_mul.apply(self.gate_proj(x), self.up_proj(x)))

    attend = _with_global(modeling_llama.LlamaAttention.forward, "apply_rotary_pos_emb", rope.apply)
    replacements: dict[type, Any] = {
        modeling_llama.LlamaRMSNorm: normalise,
        modeling_llama.LlamaMLP: feed_forward,
        modeling_llama.LlamaAttention: attend,
    }
    for module in llm.modules():
        if type(module) in replacements:
            module.forward = types.MethodType(replacements[type(module)], module)
    info("Liger kernels: RMSNorm, rotary embedding and SwiGLU of the language model")


def _with_global(function: Any, name: str, value: Any) -> types.FunctionType:
    """A copy of ``function`` that sees ``value`` under the global ``name``; the module is left alone."""
    if name not in function.__globals__ or name not in function.__code__.co_names:
        raise GMAIError(
            f"liger=True needs transformers 4.48, whose {function.__qualname__} calls {name}. "
            "Set liger=False"
        )
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
