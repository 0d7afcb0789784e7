# SPDX-License-Identifier: Apache-2.0

"""Which conversations are kept for validation.

An image, named by its path below the image root, is kept for validation if a hash of that name
falls below the share asked for; a conversation without images goes by its id. Nothing else has a say: not
the seed, the ratios, the stage or the other datasets. So an image is on the same side in every dataset and
every stage, stage 3 validates on nothing that stage 1 has seen, and more data leaves what was held out as it
was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

TRAIN, HELD_OUT, NEITHER, EXCLUDED = range(4)
"""Sides of a conversation; :data:`NEITHER` has images of both, :data:`EXCLUDED` is on an exclude list."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Sides of one dataset's conversations.

    ``side``: uint8 ``[conversations]``, :data:`TRAIN`, :data:`HELD_OUT` or :data:`NEITHER`; ``order``: uint64
    ``[conversations]``, the hash by which the held-out ones are taken when not all of them are wanted.
    """

    side: np.ndarray
    order: np.ndarray

    def rows(self, side: int, *, at_most: int | None = None) -> np.ndarray:
        """Return the conversations of this side, int64, sorted; ``at_most`` those first in order."""
        rows = np.flatnonzero(self.side == side)
        if at_most is not None and len(rows) > at_most:
            rows = np.sort(rows[np.argsort(self.order[rows], kind="stable")[:at_most]])
        return rows


def sides(cache: Path, share: float) -> Sides:
    """Return the sides of a token cache's conversations, for a share of the images between 0 and 1.

    Ids and image names are read, tokens are not: about a second for a million conversations.
    """
    below = np.uint64(int(share * 2**64))
    side, order = [np.zeros(0, dtype=np.uint8)], [np.zeros(0, dtype=np.uint64)]
    for ids, images, offsets in _hashed_names(cache):
        low, high = _extremes(ids, images, offsets)
        part = np.full(len(ids), NEITHER, dtype=np.uint8)
        part[low >= below] = TRAIN
        part[high < below] = HELD_OUT
        first, shown = ids.copy(), np.diff(offsets) > 0
        first[shown] = images[offsets[:-1][shown]]
        side.append(part)
        order.append(first)
    return Sides(np.concatenate(side), np.concatenate(order))


def nothing_held_out(
    share: float, caches: Sequence[Path], excluded: Sequence[np.ndarray | None]
) -> str:
    """Say of how many images a share holds none out, and the smallest share that does.

    ``excluded`` is bool ``[conversations]`` of each cache, what its list leaves out, or ``None``.
    """
    names, texts = np.zeros(0, dtype=np.uint64), 0
    first, last = 2**64, -1  # of the conversations that may be held out, and may be trained on
    for cache, mask in zip(caches, excluded, strict=True):
        for ids, hashed, offsets in _hashed_names(cache, mask):
            names = np.union1d(names, hashed)
            texts += int((np.diff(offsets) == 0).sum())
            low, high = _extremes(ids, hashed, offsets)
            if len(ids):
                first, last = min(int(high.min()), first), max(int(low.max()), last)
    images = len(names)
    of = [f"{images} image{'s'[images == 1 :]}"] if images or not texts else []
    of += [f"{texts} conversation{'s'[texts == 1 :]} without an image"] if texts else []
    text = f"{share:g} of {' and '.join(of)}; hashes of the names decide, see data/held_out.py. "
    if first < 2**64:
        exact = (first + 1) / 2**64
        step = 10.0 ** (math.floor(math.log10(exact)) - 1)  # two digits, rounded up
        digits = math.ceil(exact / step)
        least = float(f"{digits * step:.2g}")
        if int(least * 2**64) <= first:  # rounding of the quotient
            least = float(f"{(digits + 1) * step:.2g}")
        if least < 1 and last >= int(least * 2**64):
            return f"{text}The smallest share that holds something out is {least:g}"
    return f"{text}No share holds something out and leaves something to train on"


def _extremes(
    ids: np.ndarray, images: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest hash of each conversation's images, or twice that of its id."""
    low, high, shown = ids.copy(), ids.copy(), np.diff(offsets) > 0
    if shown.any():
        starts = offsets[:-1][shown]  # images of one end where those of the next begin
        low[shown] = np.minimum.reduceat(images, starts)
        high[shown] = np.maximum.reduceat(images, starts)
    return low, high


def _hashed_names(
    cache: Path, mask: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Hashes of the ids, of the images, and where each conversation's begin; without what is masked."""
    reader = pa.ipc.open_file(pa.memory_map(str(cache / "tokens.arrow")))
    begin = 0
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number).select(["id", "images"])
        if mask is not None:
            kept = ~mask[begin : begin + len(batch)]
            begin += len(batch)
            batch = batch.filter(pa.array(kept))
        images = batch.column(1)
        offsets = images.offsets.to_numpy().astype(np.int64)
        yield (
            hashes(batch.column(0)),
            hashes(images.values)[offsets[0] : offsets[-1]],
            offsets - offsets[0],
        )


def hashes(strings: pa.StringArray) -> np.ndarray:
    """Hash strings to uint64 ``[n]``: a polynomial in the UTF-8 bytes modulo 2**64, mixed.

    The same on every machine. Vectorised, because Python would take longer for 15 million names than packing
    them does. The mixing is splitmix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014).
    """
    offsets = np.frombuffer(strings.buffers()[1], dtype=np.int32)
    offsets = offsets[strings.offset : strings.offset + len(strings) + 1].astype(np.int64)
    data = strings.buffers()[2]
    text = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    text = text[offsets[0] : offsets[-1]].astype(np.uint64) + np.uint64(1)
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    place = np.arange(len(text)) - np.repeat(starts, lengths)
    powers = np.full(int(lengths.max(initial=0)) + 1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(text * powers[place])])
    value = sums[starts + lengths] - sums[starts] + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
