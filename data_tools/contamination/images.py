# SPDX-License-Identifier: Apache-2.0

"""Images of the two sides that are the same, look the same, or bear the name of the same case."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
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
    """Hashes of the images of a side, 25 bytes each."""

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

    ``exact`` leads to images of the corpus with the same pixels, ``near`` are the closest of the others. Of
    each image of the benchmark ``nearest`` is the least distance (255: none), ``count`` how many are near it.
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
    ours, theirs = (np.flatnonzero(side.state == OK) for side in (corpus, benchmark))
    of_pixels: defaultdict[bytes, list[int]] = defaultdict(list)
    may_be_same = np.isin(corpus.pixels[ours, 0], benchmark.pixels[theirs, 0])
    for image in ours[may_be_same].tolist():
        of_pixels[corpus.pixels[image].tobytes()].append(image)
    same = {n: of_pixels.get(benchmark.pixels[n].tobytes(), []) for n in theirs.tolist()}
    # Equal hashes are looked for once: a corpus may hold an image a thousand times.
    looks, copies = np.unique(corpus.look[ours], return_counts=True)
    asked = np.unique(benchmark.look[theirs])
    pairs, counts = _closest(search(asked, looks, distance=distance), len(asked), weights=copies)
    having = _by_look(corpus, ours, looks[pairs.value])
    asking = _by_look(benchmark, theirs, asked[pairs.query])
    found = Matches.none(len(benchmark.state))
    found.exact = {number: images for number, images in same.items() if images}
    listed = Counter[int]()
    for query, value, bits in zip(*(part.tolist() for part in pairs), strict=True):
        for number in asking[int(asked[query])]:
            copied = set(same[number])
            found.count[number] = counts[query] - len(copied)
            found.nearest[number] = min(found.nearest[number], bits)
            for image in having[int(looks[value])][: CLOSEST + len(copied)]:
                if image not in copied and listed[number] < CLOSEST:
                    found.near.append(Near(number, image, bits))
                    listed[number] += 1
    found.near.sort(key=lambda one: (one.distance, one.theirs, one.ours))
    return found


def _by_look(side: Hashes, numbers: np.ndarray, wanted: np.ndarray) -> dict[int, list[int]]:
    found: defaultdict[int, list[int]] = defaultdict(list)
    for number in numbers[np.isin(side.look[numbers], wanted)].tolist():
        found[int(side.look[number])].append(number)
    return found


def _closest(
    pairs: Iterator[Pairs], queries: int, *, weights: np.ndarray
) -> tuple[Pairs, np.ndarray]:
    """Return the closest values of each query, sorted, and the number of all, by the values' weights.

    At a large distance images of one kind are all near each other; what is held is bounded.
    """
    counts = np.zeros(queries, dtype=np.int64)
    parts = [Pairs(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.uint8)))]
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
    query, value, distance = map(np.concatenate, zip(*parts, strict=True))
    order = np.lexsort((value, distance, query))
    query = query[order]
    # One more than are listed: the first may be the same pixels.
    kept = np.arange(len(query)) - np.searchsorted(query, query) <= CLOSEST
    return Pairs(query[kept], value[order][kept], distance[order][kept])


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
