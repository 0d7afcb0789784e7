# SPDX-License-Identifier: Apache-2.0

"""GMAI-VL for XTuner.

Importing this package loads nothing else. Configs import :mod:`gmai_xtuner.plugin`, which registers the
classes; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "GMAILLaVAModel": "gmai_xtuner.checkpoint.llava",
    "SoftPackedDataset": "gmai_xtuner.data.dataset",
    "load_model": "gmai_xtuner.loading",
}
__all__ = ["GMAILLaVAModel", "SoftPackedDataset", "load_model"]  # noqa: F822 (resolved lazily)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("gmai_xtuner.plugin")
    return getattr(importlib.import_module(_MODULES[name]), name)
