# SPDX-License-Identifier: Apache-2.0

"""A plan of packs that uses up all lengths evenly.

The mix of packs is found first. Draw full packs at random, a pack with the lengths ``l1, l2, ...`` having a
probability in proportion to ``w[l1] * w[l2] * ...``, and choose the weights ``w`` such that on average each
length is drawn as often as it occurs: the mix of maximum entropy that uses up everything. Its sums over all
packs are those of the partitions of an integer::

    Z[r] = sum over all multisets of lengths with total r of their product of weights

(one pass over the kinds), and the weights follow by iterative scaling (Darroch and Ratcliff, "Generalized
iterative scaling for log-linear models", Ann. Math. Stat. 43(5), 1972). Then the kinds are dealt, longest
first, to the open packs in the proportions that the mix says; what rounding leaves goes where it fits best.
All its arithmetic is elementwise, without library sums, powers or products of matrices, so that IEEE machines
agree on every bit and thus on the plan.

Shapes of balanced fit: ``C`` max_length, ``K`` kinds, ascending in length.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

_ITERATIONS = 80
"""Steps of iterative scaling at most."""
_CLOSE_ENOUGH = 1e-3
"""Share of the wanted uses by which the expected ones may differ, at which scaling ends."""
_MOVES = 50_000
"""Conversations that are put into packs one by one; of more, several are put together."""
_LARGEST_TABLE = 2**24
"""Numbers in a table of ``Z`` for all kinds, at most: 128 MiB."""


# What a chain of packs holds: (the chain before, the kind put on it), or None for an empty pack.
_Chain = tuple["_Chain", int] | None


@dataclass(slots=True)
class Pattern:
    """``count`` packs with the same content: (kind, how many of it) in the order of packing."""

    content: list[tuple[int, int]]
    count: int


def balanced_fit(
    lengths: np.ndarray, counts: np.ndarray, *, max_length: int
) -> list[Pattern] | None:
    """Return patterns that use up all lengths evenly and hold every conversation once.

    Args:
        lengths: int ``[K]``, ascending, each in 1..max_length.
        counts: int ``[K]``, conversations of each length.
        max_length: tokens of a pack.

    Returns:
        the patterns, whose kinds are indices into ``lengths``, or ``None`` where the mix can't be computed
        (packs so long that the tables would not fit, or weights beyond the range of a float).
    """
    if (max_length + 1) * len(lengths) > _LARGEST_TABLE:
        return None
    found = _weights(lengths, counts, max_length)
    if found is None:
        return None
    weights, number_of_packs = found
    packs = _OpenPacks(max_length, number_of_packs)
    tables = np.empty((len(lengths), max_length + 1))
    _sums(lengths, weights, max_length, tables=tables)
    granule = max(1, int(counts.sum()) // _MOVES)  # conversations that are put together
    for kind in range(len(lengths) - 1, -1, -1):
        length, left = int(lengths[kind]), int(counts[kind])
        moves = _proportions(packs.open, tables[kind], float(weights[kind]), length)
        for room, number in _rounded(moves, left, max(1, min(granule, left // 16))):
            put = min(number, packs.number(room), left)
            packs.put(kind, length, room, put)
            left -= put
        packs.put_where_it_fits_best(kind, length, left)
    return packs.patterns()


def _sums(
    lengths: np.ndarray, weights: np.ndarray, max_length: int, *, tables: np.ndarray | None = None
) -> np.ndarray:
    """``Z`` of the module, float64 ``[C + 1]``; a token left empty has the weight 1/2.

    ``tables``, float64 ``[K, C + 1]``, is filled with ``Z`` for the lengths up to and with each kind.
    """
    sums = np.ldexp(1.0, -np.arange(max_length + 1))
    for kind, (length, weight) in enumerate(zip(lengths.tolist(), weights.tolist(), strict=True)):
        # sums[r] += weight * sums[r - length] in rising order, `length` places at a time.
        for start in range(length, len(sums), length):
            end = min(start + length, len(sums))
            sums[start:end] += weight * sums[start - length : end - length]
        if tables is not None:
            tables[kind] = sums
    return sums


def _weights(
    lengths: np.ndarray, counts: np.ndarray, max_length: int
) -> tuple[np.ndarray, int] | None:
    """Find weights ``[K]`` that draw each length as often as it occurs, and the number of packs."""
    tokens = int((lengths * counts).sum())
    wanted = counts * (max_length / tokens)  # of each kind in a pack, if packs were full
    weights = counts / int(counts.sum())
    best: tuple[float, np.ndarray, np.ndarray] | None = None  # error, weights, expected / wanted
    halvings = 1  # a step is the ratio to the power of 1/2, 1/4, ...: a larger one may swing
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(_ITERATIONS):
            expected = _expected_uses(lengths, weights, _sums(lengths, weights, max_length))
            ratio = wanted / expected
            error = math.inf
            if np.isfinite(ratio).all():
                error = math.fsum(np.abs(expected - wanted).tolist()) / math.fsum(wanted.tolist())
            if best is None or error < best[0]:
                best = error, weights, expected
            else:  # the step was too large: back to the best, and from there with half of the exponent
                halvings += 1
                error, weights, expected = best
                ratio = wanted / expected
            if not error > _CLOSE_ENOUGH or error == math.inf:
                break
            step = np.clip(ratio, 1 / 16, 16)
            for _ in range(halvings):
                step = np.sqrt(step)
            weights = weights * step
    assert best is not None
    error, weights, expected = best
    filled = math.fsum((expected * lengths).tolist()) if error < math.inf else 0.0
    return (weights, math.ceil(tokens / filled)) if filled > 0 else None


def _expected_uses(lengths: np.ndarray, weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return how many of each kind a random full pack holds, float64 ``[K]``."""
    max_length = len(sums) - 1
    expected = np.zeros(len(lengths))
    power = np.ones(len(lengths))
    for times in range(1, max_length // int(lengths[0]) + 1):
        fitting = int(np.searchsorted(lengths * times, max_length, side="right"))
        power = power[:fitting] * weights[:fitting]
        expected[:fitting] += power * sums[max_length - times * lengths[:fitting]]
    return expected / sums[max_length]


def _proportions(
    open_packs: np.ndarray, sums: np.ndarray, weight: float, length: int
) -> np.ndarray:
    """Return how many of the packs with each room get one of this kind in the mix, float64 ``[C + 1]``.

    A pack that has just taken one may take another, so rooms are looked at from the largest down.
    """
    size = len(sums)
    share = np.zeros(size)
    np.divide(
        weight * sums[: size - length], sums[length:], out=share[length:], where=sums[length:] > 0
    )
    moves = np.zeros(size + length)
    for top in range(size - 1, length - 1, -length):
        rooms = slice(max(length, top - length + 1), top + 1)
        arrived = moves[rooms.start + length : rooms.stop + length]
        moves[rooms] = share[rooms] * (open_packs[rooms] + arrived)
    return moves[:size]


def _rounded(moves: np.ndarray, left: int, granule: int) -> list[tuple[int, int]]:
    """(room, number) from the largest room down; whole granules, whose sum strays by less than one."""
    total = np.cumsum(moves[::-1])  # one after the other, unlike a sum
    if total[-1] <= 0:
        return []
    scale = min(1.0, left / total[-1])
    steps = np.diff(np.floor(total * (scale / granule) + 0.5), prepend=0.0)
    places = np.flatnonzero(steps)
    top = len(moves) - 1
    return [(top - int(place), int(steps[place]) * granule) for place in places]


class _OpenPacks:
    """Packs by room, as chains of kinds with how many packs each stands for."""

    def __init__(self, max_length: int, number: int) -> None:
        self.max_length = max_length
        self.open = np.zeros(max_length + 1, dtype=np.int64)
        self._chains: dict[int, list[tuple[_Chain, int]]] = defaultdict(list)
        self._add(max_length, None, number)

    def number(self, room: int) -> int:
        return int(self.open[room])

    def _add(self, room: int, chain: _Chain, number: int) -> None:
        if number:
            self._chains[room].append((chain, number))
            self.open[room] += number

    def put(self, kind: int, length: int, room: int, number: int) -> None:
        """One conversation of the kind into each of ``number`` packs with this room."""
        while number:
            chain, packs = self._chains[room].pop()
            taken = min(packs, number)
            if packs > taken:
                self._chains[room].append((chain, packs - taken))
            self.open[room] -= taken
            self._add(room - length, (chain, kind), taken)
            number -= taken

    def put_where_it_fits_best(self, kind: int, length: int, number: int) -> None:
        while number:
            fitting = np.flatnonzero(self.open[length:])
            if not len(fitting):
                self._add(self.max_length, None, number)
                continue
            room = length + int(fitting[0])
            put = min(number, self.number(room))
            self.put(kind, length, room, put)
            number -= put

    def patterns(self) -> list[Pattern]:
        """Everything that is not empty."""
        found = []
        for chain, packs in itertools.chain.from_iterable(self._chains.values()):
            content: Counter[int] = Counter()
            while chain is not None:
                chain, kind = chain
                content[kind] += 1
            if content:
                found.append(Pattern(list(content.items()), packs))
        return found
