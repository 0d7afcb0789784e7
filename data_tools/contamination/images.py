# SPDX-License-Identifier: Apache-2.0

"""Images of the two sides that are the same, look the same, or bear the name of the same case."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from data_tools.contamination.hashing import MISSING, OK, PLAIN, UNREADABLE, Hashed
from gmai_xtuner.core.hamming import Pairs, search

LEVELS = (0, 4, 8, 16)
CLOSEST = 5
"""Near images of the corpus that are listed for an image of the benchmark; all are counted."""

_HELD = 4_000_000  # pairs


class Hashes:
    """Hashes of a side's images, 25 bytes each.

    Args:
        size: number of images.
    """

    def __init__(self, size: int) -> None:
        self.state = np.zeros(size, dtype=np.uint8)
        self.look = np.zeros(size, dtype=np.uint64)
        self.pixels = np.zeros((size, 2), dtype=np.uint64)

    def put(self, number: int, hashed: Hashed) -> None:
        self.state[number] = hashed.state
        self.look[number] = hashed.look
        if hashed.pixels:
            self.pixels[number] = np.frombuffer(hashed.pixels, dtype=np.uint64)

    def counts(self) -> dict[str, int]:
        names = {"read": OK, "plain": PLAIN, "unreadable": UNREADABLE, "missing": MISSING}
        return {name: int((self.state == state).sum()) for name, state in names.items()}


@dataclass(frozen=True, slots=True)
class Near:
    """An image of the benchmark and one of the corpus that looks like it, ``distance`` bits apart."""

    theirs: int
    ours: int
    distance: int


@dataclass(slots=True)
class Matches:
    """Images of the benchmark that are in the corpus; made by `compare`.

    Args:
        exact: images of the benchmark -> those of the corpus with the same pixels.
        near: the closest of the others, by distance.
        nearest: distance of each image of the benchmark to the closest one of the corpus; 255: none.
        count: how many of the corpus are near it, the same ones not counted.
    """

    exact: dict[int, list[int]]
    near: list[Near]
    nearest: np.ndarray
    count: np.ndarray

    @classmethod
    def none(cls, size: int) -> Matches:
        """Return the matches of ``size`` images that are like no other."""
        return cls({}, [], np.full(size, 255, dtype=np.uint8), np.zeros(size, dtype=np.int64))

    def within(self, distance: int) -> int:
        """Return how many images of the benchmark have one of the corpus at most so many bits away."""
        return int((self.nearest <= distance).sum())


def compare(benchmark: Hashes, corpus: Hashes, *, distance: int) -> Matches:
    """Find the images that are on both sides, or look the same: at most ``distance`` bits apart.

    Those of one grey level are compared with none.
    """
    ours = np.flatnonzero(corpus.state == OK)
    theirs = np.flatnonzero(benchmark.state == OK)
    exact = _exact(benchmark.pixels[theirs], corpus.pixels[ours], theirs, ours)
    # Equal hashes are looked for once: a corpus may hold an image a thousand times.
    looks, asked = (np.unique(side) for side in (corpus.look[ours], benchmark.look[theirs]))
    by_look = ours[np.argsort(corpus.look[ours], kind="stable")]
    starts = np.searchsorted(corpus.look[by_look], looks)
    ends = np.append(starts[1:], len(by_look))
    by_question = theirs[np.argsort(benchmark.look[theirs], kind="stable")]
    first = np.searchsorted(benchmark.look[by_question], asked)
    last = np.append(first[1:], len(by_question))
    nearest = np.full(len(benchmark.state), 255, dtype=np.uint8)
    count = np.zeros(len(benchmark.state), dtype=np.int64)
    near: list[Near] = []
    pairs, counts = _closest(
        search(asked, looks, distance=distance), len(asked), weights=ends - starts
    )
    for query, values, distances in _by_query(pairs):
        for number in by_question[first[query] : last[query]].tolist():
            same = set(exact.get(number, ()))
            listed = 0
            count[number] = counts[query] - len(same)
            for value, bits in zip(values.tolist(), distances.tolist(), strict=True):
                nearest[number] = min(nearest[number], bits)
                for image in by_look[starts[value] : ends[value]][: CLOSEST + len(same)].tolist():
                    if image not in same and listed < CLOSEST:
                        near.append(Near(number, image, bits))
                        listed += 1
    near.sort(key=lambda one: (one.distance, one.theirs, one.ours))
    return Matches(exact, near, nearest, count)


def _exact(
    benchmark: np.ndarray, corpus: np.ndarray, theirs: np.ndarray, ours: np.ndarray
) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    order = np.argsort(corpus[:, 0], kind="stable")
    keys = corpus[order, 0]
    left = np.searchsorted(keys, benchmark[:, 0], side="left")
    right = np.searchsorted(keys, benchmark[:, 0], side="right")
    for row in np.flatnonzero(right > left).tolist():
        candidates = order[left[row] : right[row]]
        same = candidates[corpus[candidates, 1] == benchmark[row, 1]]
        if len(same):
            found[int(theirs[row])] = sorted(ours[same].tolist())
    return found


def _closest(
    pairs: Iterator[Pairs], queries: int, *, weights: np.ndarray
) -> tuple[Pairs, np.ndarray]:
    """Return the closest values of each query, sorted, and the number of all, by the values' weights.

    At a large distance images of one kind are all near each other; what is held is bounded.
    """
    counts = np.zeros(queries, dtype=np.int64)
    kinds = (np.int64, np.int64, np.uint8)
    parts = [Pairs(*(np.zeros(0, dtype=kind) for kind in kinds))]
    held = 0
    for part in pairs:
        np.add.at(counts, part.query, weights[part.value])
        parts.append(part)
        held += len(part.query)
        if held > _HELD:
            parts = [_first_few(parts)]
            held = len(parts[0].query) // 2  # or few queries with many values would sort each time
    return _first_few(parts), counts


def _first_few(parts: Sequence[Pairs]) -> Pairs:
    query, value, distance = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("query", "value", "distance")
    )
    order = np.lexsort((value, distance, query))
    query, value, distance = query[order], value[order], distance[order]
    # One more than are listed: the first may be the same pixels.
    place = np.arange(len(query)) - np.searchsorted(query, query)
    kept = place <= CLOSEST
    return Pairs(query[kept], value[kept], distance[kept])


def _by_query(pairs: Pairs) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    if not len(pairs.query):
        return
    starts = np.flatnonzero(np.append(True, np.diff(pairs.query) != 0))
    ends = np.append(starts[1:], len(pairs.query))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield int(pairs.query[start]), pairs.value[start:end], pairs.distance[start:end]


def case_of(name: str) -> str:
    """Return the part of a file name that names its case: the last that is no mere number or word; or "".

    ``synpic54610.jpg`` -> ``synpic54610``, ``xmlab102/source.jpg`` -> ``xmlab102``, ``images/17.png`` -> "".
    """
    path = PurePosixPath(name.replace("\\", "/"))
    for part in (path.stem, *reversed(path.parent.parts)):
        if names_case(part):
            return part.casefold()
    return ""


def names_case(part: str) -> bool:
    """Return whether two files of this name are likely to be of the same case: letters and digits."""
    return re.fullmatch(r"\d{6,}|(?=.*\d\d)(?=.*[^\W\d_]).{6,}", part, re.DOTALL) is not None


def by_case(names: Sequence[str], cases: Sequence[str]) -> dict[str, list[int]]:
    """Return case -> images; the case that is named, or that the file's name tells."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for number, (name, case) in enumerate(zip(names, cases, strict=True)):
        for key in {case.casefold() if names_case(case) else "", case_of(name)} - {""}:
            found[key].append(number)
    return dict(found)
