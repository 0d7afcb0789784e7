# SPDX-License-Identifier: Apache-2.0

"""The search against comparing all with all, by Python's own integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmai_xtuner.core import hamming
from gmai_xtuner.core.hamming import cheapest, close_pairs, search


def found(queries: np.ndarray, values: np.ndarray, **options) -> list[tuple[int, int, int]]:
    return sorted(
        pair
        for part in search(queries, values, **options)
        for pair in zip(
            part.query.tolist(), part.value.tolist(), part.distance.tolist(), strict=True
        )
    )


def expected(queries: np.ndarray, values: np.ndarray, distance: int) -> list[tuple[int, int, int]]:
    return [
        (q, v, (one ^ other).bit_count())
        for q, one in enumerate(queries.tolist())
        for v, other in enumerate(values.tolist())
        if (one ^ other).bit_count() <= distance
    ]


def near_values(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """Hashes 0 to 20 bits from one of the centres."""
    picked = rng.choice(centres, count)
    for number in range(count):
        bits = rng.choice(64, rng.integers(0, 21), replace=False)
        picked[number] ^= np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=0)
    return picked


@pytest.mark.parametrize("pieces", [0, 3, 4, 5, 9])
@pytest.mark.parametrize("distance", [0, 4, 8])
def test_every_way_finds_what_comparing_all_finds(pieces: int, distance: int) -> None:
    rng = np.random.default_rng([pieces, distance])
    queries = rng.integers(0, 2**64, 60, dtype=np.uint64)
    values = np.concatenate(
        [near_values(rng, queries, 900), rng.integers(0, 2**64, 300, dtype=np.uint64)]
    )
    told = expected(queries, values, distance)
    assert len(told) > 30 * (distance + 1)
    assert found(queries, values, distance=distance, pieces=pieces) == told


def test_candidates_beyond_what_is_held_at_once_are_all_looked_at(monkeypatch) -> None:
    monkeypatch.setattr(hamming, "_CANDIDATES_AT_ONCE", 7)
    monkeypatch.setattr(hamming, "_ROWS", 3)
    monkeypatch.setattr(hamming, "_COLUMNS", 5)
    rng = np.random.default_rng(1)
    queries = rng.integers(0, 4, 9, dtype=np.uint64)
    values = rng.integers(0, 4, 40, dtype=np.uint64)
    for pieces in (0, 3):
        assert found(queries, values, distance=1, pieces=pieces) == expected(queries, values, 1)


def test_nothing_to_compare() -> None:
    none, one = np.zeros(0, dtype=np.uint64), np.ones(1, dtype=np.uint64)
    assert found(none, one, distance=8) == found(one, none, distance=8) == []


def test_the_way_depends_on_the_sizes() -> None:
    assert cheapest(10, 100, 8) == 0
    assert cheapest(100_000, 1_000_000, 8) == 3
    assert cheapest(100_000, 1_000_000, 16) == 0


# --- pairs within one collection -------------------------------------------------


@st.composite
def close_hashes(draw: st.DrawFn) -> list[int]:
    """Hashes of which many are a few bits from another."""
    values = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6))
    for _ in range(draw(st.integers(0, 14))):
        flipped = draw(st.lists(st.integers(0, 63), max_size=6, unique=True))
        values.append(draw(st.sampled_from(values)) ^ sum(1 << bit for bit in flipped))
    return values


@given(close_hashes(), st.integers(0, 4))
def test_pairs_link_exactly_what_comparing_all_links(values, distance):
    found = list(close_pairs(np.array(values, dtype=np.uint64), distance=distance))
    assert len({frozenset(pair) for pair in found}) == len(found)
    assert all((values[one] ^ values[other]).bit_count() <= distance for one, other in found)
    near = [
        (n, m)
        for n in range(len(values))
        for m in range(n)
        if (values[n] ^ values[m]).bit_count() <= distance
    ]
    assert sets(len(values), found) == sets(len(values), near)


def sets(size: int, links: list[tuple[int, int]]) -> set[frozenset[int]]:
    """Connected sets, by repeated merging."""
    member = [{n} for n in range(size)]
    for one, other in links:
        merged = member[one] | member[other]
        for n in merged:
            member[n] = merged
    return {frozenset(one) for one in member}


def test_many_equal_hashes_are_a_chain_not_all_pairs():
    values = np.full(20_000, 7, dtype=np.uint64)
    assert sum(1 for _ in close_pairs(values, distance=4)) == 19_999
