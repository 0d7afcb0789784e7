# SPDX-License-Identifier: Apache-2.0

"""Split of the records: held out are whole patients, cases, videos or slides, and no image on both sides.

A record's ``provenance.group`` is hashed with the job's seed; below the share asked for, the group is held
out. So more data leaves the side of a group as it was. Groups that share a stored image (it is stored
by its content: the same name is the same image), or near-identical ones if asked for, are linked, and
linked groups are held out if any of them is by its own hash: what has been held out once stays so.

A million records cost 16 MB: two 64-bit hashes each. Should two names have the same hash, their groups
are linked; that is harmless.

Images are near-identical by Zauner's DCT hash ("Implementation and benchmarking of perceptual image hash
functions", 2010): the image in grey, 32 x 32, the signs of its 8 x 8 lowest frequencies against their median.
Those of images that look the same are a few of 64 bits apart. Medical images of one kind look alike to it: it
serves to keep images on one side, never to remove any.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.output import stored_image

_SIDE = 32
_LOW = 8
_CHUNK = 512


def _hashed(text: str, seed: int) -> int:
    """Return 64 bits."""
    key, data = str(seed).encode(), text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8, key=key).digest(), "little")


@dataclass(frozen=True, slots=True)
class Split:
    """Sides of all groups: held out or not.

    ``moved`` are the hashes of groups that are held out by a link only; ``groups`` counts the groups,
    ``linked`` those that have a link, ``largest`` the groups of the largest linked set (1: no link).
    """

    seed: int
    below: int
    moved: frozenset[int]
    groups: int
    linked: int
    largest: int

    def held_out(self, group: str) -> bool:
        value = _hashed(group, self.seed)
        return value < self.below or value in self.moved


class SplitBuilder:
    """Takes every record once; then `split` decides which ``share`` of the groups, 0 to 0.5, is held out."""

    def __init__(self, share: float, *, seed: int) -> None:
        self._below = int(share * 2**64)
        self._seed = seed
        self._groups = array("Q")
        self._images = array("Q")

    def add(self, group: str, image: str) -> None:
        """Add a record: its group, and its stored image's path."""
        self._groups.append(_hashed(group, self._seed))
        self._images.append(_hashed(image, self._seed))

    def first_rows(self) -> np.ndarray:
        """Return bool ``[records]``: the first record of each stored image."""
        first = np.zeros(len(self._images), dtype=bool)
        first[np.unique(np.asarray(self._images), return_index=True)[1]] = True
        return first

    def held_out(self, split: Split) -> np.ndarray:
        """Return bool ``[records]``: which of them are held out."""
        groups = np.asarray(self._groups)
        moved = np.fromiter(split.moved, dtype=np.uint64, count=len(split.moved))
        return (groups < np.uint64(split.below)) | np.isin(groups, moved)

    def split(self, alike: Iterable[tuple[int, int]] = ()) -> Split:
        """Decide the sides of the groups; ``alike`` are pairs of records with near-identical images."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        names, group = np.unique(np.asarray(self._groups), return_inverse=True)
        images, image = np.unique(np.asarray(self._images), return_inverse=True)
        one, other = np.array([*alike], dtype=np.int64).reshape(-1, 2).T
        nodes = len(names) + len(images)  # of a graph of groups and of the images that they show
        edges = np.r_[group, group[one]], np.r_[len(names) + image, group[other]]
        graph = coo_array((np.ones(len(edges[0]), dtype=bool), edges), shape=(nodes, nodes))
        sets = connected_components(graph, directed=False)[1][: len(names)] if nodes else group
        sizes = np.bincount(sets)
        held = names < np.uint64(self._below)
        pulled = np.isin(sets, sets[held]) & ~held
        return Split(
            seed=self._seed,
            below=self._below,
            moved=frozenset(names[pulled].tolist()),
            groups=len(names),
            linked=int((sizes[sets] > 1).sum()),
            largest=int(sizes.max(initial=0)),
        )


def perceptual_hash(path: Path) -> int:
    """Return 64 bits of an image file; an image of one grey level has the hash 0.

    A `CorpusError` if the image can't be read.
    """
    with stored_image(path) as image:
        image.draft("L", (4 * _SIDE, 4 * _SIDE))
        return _signs(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def perceptual_hash_of(pixels: np.ndarray) -> int:
    """Return :func:`perceptual_hash` of pixels, uint8 ``[H, W]`` or ``[H, W, 3]``.

    It may differ by a bit or two from the file's hash: a JPEG file is decoded at a fraction of its size, and
    here a large image is averaged over blocks first, which takes a seventh of the time.
    """
    grey = Image.fromarray(pixels).convert("L")
    return _signs(grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _signs(small: Image.Image) -> int:
    import cv2

    low = cv2.dct(np.asarray(small, dtype=np.float32))[:_LOW, :_LOW].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean grey level, which tells brightness only
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hashes(paths: Iterable[Path], *, threads: int) -> np.ndarray:
    """Return uint64 ``[images]``: a hash each, in order; about 4 ms for a 640-pixel PNG."""
    remaining, found = iter(paths), array("Q")
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(remaining, _CHUNK)):
            found.extend(pool.map(perceptual_hash, chunk))
    return np.asarray(found)
