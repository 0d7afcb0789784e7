# SPDX-License-Identifier: Apache-2.0

"""Split of the records: held out are whole patients, cases, videos or slides, and no image on both sides.

A record's ``provenance.group`` is hashed with the job's seed; below the share asked for, the group is held
out. So more data leaves the side of a group as it was. Groups that share a stored image (it is stored
by its content: the same name is the same image), or near-identical ones if asked for, are linked, and
linked groups are held out if any of them is by its own hash: what has been held out once stays so.

A million records cost 16 MB: two 64-bit hashes each. Should two names have the same hash, their groups
are linked; that is harmless.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np


class Hasher:
    """Text -> 64 bits, with the seed."""

    def __init__(self, seed: int) -> None:
        self._key = str(seed).encode()

    def __call__(self, text: str) -> int:
        digest = blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=8, key=self._key
        ).digest()
        return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class Split:
    """Sides of all groups: held out or not.

    ``moved`` are the hashes of groups that are held out by a link only; ``groups`` counts the groups,
    ``linked`` those that have a link, ``largest`` the groups of the largest linked set (1: no link).
    """

    hasher: Hasher
    below: int
    moved: frozenset[int]
    groups: int
    linked: int
    largest: int

    def held_out(self, group: str) -> bool:
        value = self.hasher(group)
        return value < self.below or value in self.moved


class SplitBuilder:
    """Takes every record once; then `split` decides.

    Args:
        share: of the groups to hold out, 0 to 0.5.
        seed: the job's.
    """

    def __init__(self, share: float, *, seed: int) -> None:
        self._below = int(share * 2**64)
        self._hasher = Hasher(seed)
        self._groups = array("Q")
        self._images = array("Q")

    def add(self, group: str, image: str) -> None:
        """Add a record: its group, and its stored image's path."""
        self._groups.append(self._hasher(group))
        self._images.append(self._hasher(image))

    def first_rows(self) -> np.ndarray:
        """Return bool ``[records]``: the first record of each stored image."""
        images = np.frombuffer(self._images, dtype=np.uint64)
        first = np.zeros(len(images), dtype=bool)
        first[np.unique(images, return_index=True)[1]] = True
        return first

    def held_out(self, split: Split) -> np.ndarray:
        """Return bool ``[records]``: which of them are held out."""
        groups = np.frombuffer(self._groups, dtype=np.uint64)
        moved = np.fromiter(split.moved, dtype=np.uint64, count=len(split.moved))
        return (groups < np.uint64(split.below)) | np.isin(groups, moved)

    def split(self, alike: Iterable[tuple[int, int]] = ()) -> Split:
        """Decide the sides of the groups.

        Args:
            alike: pairs of record numbers, in the order of `add`, whose images are near-identical.
        """
        names, group = np.unique(np.frombuffer(self._groups, dtype=np.uint64), return_inverse=True)
        _, image = np.unique(np.frombuffer(self._images, dtype=np.uint64), return_inverse=True)
        sets = _Sets(len(names))
        for one, other in _edges(group, image):
            sets.join(one, other)
        for one, other in alike:
            sets.join(int(group[one]), int(group[other]))
        roots = sets.roots()
        sizes = np.bincount(roots, minlength=len(names))
        held = names < np.uint64(self._below)
        pulled = np.isin(roots, roots[held]) & ~held
        return Split(
            hasher=self._hasher,
            below=self._below,
            moved=frozenset(names[pulled].tolist()),
            groups=len(names),
            linked=int((sizes[roots] > 1).sum()),
            largest=int(sizes.max(initial=0)),
        )


def _edges(group: np.ndarray, image: np.ndarray) -> Iterable[tuple[int, int]]:
    """Return pairs of groups that hold the same image, a chain for each image."""
    if not len(group):
        return []
    order = np.lexsort((group, image))
    groups, images = group[order], image[order]
    rows = np.flatnonzero((images[1:] == images[:-1]) & (groups[1:] != groups[:-1]))
    return zip(groups[rows].tolist(), groups[rows + 1].tolist(), strict=True)


class _Sets:
    """Disjoint sets of ``0 .. size - 1``: union by smaller root, path halving."""

    def __init__(self, size: int) -> None:
        self._parent = array("q", range(size))

    def root(self, item: int) -> int:
        parent = self._parent
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        self._parent[second] = first

    def roots(self) -> np.ndarray:
        """Return int64 ``[size]``: a number for each item that is the same in each set."""
        parents = np.frombuffer(self._parent, dtype=np.int64)
        while True:
            upper = parents[parents]
            if np.array_equal(upper, parents):
                return parents
            parents = upper
