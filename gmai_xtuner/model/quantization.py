# SPDX-License-Identifier: Apache-2.0

"""4-bit base weights for QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes on CUDA."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from xtuner.registry import BUILDER

from gmai_xtuner.core.errors import ModelLoadError

TO_CONVERT = (
    "To convert a checkpoint, add --cfg-options model.llm.quantization_config=None: "
    "it is merged into the full-precision base"
)


def quantization_that_runs(config: Mapping[str, Any] | BitsAndBytesConfig) -> BitsAndBytesConfig:
    """The configuration, once it is clear that this machine can run it. No weight has been read by then.

    Args:
        config: a ``BitsAndBytesConfig`` or its config ``dict(type="transformers.BitsAndBytesConfig",
            load_in_4bit=True, ...)``; it is not changed.

    Raises:
        ModelLoadError: not 4 bit, DeepSpeed ZeRO-3, no CUDA device, or a bitsandbytes that does not
            run with this torch.
    """
    built = BUILDER.build(copy.deepcopy(config)) if isinstance(config, Mapping) else config
    if not isinstance(built, BitsAndBytesConfig) or not built.load_in_4bit:
        raise ModelLoadError(
            "quantization_config must be a transformers.BitsAndBytesConfig with load_in_4bit=True, got "
            f"{config!r}"
        )
    if is_deepspeed_zero3_enabled():
        raise ModelLoadError(
            "DeepSpeed ZeRO-3 can't partition 4-bit weights. Take --deepspeed zero1 or zero2: what "
            "learns is small, and the 4-bit base fits on each GPU"
        )
    if not torch.cuda.is_available():
        raise ModelLoadError(f"4-bit weights need an NVIDIA GPU, and there is none. {TO_CONVERT}")
    _try_bitsandbytes()
    return built


def _try_bitsandbytes() -> None:
    try:
        import bitsandbytes as bnb

        bnb.functional.quantize_4bit(torch.zeros(64, device="cuda"), quant_type="nf4")
    except (ImportError, AttributeError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelLoadError(
            f"bitsandbytes does not run here ({type(error).__name__}: {error}). xtuner 0.2.0 pins "
            f"bitsandbytes 0.45.0, which has kernels up to CUDA 12.6; this torch {torch.__version__} is "
            f"built for CUDA {torch.version.cuda}. Install a newer one beside it: "
            "pip install --no-deps 'bitsandbytes>=0.48'"
        ) from error


def is_quantized(part: nn.Module) -> bool:
    """Whether a model has 4-bit weights."""
    return bool(getattr(part, "is_loaded_in_4bit", False))
