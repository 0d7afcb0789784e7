"""Every workaround for xtuner 0.2.0, mmengine 0.10.6, DeepSpeed 0.16.2 and torch, in one place.

Each says what goes wrong, and until when it is needed. :func:`apply` (all but the last) is called by
``import gmai_xtuner``: a string-style config imports the package before xtuner looks at anything else, and
there is no later place that all ``xtuner`` commands pass.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEEPSPEED_NAMES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def apply() -> None:
    """Install all workarounds; calling it again changes nothing."""
    name_deepspeed_configs()
    allow_checkpoint_globals()
    answer_bf16_on_cpu()
    launch_without_gpu()
    skip_shared_memory_op()
    read_zero_checkpoints_exactly()


def name_deepspeed_configs() -> None:
    """``--deepspeed zero2`` means our bf16 file.

    xtuner looks names up in ``cfgs_name_path``, after the config file has been loaded; it only knows
    its own ``deepspeed_zero2``, whose ``"auto"`` precision asks the device. Not a defect: permanent.
    """
    from xtuner.configs import cfgs_name_path

    folder = Path(__file__).parent / "engine" / "deepspeed"
    for name in DEEPSPEED_NAMES:
        cfgs_name_path[name] = str(folder / f"{name}.json")


def allow_checkpoint_globals() -> None:
    """Checkpoints of mmengine load under torch 2.6 and newer.

    ``torch.load`` is ``weights_only`` since 2.6; mmengine's checkpoints hold its own ``HistoryBuffer``
    and ``ConfigDict``, numpy values and DeepSpeed's loss scaler. They are allow-listed by name, with the
    ``getattr`` by which ``HistoryBuffer`` is rebuilt; the list holds for the whole process. Until mmengine
    does it (0.10.6 does not).
    """
    add = getattr(torch.serialization, "add_safe_globals", None)
    if add is None:
        return
    from collections import defaultdict

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from mmengine.config import ConfigDict
    from mmengine.logging.history_buffer import HistoryBuffer

    numpy_core = getattr(np, "_core", None) or np.core
    add(
        [
            HistoryBuffer,
            ConfigDict,
            LossScaler,
            DynamicLossScaler,
            ZeroStageEnum,
            fragment_address,
            defaultdict,
            dict,
            getattr,
            numpy_core.multiarray._reconstruct,
            numpy_core.multiarray.scalar,
            np.ndarray,
            np.dtype,
            *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u4", "u8", "bool")},
        ]
    )


def answer_bf16_on_cpu() -> None:
    """xtuner asks ``torch.cpu.is_bf16_supported()``, which torch does not have.

    It does when a DeepSpeed file of xtuner's own says bf16 ``"auto"`` on a machine without a GPU. Until
    xtuner asks differently.
    """
    if not hasattr(torch.cpu, "is_bf16_supported"):
        torch.cpu.is_bf16_supported = lambda: True  # type: ignore[attr-defined]


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


def skip_shared_memory_op() -> None:
    """No C++ compiler is needed on a machine without a GPU.

    DeepSpeed builds its ``shm_comm`` operator when it starts on a CPU (half a minute, and it fails without
    a compiler). Only its inference all-reduce uses it. Until DeepSpeed builds it on first use.
    """
    if torch.cuda.is_available():
        return
    # Not `import deepspeed.comm.torch`: the attribute of that name is torch itself.
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None


def read_zero_checkpoints_exactly() -> None:
    """DeepSpeed checkpoints come back in fp32, as they were saved.

    xtuner's reader, which ``xtuner convert pth_to_hf`` uses even with ``--fp32``, rounds every weight to
    fp16 by default: each stage would start from rounded weights, and values that bf16 holds but fp16 does
    not would become 0 or infinite. Until xtuner's default changes.
    """
    from xtuner.utils.zero_to_any_dtype import get_state_dict_from_zero_checkpoint

    get_state_dict_from_zero_checkpoint.__defaults__ = (None, False, torch.float32)


def rendezvous_alone() -> None:
    """Two single-process jobs on one machine do not fight for port 29500.

    Without a launcher DeepSpeed looks for MPI and then listens on its fixed default port, so the second
    ``xtuner train`` on a machine stops with "address already in use". Called by the training loop, which
    is built before DeepSpeed starts. Until DeepSpeed takes a free port for a world of one.
    """
    if torch.distributed.is_initialized() or "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
