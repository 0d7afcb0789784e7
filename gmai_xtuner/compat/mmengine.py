# SPDX-License-Identifier: Apache-2.0

"""Workaround for mmengine 0.10.6: what goes wrong, and until when it is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def launch_without_gpu() -> None:
    """Several processes on a machine without a GPU talk through gloo.

    mmengine's ``init_dist`` calls ``torch.cuda.set_device`` and takes the config's ``nccl`` whatever the
    machine has. Until mmengine looks first.
    """
    if torch.cuda.is_available():
        return
    import mmengine.dist.utils as dist_utils

    original: Callable[..., None] = dist_utils._init_dist_pytorch
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init_dist_pytorch(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
        if init_backend == "deepspeed":
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", **kwargs)
        else:
            torch.distributed.init_process_group(backend="gloo", **kwargs)

    dist_utils._init_dist_pytorch = init_dist_pytorch
