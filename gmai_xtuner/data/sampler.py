"""Which pack goes to which rank and micro-batch, and what the loss of that step is divided by.

One optimiser step takes ``world x accumulative_counts x batch_size`` packs in the order of the epoch's
plan. The last step of an epoch takes what is left, in fewer micro-batches: no pack is dropped, none is
repeated. Where the packs left do not reach every rank, a rank gets a pack that learns nothing, so that
all ranks run the same number of passes.

::

    world 2, batch_size 2, accumulative_counts 2, 11 packs

    step 0   micro-batch 0: rank 0 [0, 2]  rank 1 [1, 3]
             micro-batch 1: rank 0 [4, 6]  rank 1 [5, 7]    <- the optimiser steps
    step 1   micro-batch 0: rank 0 [8, 10] rank 1 [9]       <- the optimiser steps
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.soft_packed import SoftPackedDataset

WEIGHTINGS = {"token": "labels", "sample": "conversations", "square": "sqrt_labels"}
"""Loss weighting -> the total (see :mod:`gmai_xtuner.data.plan`) that normalises it."""


class PackRef(NamedTuple):
    """One pack of one micro-batch.

    Args:
        epoch: epoch whose plan is meant.
        pack: number of the pack in it.
        denominator: what this micro-batch's weighted sum of losses is divided by.
        weighting: what a learnt token counts, see :class:`MicroBatchSampler`.
        step_end: the optimiser steps after this micro-batch.
        learns: false for a pack that only fills a place.
    """

    epoch: int
    pack: int
    denominator: float
    weighting: str
    step_end: bool
    learns: bool


@DATA_SAMPLERS.register_module()
class PackSampler(Sampler[int]):
    """The packs of an epoch, in the plan's order (which is drawn by the dataset's own seed).

    Args:
        dataset: the packed dataset.
        seed: ignored; mmengine hands it to every sampler, the dataset's seed decides.
    """

    def __init__(self, dataset: SoftPackedDataset, seed: int | None = None) -> None:
        self.dataset = dataset
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.dataset)


@DATA_SAMPLERS.register_module()
class MicroBatchSampler(Sampler[list[PackRef]]):
    """Micro-batches of this rank, see the module.

    Args:
        sampler: a :class:`PackSampler`.
        batch_size: packs of a micro-batch on one rank.
        accumulative_counts: micro-batches of an optimiser step; must be the optimiser wrapper's.
        weighting: ``token``: every learnt token of the step counts the same; ``sample``: every
            conversation; ``square``: a conversation counts by the square root of its learnt tokens.
            All are normalised over the whole optimiser step, all ranks and micro-batches.
            ``micro_batch``: the plain token mean of each micro-batch, as the authors' code takes it.
        rank: default: this process's.
        world_size: default: the number of processes.
    """

    def __init__(
        self,
        sampler: PackSampler,
        batch_size: int,
        *,
        accumulative_counts: int = 1,
        weighting: str = "token",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if weighting not in (*WEIGHTINGS, "micro_batch"):
            raise GMAIError(
                f"weighting must be one of {', '.join((*WEIGHTINGS, 'micro_batch'))}, got {weighting!r}"
            )
        if batch_size < 1 or accumulative_counts < 1:
            raise GMAIError(
                "batch_size and accumulative_counts must be at least 1, got "
                f"{batch_size} and {accumulative_counts}"
            )
        own_rank, own_world = get_dist_info()
        self.sampler = sampler
        self.batch_size = batch_size
        self.accumulative_counts = accumulative_counts
        self.weighting = weighting
        self.rank = own_rank if rank is None else rank
        self.world_size = own_world if world_size is None else world_size
        self._start = 0

    @property
    def packs_a_step(self) -> int:
        """Packs that a full optimiser step takes, all ranks together."""
        return self.world_size * self.batch_size * self.accumulative_counts

    def __len__(self) -> int:
        """Micro-batches of an epoch; the same on every rank."""
        full, left = divmod(len(self.sampler), self.packs_a_step)
        return full * self.accumulative_counts + -(-left // (self.world_size * self.batch_size))

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.sampler) // self.packs_a_step)

    def step_ends(self, micro_batch: int) -> bool:
        """Whether the optimiser steps after this micro-batch of an epoch."""
        return (micro_batch + 1) % self.accumulative_counts == 0 or micro_batch + 1 == len(self)

    def set_position(self, epoch: int, micro_batch: int) -> None:
        """Begin the next iteration there, without reading what comes before."""
        self.sampler.set_epoch(epoch)
        self._start = micro_batch

    def __iter__(self) -> Iterator[list[PackRef]]:
        start, self._start = self._start, 0
        epoch = self.sampler.epoch
        plan = self.sampler.dataset.plan.epoch(epoch)
        across = self.world_size * self.batch_size
        for micro_batch in range(start, len(self)):
            first = micro_batch * across
            mine = range(first + self.rank, min(first + across, len(self.sampler)), self.world_size)
            step_first = micro_batch // self.accumulative_counts * self.packs_a_step
            step = slice(step_first, min(step_first + self.packs_a_step, len(self.sampler)))
            if self.weighting == "micro_batch":
                # DeepSpeed's own mean over micro-batches and ranks does the rest, as it does there.
                denominator = float(plan.total("labels")[list(mine)].sum()) if mine else 1.0
            else:
                total = float(np.sum(plan.total(WEIGHTINGS[self.weighting])[step]))
                denominator = total / (self.accumulative_counts * self.world_size)
            ends = self.step_ends(micro_batch)
            if mine:
                yield [
                    PackRef(epoch, pack, denominator, self.weighting, ends, True) for pack in mine
                ]
            else:
                yield [PackRef(epoch, step_first, denominator, self.weighting, ends, False)]
