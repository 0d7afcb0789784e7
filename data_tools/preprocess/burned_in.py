# SPDX-License-Identifier: Apache-2.0

"""Text that is burned into the pixels, and what of an image is left without the edges that hold it.

It is looked for with RapidOCR, whose package holds its models (PP-OCRv4, Apache-2.0): nothing is downloaded.
``benchmarks/burned_in_text.py`` measures how much of it is found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from data_tools.records import Box
from gmai_xtuner.core.errors import CorpusError

BURNED_IN = "text burned into the picture"
NOTE = "burned-in text"  # key of `Sample.preprocessing`
MOST_CUT = 0.25
"""Share of a side that is cut off at most."""
_SMALL = 1000  # pixels of the longer side: below it letters are enlarged before they are looked for
_TILE, _OVERLAP = 1280, 96  # the detector shrinks what is larger, and would lose small letters


@cache
def _engine() -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise CorpusError(
            "`text_in_pixels` needs RapidOCR; install it with: pip install -e .[ocr]"
        ) from error
    engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # "The text detection result is empty"
    return engine


def find_text(pixels: np.ndarray) -> list[Box]:
    """Return the boxes of text, half-open and in pixels, of uint8 ``[H, W]`` or ``[H, W, 3]``.

    A `CorpusError` if the library isn't installed.
    """
    found = []
    height, width = pixels.shape[:2]
    by = 2 if max(height, width) < _SMALL else 1
    for x, y in ((x, y) for y in _starts(height) for x in _starts(width)):
        tile = Image.fromarray(pixels[y : y + _TILE, x : x + _TILE]).convert("RGB")
        large = tile.resize((tile.width * by, tile.height * by), Image.Resampling.BICUBIC)
        for corners, _, _ in _engine()(np.asarray(large)[:, :, ::-1])[0] or ():
            (x1, y1), (x2, y2) = np.min(corners, axis=0) // by, -(-np.max(corners, axis=0) // by)
            box = (max(0, x1) + x, max(0, y1) + y, min(x2 + x, width), min(y2 + y, height))
            found.append(tuple(map(int, box)))
    return found  # type: ignore[return-value]


def _starts(side: int) -> Iterator[int]:
    yield 0
    yield from range(_TILE - _OVERLAP, side - _OVERLAP, _TILE - _OVERLAP)


def without_edges(boxes: Iterable[Box], width: int, height: int) -> Box | None:
    """Return the part of an image that is left when the edges that hold the boxes are cut off.

    None if more than `MOST_CUT` of a side would be lost: text in the middle can't be cut off.
    """
    left, top, right, bottom = 0, 0, width, height
    for x1, y1, x2, y2 in boxes:
        if x2 <= left or y2 <= top or x1 >= right or y1 >= bottom:
            continue
        cuts = (
            (x2 - left) / width,
            (y2 - top) / height,
            (right - x1) / width,
            (bottom - y1) / height,
        )
        side = cuts.index(min(cuts))
        left, top = x2 if side == 0 else left, y2 if side == 1 else top
        right, bottom = x1 if side == 2 else right, y1 if side == 3 else bottom
    is_enough = right - left >= (1 - MOST_CUT) * width and bottom - top >= (1 - MOST_CUT) * height
    return (left, top, right, bottom) if is_enough else None
