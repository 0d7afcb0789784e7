# SPDX-License-Identifier: Apache-2.0

"""Bytes of the tensors that are alive, and their peak: counted as each operator makes its outputs."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts storages that operators make inside the block, until they are freed.

    What existed before (weights, the batch) does not count. Works with fake tensors too, which have
    shapes and life times but no content, so that a model of any size can be counted.
    """

    def __init__(self, before: Any = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        self.by_size: Counter[int] = Counter()
        self.at_peak: Counter[int] = Counter()
        for tensor in tree_iter(before):
            if isinstance(tensor, torch.Tensor):
                self._known[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def _freed(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size
        self.by_size[size] -= 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._freed, key, size)
        self.live += size
        self.by_size[size] += 1
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = self.by_size.copy()
