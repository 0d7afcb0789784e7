# SPDX-License-Identifier: Apache-2.0

"""Which pack goes to which rank and micro-batch, and what the loss of that step is divided by.

One optimiser step takes ``world x accumulative_counts x batch_size`` packs in the order of the epoch's
plan. The last step of an epoch takes what is left, in fewer micro-batches: no pack is dropped, none is
repeated. Where the packs left do not reach every rank, a rank gets a pack without supervised tokens, so
that all ranks run the same number of passes.

::

    world 2, batch_size 2, accumulative_counts 2, 11 packs

    step 0   micro-batch 0: rank 0 [0, 2]  rank 1 [1, 3]
             micro-batch 1: rank 0 [4, 6]  rank 1 [5, 7]    <- the optimiser steps
    step 1   micro-batch 0: rank 0 [8, 10] rank 1 [9]       <- the optimiser steps
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.dataset import PackRef, SoftPackedDataset

WEIGHTINGS = {"token": "labels", "sample": "conversations", "square": "sqrt_labels"}
"""Loss weighting -> the total (see :mod:`gmai_xtuner.data.plan`) that normalises it."""


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
        accumulative_counts: micro-batches of an optimiser step. In a config it is left out: training takes
            ``optim_wrapper.accumulative_counts``.
        weighting: ``token``: every supervised token of the step counts the same; ``sample``: every
            conversation; ``square``: a conversation counts by the square root of its supervised tokens.
            All are normalised over the whole optimiser step, all ranks and micro-batches.
            ``micro_batch``: the plain token mean of each micro-batch, as the authors' code takes it.
        rank, world_size: default: this process's, and the number of processes.
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
    def packs_per_step(self) -> int:
        """Packs that a full optimiser step takes, all ranks together."""
        return self.world_size * self.batch_size * self.accumulative_counts

    def __len__(self) -> int:
        """Micro-batches of an epoch; the same on every rank."""
        full, left = divmod(len(self.sampler), self.packs_per_step)
        return full * self.accumulative_counts + -(-left // (self.world_size * self.batch_size))

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.sampler) // self.packs_per_step)

    def step_ends(self, micro_batch: int) -> bool:
        """Return whether the optimiser steps after this micro-batch of an epoch."""
        return (micro_batch + 1) % self.accumulative_counts == 0 or micro_batch + 1 == len(self)

    def steps_after(self, iterations: int) -> int:
        """Return how many optimiser steps a run has made after so many micro-batches, over all epochs."""
        epochs, left = divmod(iterations, len(self))
        return epochs * self.steps + left // self.accumulative_counts

    def iterations_at(self, steps: int) -> int:
        """Return how many micro-batches a run has trained when it has made so many optimiser steps."""
        epochs, left = divmod(steps, self.steps)
        return epochs * len(self) + left * self.accumulative_counts

    def run_length(self, max_epochs: float | None, max_iters: int | None) -> int:
        """Return the micro-batches of a run, rounded up to the end of an optimiser step.

        So many epochs are as many optimiser steps on any number of ranks.

        Raises:
            GMAIError: not exactly one of the two lengths is given.
        """
        if (max_iters is None) == (max_epochs is None):
            raise GMAIError("train_cfg needs either max_iters or max_epochs")
        if max_epochs is not None:
            whole, packs = divmod(
                math.ceil(round(max_epochs * len(self.sampler), 6)), len(self.sampler)
            )
            return self.iterations_at(whole * self.steps + -(-packs // self.packs_per_step))
        iterations = int(max_iters or 0)
        while not self.step_ends((iterations - 1) % len(self)):
            iterations += 1
        return iterations

    def set_position(self, epoch: int, micro_batch: int) -> None:
        """Begin the next iteration there, without reading what comes before."""
        self.sampler.set_epoch(epoch)
        self._start = micro_batch

    def __iter__(self) -> Iterator[list[PackRef]]:
        start, self._start = self._start, 0
        epoch = self.sampler.epoch
        for micro_batch in range(start, len(self)):
            # A pack of the same step holds a place where none is left for this rank.
            filler = PackRef(epoch, self._step(micro_batch).start, filler=True)
            yield [PackRef(epoch, pack) for pack in self._packs(micro_batch)] or [filler]

    def loss_denominator(self, epoch: int, micro_batch: int) -> float:
        """Return what the weighted sum of this rank's losses is divided by, see ``weighting``.

        DeepSpeed takes the mean over the accumulation and over the ranks, so the sum over the whole step
        is divided by their product here.
        """
        plan = self.sampler.dataset.plan.epoch(epoch)
        if self.weighting == "micro_batch":
            # DeepSpeed's own mean over micro-batches and ranks does the rest, as it does there.
            own = self._packs(micro_batch)
            return float(plan.total("labels")[list(own)].sum()) if own else 1.0
        total = float(np.sum(plan.total(WEIGHTINGS[self.weighting])[self._step(micro_batch)]))
        return total / (self.accumulative_counts * self.world_size)

    def _packs(self, micro_batch: int) -> range:
        """Packs of this rank."""
        across = self.world_size * self.batch_size
        first = micro_batch * across
        return range(first + self.rank, min(first + across, len(self.sampler)), self.world_size)

    def _step(self, micro_batch: int) -> slice:
        """Packs of the whole optimiser step, all ranks."""
        first = micro_batch // self.accumulative_counts * self.packs_per_step
        return slice(first, min(first + self.packs_per_step, len(self.sampler)))
