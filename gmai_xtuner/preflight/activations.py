# SPDX-License-Identifier: Apache-2.0

"""How much memory the activations of one micro-batch take: counted while the model itself runs.

Forward and backward pass run on fake tensors, which have shapes and life times but no content, so that a
model of any size takes seconds and no memory. Every storage that an operator makes is counted until it is
freed. Attention is the variable-length kernel's, and Liger's operators make what they make on a GPU: both
without their kernels, whose own buffers are not counted, nor is what the allocator can't use.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gmai_xtuner.model import attention
from gmai_xtuner.model.llava import num_image_tokens

GPU = torch.device("cpu:0")
"""Where fake tensors are on the GPU; those on ``cpu`` are in host memory. torch copies between the two, and
refuses operators that mix them, but needs no driver."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one GPU takes at a time.

    ``supervised`` tokens and ``images`` are of all packs, of ``max_length`` tokens each. Weights have
    ``dtype``, or their own where it is None.
    """

    packs: int
    max_length: int
    supervised: int
    images: int
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes ``kept`` from the forward to the backward pass; ``peak``: what the highest ``moment`` adds."""

    kept: int
    peak: int
    moment: str

    @property
    def total(self) -> int:
        return self.kept + self.peak


class LiveMemory(TorchDispatchMode):
    """Count the storages that operators make inside the block, until they are freed.

    ``live`` and ``peak`` are bytes on the :data:`GPU`, ``host`` those in host memory. Tensors that exist
    ``before`` are not counted. Where the program reads a value, which a fake tensor has not, it gets 1, or
    False.
    """

    def __init__(self, before: Any = ()) -> None:
        super().__init__()
        self.live = self.peak = self.host = 0
        self._known: dict[int, Any] = {}
        for tensor in tree_iter(before):
            if isinstance(tensor, torch.Tensor):
                self._known[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype in (torch.bool, torch.uint8) else 1.0
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                key, size, on_gpu = storage._cdata, storage.nbytes(), tensor.device == GPU
                if key not in self._known:
                    self._known[key] = weakref.finalize(storage, self._free, key, size, on_gpu)
                    self._add(size, on_gpu)
        return out

    def _add(self, size: int, on_gpu: bool) -> None:
        if on_gpu:
            self.live += size
            self.peak = max(self.peak, self.live)
        else:
            self.host += size

    def _free(self, key: int, size: int, on_gpu: bool) -> None:
        self._known.pop(key, None)
        self._add(-size, on_gpu)


def count_activations(model: Any, batch: MicroBatch) -> Activations:
    """Run one micro-batch of a ``GMAILLaVAModel`` on the meta device on fake tensors.

    Its own weights become fake ones of the batch's dtype. Gradients of weights are not counted.
    """
    with fake_gpu():
        make_fake(model, batch.dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        data = flat_batch(model, batch)
        model.train()
        before = (list(model.parameters()), list(model.buffers()), data)
        with LiveMemory(before) as memory:
            loss = model(data)["loss"]
            kept, forward = memory.live, memory.peak
            loss.backward()
    pixels = data["pixel_values"].nbytes
    moment = "forward pass" if forward == memory.peak else "backward pass"
    return Activations(kept + pixels, memory.peak - kept, moment)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside the block tensors are fake, the model runs as on a GPU, and Triton's kernels do nothing."""
    with ExitStack() as stack:
        put = stack.enter_context
        # Not in fp32, as on a CPU, nor as a ZeRO-3 engine of this process has left it behind.
        put(mock.patch.object(nn.Linear, "forward", inspect.unwrap(nn.Linear.forward)))
        put(mock.patch.object(nn.functional, "linear", torch._C._nn.linear))
        put(mock.patch.object(attention, "_varlen_runs", lambda _, dtype: dtype in attention.HALF))
        if "triton" in sys.modules:
            interface = importlib.import_module("triton.runtime.jit").KernelInterface
            put(mock.patch.object(interface, "__getitem__", return_value=_do_nothing))
        put(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def make_fake(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Put fake weights and buffers into a model on the meta device."""
    new: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in new:
                empty = torch.empty(old.shape, dtype=dtype or old.dtype, device=GPU)
                new[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
            if old is not None:
                module._parameters[name] = new[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)


def _do_nothing(*_: Any, **__: Any) -> None:
    """A kernel on fake tensors, which have no content."""


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def flat_batch(model: Any, batch: MicroBatch) -> dict[str, Any]:
    """Return what ``collate_packs`` would make of such a micro-batch, on the GPU."""
    tokens, side = batch.packs * batch.max_length, model.image_size
    places = batch.images * num_image_tokens(model.visual_encoder.config)
    numbers = partial(torch.zeros, dtype=torch.int64, device=GPU)
    return {
        "input_ids": numbers(1, tokens),
        "position_ids": numbers(1, tokens),
        "cu_seqlens": numbers(batch.packs + 1, dtype=torch.int32),
        "lengths": [batch.max_length] * batch.packs,
        "pixel_values": torch.zeros(batch.images, 3, side, side, device=GPU),
        "image_positions": numbers(places),
        "label_positions": numbers(batch.supervised),
        "label_targets": numbers(batch.supervised),
        "label_weights": torch.ones(batch.supervised, device=GPU),
        "loss_denominator": 1.0,
    }
