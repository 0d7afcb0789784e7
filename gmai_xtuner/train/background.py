# SPDX-License-Identifier: Apache-2.0

"""Files of a checkpoint, written by a thread from copies in host memory while training goes on."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gmai_xtuner.core.files import to_disk
from gmai_xtuner.data.log import warn

GIB = 2**30
Write = Callable[[Any, str], Any]


class NoRoomError(Exception):
    """Host memory does not suffice for a copy."""


class BackgroundWriter:
    """Writes the files of one checkpoint after the other. The memory of the copies is kept for the next one.

    The copies are pinned where there is CUDA. Before memory is taken, a tenth of the machine's must stay free
    beside it, for all ranks of the machine; if it would not, a warning says so, and from then on each file is
    written while training waits.
    """

    def __init__(self, *, on: bool) -> None:
        self.on = on
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._files: list[Future[None]] = []
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._used: list[torch.Tensor] = []

    def save(self, write: Write, state: Any, path: str | Path) -> None:
        """Let the thread call ``write(copy of state, path)`` and force the file to disk; or do it now."""
        if self.on:
            before = len(self._used)
            try:
                copied = self._copy(state)
            except NoRoomError as error:
                self.on = False
                self._free.clear()
                del self._used[before:]
                warn(f"Training waits from now on while checkpoints are written: {error}")
            else:
                self._files.append(self._thread.submit(_write, write, copied, path))
                return
        write(state, str(path))

    def is_done(self) -> bool:
        """Return whether :meth:`wait` would return at once."""
        return all(file.done() for file in self._files)

    def wait(self) -> None:
        """Wait until all files are on disk; raise what the first of those that failed has raised."""
        files, self._files = self._files, []
        wait(files)
        for buffer in self._used if self.on else ():
            self._free[buffer.numel()].append(buffer)
        self._used.clear()
        for file in files:
            file.result()

    def _copy(self, state: Any) -> Any:
        with torch.no_grad(), _HostCopies(self._buffer):
            copied = copy.deepcopy(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _buffer(self, size: int) -> torch.Tensor:
        if not self._free[size]:
            pinned = torch.cuda.is_available()
            # torch takes pinned memory in powers of two.
            taken = (1 << (size - 1).bit_length() if pinned and size else size) * int(
                os.environ.get("LOCAL_WORLD_SIZE", "1")
            )
            total, free = host_memory()
            if taken > free - total // 10:
                raise NoRoomError(
                    f"for copies of one tensor the ranks of this machine need {taken / GIB:.2f} GiB; "
                    f"{free / GIB:.2f} of {total / GIB:.1f} GiB are free, and a tenth must stay so. "
                    "default_hooks.checkpoint.background=False makes it the rule"
                )
            try:
                buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError as error:  # the driver allows less, or too little is left after all
                raise NoRoomError(f"{size / GIB:.2f} GiB were refused: {error}") from error
            self._free[size].append(buffer)
        self._used.append(self._free[size].pop())
        return self._used[-1]


class _HostCopies(TorchFunctionMode):
    """While entered, ``copy.deepcopy`` copies tensors into host memory: views stay views of one copy."""

    def __init__(self, buffer: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._buffer = buffer
        self._copied: dict[tuple[Any, ...], torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func not in (torch.Tensor.__deepcopy__, torch.Tensor.clone):  # a Parameter's is a clone
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        storage = tensor.untyped_storage()
        place = (storage.device, storage.data_ptr() or id(tensor), storage.nbytes())
        if place not in self._copied:
            raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self._copied[place] = self._buffer(storage.nbytes()).copy_(raw, non_blocking=True)
        there = self._copied[place].untyped_storage()
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(there, tensor.storage_offset(), tensor.size(), tensor.stride())
        return copied.requires_grad_(tensor.requires_grad)


def _write(write: Write, state: Any, path: str | Path) -> None:
    write(state, str(path))
    to_disk(Path(path))


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return the bytes of host memory that this process may use, and those of them that are free.

    The machine's, or those of the tightest control group (version 2) that the process is in. Where Linux does
    not say, there are none.
    """
    total = free = 0
    with suppress(OSError, ValueError, KeyError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        total, free = 1024 * fields["MemTotal"], 1024 * fields["MemAvailable"]
        own = (root / "proc/self/cgroup").read_text().rpartition("::")[2].strip()
        group = root / f"sys/fs/cgroup{own}"
        for folder in (group, *group.parents):
            # no such group here, or its limit is "max"
            with suppress(OSError, ValueError, KeyError):
                limit = int((folder / "memory.max").read_text())
                rows = (folder / "memory.stat").read_text().splitlines()
                cached = int(dict(row.split() for row in rows)["inactive_file"])
                used = int((folder / "memory.current").read_text()) - cached
                total, free = min(total, limit), min(free, limit - used)
    return total, free
