# SPDX-License-Identifier: Apache-2.0

"""64-bit hashes that differ in few bits, found without comparing all with all.

Multi-index hashing (Norouzi, Punjani and Fleet, "Fast search in Hamming space with multi-index hashing", CVPR
2012): hashes at most ``d`` bits apart, cut into ``m`` pieces, have a piece in which they differ in ``d // m``
bits or fewer. So each piece has a table of the values, in which the query's piece is looked up with all these
bits turned. For a large distance or a short list comparing all is faster; the costs are estimated and the
cheaper way is taken. Both give the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

_WIDEST = 22
"""Bits of a piece: a table of 2**22 places is 16 MB and stays in the cache of a large processor."""

# Nanoseconds, measured on one core with numpy 2: one place of a table, one candidate, one comparison.
_LOOK_UP, _CANDIDATE, _COMPARISON = 18.0, 11.0, 2.6
_CANDIDATES_AT_ONCE = 2**21
_ROWS, _COLUMNS = 64, 8192  # of a block that is compared whole: 4 MB


class Pairs(NamedTuple):
    """Positions of queries and values that are close.

    ``query`` and ``value`` int64, ``distance`` uint8, all ``[pairs]``.
    """

    query: np.ndarray
    value: np.ndarray
    distance: np.ndarray


def search(
    queries: np.ndarray, values: np.ndarray, *, distance: int, pieces: int | None = None
) -> Iterator[Pairs]:
    """Yield all pairs at most ``distance`` bits apart, each once, in no particular order, some at a time.

    ``queries`` and ``values`` are uint64 ``[n]``, the values the longer ones, better without repetitions.
    They are cut into so many ``pieces``; 0 compares all with all; default: whatever is cheapest.
    """
    if not len(queries) or not len(values):
        return
    if pieces is None:
        pieces = cheapest(len(queries), len(values), distance)
    if pieces == 0:
        yield from _compare_all(queries, values, distance)
    else:
        yield from _look_up(queries, values, distance, pieces)


def close_pairs(values: np.ndarray, *, distance: int) -> Iterator[tuple[int, int]]:
    """Yield positions of hashes (uint64 ``[n]``) at most ``distance`` bits apart, each pair once.

    Equal hashes are paired as a chain, not each with each: a thousand blank images are 999 pairs.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(values)]
    again = np.flatnonzero(~is_first)
    yield from zip(order[again - 1].tolist(), order[again].tolist(), strict=True)
    if not distance:
        return
    distinct, positions = ordered[is_first], order[is_first]
    for part in search(distinct, distinct, distance=distance):
        once = part.query < part.value
        one, other = positions[part.query[once]], positions[part.value[once]]
        yield from zip(one.tolist(), other.tolist(), strict=True)


def bits_set(values: np.ndarray) -> np.ndarray:
    """Return how many bits of each value are set, uint8."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(values)
    as_bytes = values[..., None].view(np.uint8)
    return np.unpackbits(as_bytes, axis=-1).sum(axis=-1, dtype=np.uint8)


def cheapest(queries: int, values: int, distance: int) -> int:
    """Return the number of pieces that costs least; 0: comparing all with all does."""
    costs = {0: _COMPARISON * queries * values / _threads()}
    for pieces in range(3, 17):
        turned, width = distance // pieces, 64 // pieces
        places = pieces * sum(comb(width + 1, bits) for bits in range(turned + 1))
        costs[pieces] = queries * (places * _LOOK_UP + places * values / 2**width * _CANDIDATE)
        costs[pieces] += pieces * (values * 120.0 + 2.0**width)  # sorting, the table
    return min(costs, key=lambda pieces: costs[pieces])


def _look_up(
    queries: np.ndarray, values: np.ndarray, distance: int, pieces: int
) -> Iterator[Pairs]:
    edges = np.linspace(0, 64, pieces + 1).astype(int).tolist()
    turned = distance // pieces
    for number in range(pieces):
        low, width = edges[number], edges[number + 1] - edges[number]
        if width > _WIDEST:
            raise ValueError(f"{pieces} pieces are too few: a piece would have {width} bits")
        piece_of_value = _piece(values, low, width)
        order = np.argsort(piece_of_value, kind="stable")
        ordered = values[order]
        ends = np.zeros(2**width + 1, dtype=np.int64)
        np.cumsum(np.bincount(piece_of_value, minlength=2**width), out=ends[1:])
        ends = ends.astype(np.int32) if len(values) < 2**31 else ends
        del piece_of_value
        piece_of_query = _piece(queries, low, width)
        # Queries in the order of their piece: places that are looked up one after the other are near.
        by_piece = np.argsort(piece_of_query, kind="stable")
        near = piece_of_query[by_piece]
        for mask in _masks(width, turned):
            keys = near ^ mask
            start = ends[keys]
            count = ends[keys + 1] - start
            hit = np.flatnonzero(count)
            for left, row in _expanded(by_piece[hit], start[hit], count[hit]):
                apart = queries[left] ^ ordered[row]
                bits = bits_set(apart)
                close = np.flatnonzero(bits <= distance)
                if not len(close):
                    continue
                left, row, bits, apart = left[close], row[close], bits[close], apart[close]
                fresh = np.ones(len(close), dtype=bool)
                for earlier in range(number):  # found by an earlier piece already
                    span = edges[earlier + 1] - edges[earlier]
                    fresh &= bits_set(_piece(apart, edges[earlier], span)) > turned
                if fresh.any():
                    yield Pairs(left[fresh], order[row[fresh]], bits[fresh].astype(np.uint8))


def _piece(values: np.ndarray, low: int, width: int) -> np.ndarray:
    return ((values >> np.uint64(low)) & np.uint64((1 << width) - 1)).astype(np.int64)


def _masks(width: int, turned: int) -> Iterator[int]:
    for count in range(turned + 1):
        for bits in combinations(range(width), count):
            yield sum(1 << bit for bit in bits)


def _expanded(
    queries: np.ndarray, start: np.ndarray, count: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield query and row of every candidate, a bounded number at once."""
    ends = np.cumsum(count, dtype=np.int64)
    first = 0
    while first < len(queries):
        begun = int(ends[first] - count[first])
        last = int(np.searchsorted(ends, begun + _CANDIDATES_AT_ONCE, side="right"))
        last = max(last, first + 1)
        part = slice(first, last)
        counts = count[part].astype(np.int64)
        row = np.arange(counts.sum()) + np.repeat(
            start[part] - (ends[part] - counts - begun), counts
        )
        yield np.repeat(queries[part], counts), row
        first = last


def _compare_all(queries: np.ndarray, values: np.ndarray, distance: int) -> Iterator[Pairs]:
    def block(row: int) -> list[Pairs]:
        found = []
        some = queries[row : row + _ROWS, None]
        for column in range(0, len(values), _COLUMNS):
            bits = bits_set(some ^ values[None, column : column + _COLUMNS])
            close = np.flatnonzero(bits.ravel() <= distance)
            if len(close):
                left, right = np.divmod(close, bits.shape[1])
                apart = bits.ravel()[close].astype(np.uint8)
                found.append(Pairs(left + row, right + column, apart))
        return found

    with ThreadPoolExecutor(_threads()) as pool:  # numpy computes outside of the interpreter's lock
        for found in pool.map(block, range(0, len(queries), _ROWS)):
            yield from found


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)))
