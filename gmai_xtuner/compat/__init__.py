# SPDX-License-Identifier: Apache-2.0

"""Every workaround for the pinned packages: what goes wrong, and until when it is needed.

:func:`apply` is called by ``import gmai_xtuner.plugin``: a string-style config imports it before xtuner looks
at anything else, and there is no later place that all ``xtuner`` commands pass. Here are those for torch,
mmengine 0.10.6 and bitsandbytes 0.45.0; DeepSpeed and xtuner have modules of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from gmai_xtuner.checkpoint.weights import install_safe_reader
from gmai_xtuner.compat import deepspeed, xtuner
from gmai_xtuner.compat.deepspeed import wrap_once
from gmai_xtuner.train import names


def apply() -> None:
    """Install all workarounds; calling it again changes nothing."""
    deepspeed.keep_standard_output_clean()
    names.register()
    install_safe_reader()
    sleep_while_waiting_for_threads()
    launch_without_gpu()
    multiply_in_fp32()
    deepspeed.skip_shared_memory_op()
    deepspeed.wait_for_gathered_weights()
    xtuner.read_zero_checkpoints_exactly()
    xtuner.read_frozen_weights()
    xtuner.resume_from_a_work_dir()
    xtuner.check_before_anything_is_built()
    import_bitsandbytes_without_triton_ops()
    deepspeed.keep_gradients_until_reduced()
    deepspeed.wait_for_the_stream_of_a_gradient()
    deepspeed.accumulate_all_gradients_in_fp32()
    xtuner.convert_checked_and_exact()


_idle_team: list[threading.Thread] = []


def sleep_while_waiting_for_threads() -> None:
    """On the CPU, threads that wait for each other sleep, so that one busy neighbour does not stop them.

    torch's OpenMP runtime (libgomp) lets a thread spin for some milliseconds at the end of each parallel
    operator. Where another process has one of the cores, the thread that spins takes the core that the
    thread it waits for needs, and a step takes three to ten times as long. The runtime reads
    ``OMP_WAIT_POLICY`` when torch is loaded, which is before any code of ours; but it spins for a moment
    only while the process has more threads than cores (``do_spin`` in libgomp's ``config/linux/wait.h``). A
    second team of threads that never works again makes it so.

    Sleeping costs too: where nothing else runs, a step of 2 M weights takes half as long again
    (``benchmarks/busy_neighbour.py``), one of the quickstart no longer. ``OMP_WAIT_POLICY`` and
    ``GOMP_SPINCOUNT`` overrule it. Until torch waits so by itself; with a GPU it does not matter.
    """
    if (
        torch.cuda.is_available()
        or torch.get_num_threads() == 1
        or _idle_team
        or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    ):
        return
    ready = threading.Event()

    def hold_a_team() -> None:
        torch.ones(1 << 20).exp_()  # large enough to be shared among threads
        ready.set()
        threading.Event().wait()

    _idle_team.append(threading.Thread(target=hold_a_team, name="idle OpenMP team", daemon=True))
    _idle_team[0].start()
    ready.wait()


def launch_without_gpu() -> None:
    """Several processes on a machine without a GPU talk through gloo.

    mmengine's ``init_dist`` calls ``torch.cuda.set_device`` and takes the config's ``nccl`` whatever the
    machine has. Until mmengine looks first.
    """
    if torch.cuda.is_available():
        return
    import mmengine.dist.utils as dist_utils

    def replaced(_: Callable[..., None]) -> Callable[..., None]:
        def init_dist_pytorch(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
            if init_backend == "deepspeed":
                import deepspeed

                deepspeed.init_distributed(dist_backend="gloo", **kwargs)
            else:
                torch.distributed.init_process_group(backend="gloo", **kwargs)

        return init_dist_pytorch

    wrap_once(dist_utils, "_init_dist_pytorch", replaced)


def multiply_in_fp32() -> None:
    """With ``GMAI_ALLOW_CPU=1``, bf16 linear layers multiply in fp32 on a CPU without bf16 instructions.

    torch has no good kernel for the backward pass there: the gradients of a 7B would take most of a day (0.1
    GFLOPS; 50 in fp32). Weights stay bf16; a layer's fp32 copy lives until its backward pass. Until torch
    does so itself.
    """
    has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    if has_bf16 or os.environ.get("GMAI_ALLOW_CPU", "0") == "0":
        return

    def make(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
            if not input.dtype == self.weight.dtype == torch.bfloat16:
                return linear(self, input)
            bias = None if self.bias is None else self.bias.float()
            product = torch.nn.functional.linear(input.float(), self.weight.float(), bias)
            return product.to(torch.bfloat16)

        return forward

    wrap_once(torch.nn.Linear, "forward", make)


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
