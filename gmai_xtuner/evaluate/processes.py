# SPDX-License-Identifier: Apache-2.0

"""The processes of one evaluation: what they tell each other."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_WAIT = datetime.timedelta(days=7)
"""How long a process waits for the slowest."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that torchrun, accelerate, Slurm or a training has started."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        self.gather(None)

    def from_first(self, value: Any) -> Any:
        """Return the first process's value, in all of them."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in every process."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def world() -> Iterator[World]:
    """Join the other processes, if the environment says that there are any.

    They talk through gloo, also on GPUs: only lists of questions and counts are exchanged.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_WAIT)
    try:
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        yield World(rank, local_rank, size)
    finally:
        distributed.destroy_process_group()
