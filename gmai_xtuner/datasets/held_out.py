"""Which conversations of a dataset are kept for validation.

An image, named by its path below the image root, is held out if a hash of that name falls below the share
asked for; a conversation without images goes by its id. Nothing else has a say: not the seed, the ratios,
the stage or the other datasets. So an image is on the same side in every dataset and every stage, stage 3
validates on nothing that stage 1 has learnt, and more data leaves what was held out as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

TRAIN, HELD_OUT, NEITHER = 0, 1, 2
EXCLUDED = 3
"""A side that :func:`sides` never gives: a plan puts there what an exclude list leaves out."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Sides of one dataset's conversations.

    ``side``: uint8 ``[conversations]``, :data:`TRAIN`, :data:`HELD_OUT`, or :data:`NEITHER` for one with
    images of both sides; ``order``: uint64 ``[conversations]``, the hash by which the held-out ones are taken
    when not all of them are wanted.
    """

    side: np.ndarray
    order: np.ndarray

    def rows(self, side: int, *, at_most: int | None = None) -> np.ndarray:
        """int64, sorted: the conversations of this side; ``at_most`` those whose order comes first."""
        rows = np.flatnonzero(self.side == side)
        if at_most is not None and len(rows) > at_most:
            rows = np.sort(rows[np.argsort(self.order[rows], kind="stable")[:at_most]])
        return rows


def sides(cache: Path, share: float) -> Sides:
    """The sides of a token cache's conversations.

    Args:
        cache: folder of the cache; ids and image names are read, tokens are not (about a second for a
            million conversations).
        share: of the images, between 0 and 1.
    """
    below = np.uint64(int(share * 2**64))
    reader = pa.ipc.open_file(pa.memory_map(str(cache / "tokens.arrow")))
    side, order = [], []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        ids = hashes(batch.column(batch.schema.get_field_index("id")))
        images = batch.column(batch.schema.get_field_index("images"))
        offsets = images.offsets.to_numpy().astype(np.int64)
        names = hashes(images.values)
        held = np.concatenate([[0], np.cumsum(names < below)])
        count = np.diff(offsets)
        held_count = held[offsets[1:]] - held[offsets[:-1]]
        part = np.full(len(ids), NEITHER, dtype=np.uint8)
        part[held_count == 0] = TRAIN
        part[(held_count == count) & (count > 0)] = HELD_OUT
        text = count == 0
        part[text] = np.where(ids[text] < below, HELD_OUT, TRAIN)
        first = ids.copy()
        first[~text] = names[offsets[:-1][~text]]
        side.append(part)
        order.append(first)
    if not side:
        return Sides(np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.uint64))
    return Sides(np.concatenate(side), np.concatenate(order))


def hashes(strings: pa.StringArray) -> np.ndarray:
    """uint64 ``[n]``: a polynomial in the UTF-8 bytes modulo 2**64, mixed; the same on every machine.

    Vectorised, because Python would take longer for 15 million names than packing them does. The mixing is
    splitmix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
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
