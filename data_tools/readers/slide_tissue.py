"""Where a slide has tissue."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from data_tools.readers.slide_files import SlideFile, blocks, to_uint8

OVERVIEW_SIDE = 2048  # pixels of the longer side of the overview, at most
BLOCK = 2048  # pixels of the blocks in which a level is read for it


def tissue_map(
    slide: SlideFile, *, background: Literal["light", "dark"], level_above: int
) -> tuple[np.ndarray, float]:
    """bool ``[H, W]`` of an overview, and the full-resolution pixels along one of its pixels.

    The coarsest level that is large enough is read block by block and averaged; with blocks of whole
    multiples of the factor no pixel is counted twice.
    """
    longer = max(slide.levels[0].width, slide.levels[0].height)
    wanted = max(1.0, longer / OVERVIEW_SIDE)
    number = max(i for i, level in enumerate(slide.levels) if i == 0 or level.downsample <= wanted)
    level = slide.levels[number]
    factor = max(1, math.ceil(wanted / level.downsample))
    tissue = np.zeros(
        (math.ceil(level.height / factor), math.ceil(level.width / factor)), dtype=bool
    )
    for x, y, width, height in blocks(level, BLOCK // factor * factor or factor):
        pixels = to_uint8(slide.read(number, x, y, width, height))
        small = _averaged(pixels, factor)
        high = small.max(axis=2)
        if background == "light":
            # Saturation as in HSV: the measure of CLAM's tissue segmentation (Lu et al. 2021).
            low = small.min(axis=2)
            value = np.where(high > 0, (high - low) / np.maximum(high, 1.0) * 255.0, 0.0)
        else:
            value = high
        part = value > level_above
        tissue[
            y // factor : y // factor + part.shape[0], x // factor : x // factor + part.shape[1]
        ] = part
    return tissue, level.downsample * factor


def _averaged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """float32 ``[h, w, channels]``: means of ``factor`` x ``factor`` pixels, of fewer at the edges."""
    values = pixels if pixels.ndim == 3 else pixels[:, :, None]
    rows = np.arange(0, values.shape[0], factor)
    columns = np.arange(0, values.shape[1], factor)
    sums = np.add.reduceat(np.add.reduceat(values.astype(np.float32), rows, 0), columns, 1)
    counts = np.diff([*rows, values.shape[0]])[:, None] * np.diff([*columns, values.shape[1]])
    return sums / counts[:, :, None].astype(np.float32)
