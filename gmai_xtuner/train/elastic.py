# SPDX-License-Identifier: Apache-2.0

"""A checkpoint under another number of ranks or another ZeRO stage: each rank reads its part, nothing more.

ZeRO-1 and 2 lay the parameters of a group end to end and give each rank an equal part of that; ZeRO-3 gives
each rank an equal part of every parameter. Adam's moments lie as the fp32 weights do. Both are read by
parameter, so that any of them can be resumed as any other, memory-mapped and without a copy on disk.

DeepSpeed 0.16.2's own ways do not serve: ``elastic_checkpoint`` is refused by ZeRO-3, and by
``_load_zero_checkpoint`` (``engine.py``) for another number of ranks; ``ds_to_universal`` copies the whole
checkpoint, of which ZeRO-3 reads one group of parameters, by the rank within the machine
(``stage3.py``, ``load_hp_checkpoint_state``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank

from gmai_xtuner.checkpoint.training import first_rank_file
from gmai_xtuner.checkpoint.weights import read_training_state
from gmai_xtuner.core.errors import GMAIError

WEIGHTS = "fp32"
Piece = tuple[str | None, int, int]
"""Elements of a parameter, from and to; without a name: zeros, which pad a part."""


class SavedOptimizer:
    """The optimiser's state in a checkpoint folder, by parameter, whatever ranks and stage wrote it.

    Raises:
        GMAIError: the state lies in a way that is not known here.
    """

    def __init__(self, checkpoint: Path) -> None:
        file = first_rank_file(checkpoint)
        assert file is not None
        state = read_training_state(file, mmap=True)
        zero = state["ds_config"]["zero_optimization"]
        if zero.get("round_robin_gradients"):
            raise GMAIError(
                f"{checkpoint} was written with zero_optimization.round_robin_gradients, which orders the "
                "parameters by the number of GPUs. Resume it with as many GPUs and the ZeRO stage that it "
                "began with"
            )
        self.checkpoint, self.version = checkpoint, state["ds_version"]
        self.by_parameter = zero["stage"] == 3
        self.shards = [self._shard(rank) for rank in range(state["dp_world_size"])]
        self.base = [
            one["optimizer_state_dict" if self.by_parameter else "base_optimizer_state"]
            for one in self.shards
        ]
        self.groups: list[dict[str, Any]] = self.base[0]["param_groups"]
        self.places: dict[str, tuple[int, int, int]] = {}
        """Name -> group, first element in what a rank (ZeRO-3) or the group has, number of elements."""
        offset = 0
        for group, shapes in enumerate(state["param_shapes"]):
            offset = offset if self.by_parameter else 0
            for name, shape in shapes.items():
                self.places[name] = (group, offset, math.prod(shape))
                offset += self._part(math.prod(shape)) if self.by_parameter else math.prod(shape)
        first: dict[str, Any] = self.base[0]["state"][0]
        flat = {key for key, value in first.items() if getattr(value, "ndim", 0)}
        self.alike = {key: value for key, value in first.items() if key not in flat}
        """What is the same for all weights, such as Adam's number of steps."""
        self._tensors = {key: self._joined(key) for key in (WEIGHTS, *sorted(flat))}

    def _shard(self, rank: int) -> dict[str, Any]:
        (file,) = self.checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt")
        return read_training_state(file, mmap=True)["optimizer_state_dict"]

    def _part(self, elements: int) -> int:
        return -(-elements // len(self.shards))

    def _joined(self, key: str) -> list[Joined]:
        name = "fp32_flat_groups" if self.by_parameter else "single_partition_of_fp32_groups"
        by_rank = [
            shard[name]
            if key == WEIGHTS
            else [base["state"][number][key] for number in sorted(base["state"])]
            for shard, base in zip(self.shards, self.base, strict=True)
        ]
        if any(tensor.dtype != torch.float32 for tensor in itertools.chain(*by_rank)):
            raise GMAIError(
                f"the optimiser's {key} in {self.checkpoint} is not fp32, and can't be divided among other "
                "GPUs. Resume it with as many GPUs and the ZeRO stage that it began with"
            )
        ends = by_rank if self.by_parameter else zip(*by_rank, strict=True)
        return [Joined(tensors) for tensors in ends]

    @property
    def keys(self) -> list[str]:
        """Names of the states that lie as the weights do, these among them."""
        return list(self._tensors)

    def read(self, key: str, pieces: Sequence[Piece]) -> torch.Tensor:
        """Return a copy of elements of parameters, end to end.

        Raises:
            GMAIError: the checkpoint has not trained one of them.
        """
        return torch.cat([part for piece in pieces for part in self._read(key, *piece)])

    def _read(self, key: str, name: str | None, start: int, stop: int) -> Iterator[torch.Tensor]:
        if name is None:
            yield torch.zeros(stop - start)
            return
        if name not in self.places:
            raise GMAIError(
                f"{self.checkpoint} has not trained {name}, which this config trains. Resume with the config "
                "that the run began with"
            )
        (group, offset, elements), tensors = self.places[name], self._tensors[key]
        if not self.by_parameter:
            yield tensors[group].take(offset + start, offset + stop)
            return
        part = self._part(elements)
        for rank in range(start // part, -(-stop // part)):
            before = rank * part
            first, last = max(start, before), min(stop, before + part)
            yield tensors[rank].take(offset + first - before, offset + last - before)


class Joined:
    """Tensors of one dimension, seen as if they were joined."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self.ends = list(itertools.accumulate(tensor.numel() for tensor in tensors))

    def take(self, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start <= stop <= self.ends[-1], (start, stop, self.ends)
        return torch.cat(
            [
                tensor[max(0, start - end + tensor.numel()) : max(0, stop - end + tensor.numel())]
                for tensor, end in zip(self.tensors, self.ends, strict=True)
            ]
        )


def own_pieces(engine: Any, rank: int) -> list[list[Piece]]:
    """Return what each flat tensor of fp32 weights of a ZeRO optimiser holds on a rank."""
    optimizer, names = engine.optimizer, engine.param_names
    if engine.zero_optimization_partition_weights():
        return [
            [piece for one in group for piece in _part_of(names[one], one, rank)]
            for group in optimizer.fp16_groups
        ]
    found: list[list[Piece]] = []
    weights = optimizer.single_partition_of_fp32_groups
    for group, flat in zip(optimizer.round_robin_bit16_groups, weights, strict=True):
        first = rank * flat.numel()
        pieces: list[Piece] = []
        offset = 0
        for parameter in group:
            start = max(0, first - offset)
            stop = min(parameter.numel(), first + flat.numel() - offset)
            if start < stop:
                pieces.append((names[parameter], start, stop))
            offset += parameter.numel()
        held = sum(stop - start for _, start, stop in pieces)
        found.append([*pieces, (None, 0, flat.numel() - held)])
    return found


def _part_of(name: str, parameter: Any, rank: int) -> list[Piece]:
    part, elements = parameter.partition_numel(), parameter.ds_numel
    start, stop = (min(elements, number * part) for number in (rank, rank + 1))
    return [(name, start, stop), (None, 0, part - (stop - start))]


@contextmanager
def read_in_another_layout(engine: Any, checkpoint: Path) -> Iterator[None]:
    """Let ``engine.load_checkpoint`` take a folder that other ranks or another ZeRO stage have written.

    Raises:
        GMAIError: its optimiser's state can't be divided anew, or is of other parameters.
    """
    saved = SavedOptimizer(checkpoint)

    def load_module_state_dict(checkpoint: dict[str, Any], **_: Any) -> None:
        # What learns comes from the fp32 weights.
        module = checkpoint["module"]
        rest = {name: value for name, value in module.items() if name not in saved.places}
        engine.module.load_state_dict(rest, strict=False)

    def load_zero_checkpoint(*_: Any, **__: Any) -> bool:
        load_optimizer(engine, saved)
        return True

    replaced = {
        "_get_all_ckpt_names": lambda *_: [str(first_rank_file(checkpoint))],
        "load_module_state_dict": load_module_state_dict,
        "_load_zero_checkpoint": load_zero_checkpoint,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            setattr(engine, name, function)
            stack.callback(delattr, engine, name)
        yield


def load_optimizer(engine: Any, saved: SavedOptimizer) -> None:
    """Fill this rank's fp32 weights and moments, and the model's weights from them."""
    optimizer, rank = engine.optimizer, get_rank()
    by_parameter = engine.zero_optimization_partition_weights()
    if engine.zero_round_robin_gradients():
        raise GMAIError(
            "zero_optimization.round_robin_gradients orders the parameters by the number of GPUs: with it a "
            "run can't go on from a checkpoint of another layout. Remove it from the DeepSpeed file"
        )
    if by_parameter:
        optimizer._set_fp32_optimizer_param_groups()
    own = optimizer.optimizer.state_dict()["param_groups"]
    if by_parameter:
        optimizer._clear_fp32_optimizer_param_groups()
    groups = [{**old, "params": new["params"]} for old, new in zip(saved.groups, own, strict=True)]
    flats = [
        {key: saved.read(key, pieces) for key in saved.keys} for pieces in own_pieces(engine, rank)
    ]
    weights = [flat.pop(WEIGHTS) for flat in flats]
    # Each its own number of steps: torch counts it up in place.
    state = {number: {**deepcopy(saved.alike), **flat} for number, flat in enumerate(flats)}
    base = {"state": state, "param_groups": groups}
    layout = {"single_partition_of_fp32_groups": weights, "base_optimizer_state": base}
    if by_parameter:
        layout = {"fp32_flat_groups": weights, "optimizer_state_dict": base}
    optimizer.load_state_dict(
        {rank: {**saved.shards[0], "ds_version": saved.version, **layout}},
        load_optimizer_states=True,
        load_from_fp32_weights=True,
    )
    if not by_parameter:
        optimizer.update_lp_params()
