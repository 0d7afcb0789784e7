# SPDX-License-Identifier: Apache-2.0

"""How much memory the activations of one micro-batch take: counted while the model itself runs.

Forward and backward pass run on fake tensors, which have shapes and life times but no content, so that a
model of any size takes seconds and no memory. Every storage that an operator makes is counted until it is
freed. Weights and gradients (:mod:`gmai_xtuner.preflight.memory`), buffers inside kernels and what the
allocator can't use are not counted. Attention is the loop of SDPA calls, which keeps what the
variable-length kernel keeps; Liger's kernels, which take less, are off.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gmai_xtuner.model.llava import num_image_tokens


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one GPU takes at a time.

    ``supervised`` tokens and ``images`` are of all packs, of ``max_length`` tokens each. ``partitioned``:
    ZeRO-3, whose own linear layers keep their input where the weight is frozen, too.
    """

    packs: int
    max_length: int
    supervised: int
    images: int
    dtype: torch.dtype
    partitioned: bool = False


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
    """Count the storages that operators make inside the block, until they are freed: ``live``, ``peak``.

    Tensors that exist ``before`` are not counted.
    """

    def __init__(self, before: Any = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        for tensor in tree_iter(before):
            if isinstance(tensor, torch.Tensor):
                self._known[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known[key] = weakref.finalize(storage, self._free, key, size)
                    self.live += size
                    self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size


def count_activations(model: Any, batch: MicroBatch) -> Activations:
    """Run one micro-batch of a ``GMAILLaVAModel`` on the meta device on fake tensors.

    Its own weights become fake ones of the batch's dtype.
    """
    with _linear_layers(batch.partitioned), FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model, batch.dtype)
        data = _flat_batch(model, batch)
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
def _linear_layers(partitioned: bool) -> Iterator[None]:
    """Compute linear layers as DeepSpeed's ZeRO-3 does, or as torch, whichever this process was left with.

    DeepSpeed 0.16.2 replaces the function when an engine starts, and never takes it back.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    left = nn.functional.linear
    nn.functional.linear = zero3_linear_wrap if partitioned else torch._C._nn.linear
    try:
        yield
    finally:
        nn.functional.linear = left


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    new: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in new:
                empty = torch.empty(old.shape, dtype=dtype, device="cpu")
                parameter = new[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
                if old.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_forget_gradient)
            if old is not None:
                module._parameters[name] = new[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _flat_batch(model: Any, batch: MicroBatch) -> dict[str, Any]:
    tokens, side = batch.packs * batch.max_length, model.image_size
    places = batch.images * num_image_tokens(model.visual_encoder.config)
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "position_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "cu_seqlens": torch.zeros(batch.packs + 1, dtype=torch.int32),
        "lengths": [batch.max_length] * batch.packs,
        "pixel_values": torch.zeros(batch.images, 3, side, side),
        "image_positions": torch.zeros(places, dtype=torch.int64),
        "label_positions": torch.zeros(batch.supervised, dtype=torch.int64),
        "label_targets": torch.zeros(batch.supervised, dtype=torch.int64),
        "label_weights": torch.ones(batch.supervised),
        "loss_denominator": 1.0,
    }
