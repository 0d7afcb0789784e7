# SPDX-License-Identifier: Apache-2.0

"""Workarounds for DeepSpeed 0.16.2: what goes wrong, and until when each is needed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch


def wrap_once(
    owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace a function of ``owner`` by what ``make`` makes of it, unless that has been done."""
    original = getattr(owner, name)
    if not hasattr(original, "__wrapped__"):
        setattr(owner, name, functools.wraps(original)(make(original)))


def keep_standard_output_clean() -> None:
    """DeepSpeed's log goes to standard error.

    Its logger takes the standard output when it is imported, and at once says which accelerator it has
    found: no command could print a JSON object alone. Until DeepSpeed logs to standard error.
    """
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")


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


def wait_for_gathered_weights() -> None:
    """ZeRO-3 on several processes without a GPU reads no weight that is still on its way.

    DeepSpeed gathers the weights of a list one by one and waits for the last alone
    (``zero/partition_parameters.py``, ``_allgather_params_coalesced``). NCCL keeps the order; gloo does not,
    and now and then a weight holds what was in memory before. Until DeepSpeed waits for each.
    """
    if torch.cuda.is_available():
        return

    def waiting(gather: Callable[..., Any]) -> Callable[..., Any]:
        def all_gather_into_tensor(*args: Any, **kwargs: Any) -> Any:
            handle = gather(*args, **kwargs)
            if handle is not None:
                handle.wait()
            return handle

        return all_gather_into_tensor

    wrap_once(importlib.import_module("deepspeed.comm"), "all_gather_into_tensor", waiting)


def keep_gradients_until_reduced() -> None:
    """Under ZeRO-1 and ZeRO-2 a gradient's memory is not given away while it is being reduced.

    A gradient above ``reduce_bucket_size`` (the embedding of the 7B has 379 M elements) is reduced in place
    on a stream of its own, and freed as soon as that has been queued: what is computed next may overwrite it.
    DeepSpeed 0.16.2, ``stage_1_and_2.py``, ``reduce_ipg_grads``; its pull request 7965 fixed this class.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    wrap_once(Zero, "average_tensor", _kept_until_reduced)


def _kept_until_reduced(average_tensor: Callable[..., None]) -> Callable[..., None]:
    def average_kept_tensor(self: Any, tensor: torch.Tensor) -> None:
        if self.overlap_comm and tensor.is_cuda:
            tensor.record_stream(self.reduction_stream)
        average_tensor(self, tensor)

    return average_kept_tensor


def wait_for_the_stream_of_a_gradient() -> None:
    """ZeRO-3 reads no gradient that is still being computed; with torch 2.10 and newer weights became NaN.

    Its reduction waits for the default stream, while autograd runs an operator's backward on the stream of
    its forward. Until xtuner takes a DeepSpeed with pull request 7898 (March 2026).
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    wrap_once(
        Zero, "_DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket", _after_the_current_stream
    )


def _after_the_current_stream(add_gradient: Callable[..., None]) -> Callable[..., None]:
    from deepspeed.accelerator import get_accelerator

    def add_finished_gradient(self: Any, param: torch.Tensor) -> None:
        accelerator = get_accelerator()
        if not accelerator.resolves_data_dependency():
            self.reduce_and_partition_stream.wait_stream(accelerator.current_stream())
        add_gradient(self, param)

    return add_finished_gradient


def accumulate_all_gradients_in_fp32() -> None:
    """Under ZeRO-2 the gradients of a step are summed in fp32, and with offloading all of them.

    DeepSpeed 0.16.2 does not honour ``data_types.grad_accum_dtype`` under ZeRO-2: in bf16 the sum of 128
    micro-batches is 1 % off, that of 512, as on one GPU, 14 %. And with the optimiser offloaded it drops
    every micro-batch of a step but the first and the last (its pull request 7967, April 2026). Until xtuner
    takes a DeepSpeed that does neither.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    def in_fp32(get: Callable[..., Any]) -> Callable[..., Any]:
        def get_flat_partition(self: Any, *args: Any, **kwargs: Any) -> Any:
            flat = get(self, *args, **kwargs)
            if isinstance(flat, list):
                return [part.to(self.gradient_accumulation_dtype) for part in flat]
            return flat

        return get_flat_partition

    def accumulate(self: Any, param: torch.Tensor) -> None:
        number = self.get_param_id(param)
        gradient = self.get_param_gradient_attribute(param).data.view(-1)
        total = self.accumulated_grads_in_cpu.get(number)
        if total is None:
            total = torch.empty(param.numel(), dtype=torch.float32, device=self.device)
            self.accumulated_grads_in_cpu[number] = total
        here = gradient.to(total.device, torch.float32)
        # Not every parameter need have a gradient in the first micro-batch, and ZeRO-1 calls this in the
        # last one only.
        begun: set[int] = self.__dict__.setdefault("_begun_in_this_step", set())
        total.copy_(here) if self.micro_step_id == 0 or number not in begun else total.add_(here)
        begun.add(number)
        if self.is_gradient_accumulation_boundary:
            gradient.copy_(total)  # what norm, overflow check and optimiser read
            begun.discard(number)

    wrap_once(Zero, "get_flat_partition", in_fp32)
    wrap_once(Zero, "async_accumulate_grad_in_cpu_via_gpu", lambda _: accumulate)
