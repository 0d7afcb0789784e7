# SPDX-License-Identifier: Apache-2.0

"""Perceptual hashes of images: those of images that look the same are a few of 64 bits apart.

The hash is Zauner's DCT hash ("Implementation and benchmarking of perceptual image hash functions",
2010): the image in grey, 32 x 32, the signs of its 8 x 8 lowest frequencies against their median.

Medical images of one kind look alike to such a hash. It serves to keep images on one side of the
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

from gmai_xtuner.core.errors import CorpusError, ImageError
from gmai_xtuner.core.imaging.images import opened

_SIDE = 32
_LOW = 8
_CHUNK = 512


def perceptual_hash(path: Path) -> int:
    """Return 64 bits of an image file; an image of one grey level has the hash 0.

    Raises:
        CorpusError: the image can't be read.
    """
    try:
        with opened(path) as image:
            image.draft("L", (4 * _SIDE, 4 * _SIDE))
            small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    except ImageError as error:
        raise CorpusError(
            f"{path}: a stored image can't be read ({error}). Images of a corpus must not be changed by "
            "hand; remove its .work folder and run the job again."
        ) from error
    return _signs(small)


def perceptual_hash_of(pixels: np.ndarray) -> int:
    """Return :func:`perceptual_hash` of pixels, uint8 ``[H, W]`` or ``[H, W, 3]``.

    It may differ by a bit or two from the file's hash: a JPEG file is decoded at a fraction of its size, and
    here a large image is averaged over blocks first, which takes a seventh of the time.
    """
    grey = Image.fromarray(pixels).convert("L")
    return _signs(grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _signs(small: Image.Image) -> int:
    low = cv2.dct(np.asarray(small, dtype=np.float32))[:_LOW, :_LOW].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean grey level, which tells brightness only
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hashes(paths: Iterable[Path], *, threads: int) -> np.ndarray:
    """Return uint64 ``[images]``: a hash each, in order; about 4 ms for a 640-pixel PNG."""
    found: list[np.ndarray] = [np.zeros(0, dtype=np.uint64)]
    remaining: Iterator[Path] = iter(paths)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(remaining, _CHUNK)):
            found.append(np.array(list(pool.map(perceptual_hash, chunk)), dtype=np.uint64))
    return np.concatenate(found)
