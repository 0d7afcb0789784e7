# SPDX-License-Identifier: Apache-2.0

"""Workaround for bitsandbytes 0.45.0: what goes wrong, and until when it is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from typing import Any


def import_bitsandbytes_without_triton_ops() -> None:
    """``import bitsandbytes`` works beside the Triton of torch 2.6 and newer; peft needs it for any LoRA.

    bitsandbytes 0.45.0 (xtuner pins it) imports ``triton.ops``, which Triton 3.2 dropped. It is told that
    there is no Triton, which only turns off 8-bit layers that nobody uses here. Until xtuner takes
    bitsandbytes 0.45.1, which does not import it (its pull request 1413).
    """
    installed = importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("triton")
    if not installed or "bitsandbytes" in sys.modules or importlib.util.find_spec("triton.ops"):
        return
    if importlib.metadata.version("bitsandbytes") != "0.45.0":
        return
    name = "bitsandbytes.triton.triton_utils"
    module: Any = types.ModuleType(name)
    module.is_triton_available = lambda: False
    sys.modules[name] = module
