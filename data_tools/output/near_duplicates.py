"""Stored pictures that look the same: 64-bit perceptual hashes a few bits apart.

The hash is Zauner's DCT hash ("Implementation and benchmarking of perceptual image hash functions",
2010): the picture in grey, 32 x 32, the signs of its 8 x 8 lowest frequencies against their median. Pairs
at most ``distance`` bits apart are found without comparing all: cut into ``distance + 1`` pieces, two
such hashes have one piece in common.

Medical pictures of one kind look alike to such a hash. It serves to keep pictures on one side of the
split, never to remove any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from gmai_xtuner.core.errors import CorpusError

_SIDE = 32
_LOW = 8
_CHUNK = 512
_BLOCK = 2048  # hashes of one bucket that are compared at once, with as many others


def perceptual_hash(path: Path) -> int:
    """64 bits of a picture; a picture of one grey level has the hash 0.

    Raises:
        CorpusError: the picture can't be read.
    """
    try:
        with Image.open(path) as image:
            image.draft("L", (4 * _SIDE, 4 * _SIDE))
            small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    except OSError as error:
        raise CorpusError(
            f"{path}: a stored picture can't be read ({error}). Pictures of a corpus must not be changed by "
            "hand; remove its .work folder and run the job again."
        ) from error
    return _signs(small)


def perceptual_hash_of(pixels: np.ndarray) -> int:
    """:func:`perceptual_hash` of pixels, uint8 ``[H, W]`` or ``[H, W, 3]``.

    It may differ by a bit or two from the file's hash: a JPEG file is decoded at a fraction of its size, and
    here a large picture is averaged over blocks first, which takes a seventh of the time.
    """
    grey = Image.fromarray(pixels).convert("L")
    return _signs(grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _signs(small: Image.Image) -> int:
    low = cv2.dct(np.asarray(small, dtype=np.float32))[:_LOW, :_LOW].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean grey level, which tells brightness only
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hashes(paths: Iterable[Path], *, threads: int) -> np.ndarray:
    """uint64 ``[pictures]``: a hash each, in order; about 4 ms for a 640-pixel PNG."""
    found: list[np.ndarray] = [np.zeros(0, dtype=np.uint64)]
    remaining: Iterator[Path] = iter(paths)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(remaining, _CHUNK)):
            found.append(np.array(list(pool.map(perceptual_hash, chunk)), dtype=np.uint64))
    return np.concatenate(found)


def pairs(values: np.ndarray, *, distance: int) -> Iterator[tuple[int, int]]:
    """Positions of hashes that differ in at most so many bits, each pair once.

    Equal hashes are paired as a chain, not each with each: a thousand blank pictures are 999 pairs.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    yield from zip(order[same].tolist(), order[same + 1].tolist(), strict=True)
    if not distance:
        return
    first = np.ones(len(values), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    distinct, positions = ordered[first], order[first]
    edges = np.linspace(0, 64, distance + 2).astype(int)
    pieces = [
        (distinct >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    for number, piece in enumerate(pieces):
        for bucket in _buckets(piece):
            for left, right in _close(distinct[bucket], distance):
                one, other = bucket[left], bucket[right]
                earlier = np.zeros(len(one), dtype=bool)
                for previous in pieces[:number]:  # found there already
                    earlier |= previous[one] == previous[other]
                kept = ~earlier
                yield from zip(
                    positions[one[kept]].tolist(), positions[other[kept]].tolist(), strict=True
                )


def _buckets(piece: np.ndarray) -> Iterator[np.ndarray]:
    """Positions with the same value, where there are two at least."""
    order = np.argsort(piece, kind="stable")
    for bucket in np.split(order, np.flatnonzero(np.diff(piece[order])) + 1):
        if len(bucket) > 1:
            yield bucket


def _close(values: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions ``left < right`` that are close, a block of the matrix at a time."""
    for row in range(0, len(values), _BLOCK):
        for column in range(row, len(values), _BLOCK):
            apart = values[row : row + _BLOCK, None] ^ values[None, column : column + _BLOCK]
            left, right = np.nonzero(bits_set(apart) <= distance)
            left, right = left + row, right + column
            yield left[left < right], right[left < right]


def bits_set(values: np.ndarray) -> np.ndarray:
    """How many bits are set, uint8."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(values)
    as_bytes = values[..., None].view(np.uint8)
    return np.unpackbits(as_bytes, axis=-1).sum(axis=-1, dtype=np.uint8)
