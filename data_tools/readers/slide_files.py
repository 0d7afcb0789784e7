# SPDX-License-Identifier: Apache-2.0

"""Parts of large TIFFs and whole-slide images, without reading the rest.

OpenSlide reads the formats of scanner makers that it knows (SVS, NDPI, MRXS, SCN, BIF, ...), tifffile every
other TIFF: plain or BigTIFF, tiled or striped, OME-TIFF, 8 or 16 bit, with or without a pyramid.

Shapes: ``H`` and ``W`` in pixels of the level that is read; a level's ``downsample`` is the number of
full-resolution pixels along one of its pixels.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import damage_as

MAX_READ = 2**28  # pixels that one call reads at most: 16384 x 16384
MAX_PIXELS = 2**36  # of a slide
MAX_PAGES = 1_000  # levels, label, overview, thumbnails
KEPT_BYTES = 2**26  # of decoded tiles and strips
UNREADABLE, UNREADABLE_PART = "slide can't be read", "part of the slide can't be read"
_SHOWN_TYPES = (np.dtype(bool), np.dtype(np.uint8), np.dtype(np.uint16))


@dataclass(frozen=True, slots=True)
class Level:
    """``width`` and ``height`` in its own pixels."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True, slots=True)
class Scale:
    """How tiles are read: ``level`` of the file, ``read`` pixels of it along a tile's side.

    ``full``: full-resolution pixels along one pixel of the tile.
    """

    level: int
    read: int
    full: float


def open_slide(path: Path) -> _Scanner | TiffSlide:
    """Return the file, opened by whichever library knows it; `Unusable` if neither does."""
    import openslide

    try:
        vendor = openslide.OpenSlide.detect_format(str(path))
        return TiffSlide(path) if vendor in (None, "generic-tiff") else _Scanner(path)
    except (openslide.OpenSlideError, OSError) as error:
        raise Unusable(UNREADABLE, str(error)) from error


class _Scanner:
    def __init__(self, path: Path) -> None:
        import openslide

        self._error = openslide.OpenSlideError
        self._slide = openslide.OpenSlide(str(path))
        sizes = zip(self._slide.level_dimensions, self._slide.level_downsamples, strict=True)
        self.levels = tuple(Level(width, height, float(scale)) for (width, height), scale in sizes)
        properties = self._slide.properties
        self.microns_per_pixel = _positive(properties.get(openslide.PROPERTY_NAME_MPP_X))
        self.magnification = _positive(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        _check_read(self.levels[level], x, y, width, height)
        scale = self.levels[level].downsample
        corner = (round(x * scale), round(y * scale))
        try:
            region = self._slide.read_region(corner, level, (width, height))
        except self._error as error:
            raise Unusable(UNREADABLE_PART, str(error)) from error
        pixels = np.asarray(region)
        # Where the scanner saw nothing the pixels are transparent: shown on white, as glass is.
        alpha = pixels[:, :, 3:].astype(np.uint16)
        # OpenSlide's colours are multiplied by alpha already.
        return (pixels[:, :, :3] + (255 - alpha)).clip(0, 255).astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


class TiffSlide:
    """A TIFF; only the tiles or strips that a part touches are read and decoded.

    ``values``: pixels are the numbers in the file, not the colours or grey levels that they stand for.
    """

    @damage_as(UNREADABLE)
    def __init__(self, path: Path, *, values: bool = False) -> None:
        self._values = values
        self._tiff = tifffile.TiffFile(path)
        if (count := len(self._tiff.pages)) > MAX_PAGES:
            raise Unusable(UNREADABLE, f"{count} pages; up to {MAX_PAGES} are read")
        series = self._tiff.series[0]
        self._pages = [level.keyframe for level in series.levels]
        first = self._pages[0]
        is_plane = len(series.pages) == 1 or series.axes in ("YX", "YXS", "SYX")
        if first.imagedepth != 1 or not is_plane:
            self._tiff.close()
            detail = f"axes {series.axes} of {series.shape}; one plane is read"
            raise Unusable("slide is a stack", detail)
        if not values and first.colormap is None and first.dtype not in _SHOWN_TYPES:
            self._tiff.close()
            raise Unusable("slide of an unsupported kind", f"{first.dtype}; 8 and 16 bit are read")
        several = first.colormap is None and first.samplesperpixel > 1
        if values and (several or first.dtype is None or first.dtype.kind not in "bui"):
            self._tiff.close()
            there = f"{first.samplesperpixel} channels of {first.dtype}"
            raise Unusable(
                "mask of the slide isn't a label map", f"{there}; one whole number is read"
            )
        self.levels = tuple(
            Level(page.imagewidth, page.imagelength, first.imagewidth / page.imagewidth)
            for page in self._pages
        )
        if not 0 < first.imagewidth * first.imagelength <= MAX_PIXELS:
            raise Unusable(UNREADABLE, f"{first.imagewidth} x {first.imagelength} pixels")
        self.microns_per_pixel = _ome_microns(self._tiff) or _tiff_microns(first)
        self.magnification: float | None = None
        self._decoded: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @damage_as(UNREADABLE_PART)
    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        _check_read(self.levels[level], x, y, width, height)
        page = self._pages[level]
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        samples = page.samplesperpixel // planes
        out = np.zeros((planes, height, width, samples), dtype=page.dtype)
        rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        columns = page.tilewidth if page.is_tiled else page.imagewidth
        if rows * columns > MAX_READ:
            raise Unusable("part of the slide is too large", f"tiles of {columns} x {rows} pixels")
        across, down = math.ceil(page.imagewidth / columns), math.ceil(page.imagelength / rows)
        for plane, row, column in itertools.product(
            range(planes),
            range(y // rows, (y + height - 1) // rows + 1),
            range(x // columns, (x + width - 1) // columns + 1),
        ):
            tile = self._tile(level, (plane * down + row) * across + column)
            if tile is not None:  # a sparse file leaves out empty tiles
                left, top = x - column * columns, y - row * rows  # of the part, in the tile
                y1, x1 = max(top, 0), max(left, 0)
                piece = tile[y1 : top + height, x1 : left + width]
                down_to, right_to = y1 - top + piece.shape[0], x1 - left + piece.shape[1]
                out[plane, y1 - top : down_to, x1 - left : right_to] = piece
        pixels = np.concatenate(list(out), axis=-1) if planes > 1 else out[0]
        return pixels[:, :, 0] if self._values else self._shown(pixels, page)

    def _tile(self, level: int, index: int) -> np.ndarray | None:
        """Return ``[h, w, samples]``; the last ones stay, since neighbours share strips and tiles."""
        if (level, index) in self._decoded:
            self._decoded.move_to_end((level, index))
            return self._decoded[level, index]
        page = self._pages[level]
        count = page.databytecounts[index]
        if count == 0:
            return None
        handle = self._tiff.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(count)
        if len(data) < count:
            raise Unusable(UNREADABLE_PART, f"the file ends inside of tile {index}")
        tile, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        if tile is None:
            return None
        pixels: np.ndarray = tile[0, : shape[1], : shape[2]]
        self._decoded[level, index] = pixels
        while len(self._decoded) > 1 and sum(t.nbytes for t in self._decoded.values()) > KEPT_BYTES:
            self._decoded.popitem(last=False)
        return pixels

    @staticmethod
    def _shown(pixels: np.ndarray, page: Any) -> np.ndarray:
        """Return ``[H, W]`` or ``[H, W, 3]`` with black as zero."""
        if page.colormap is not None:
            return (page.colormap[:, pixels[:, :, 0]].transpose(1, 2, 0) >> 8).astype(np.uint8)
        if pixels.dtype == bool:
            pixels = pixels.astype(np.uint8) * 255
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = np.iinfo(pixels.dtype).max - pixels
        return pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0]

    def close(self) -> None:
        self._tiff.close()


def _check_read(level: Level, x: int, y: int, width: int, height: int) -> None:
    if width * height > MAX_READ:
        raise Unusable("part of the slide is too large", f"{width} x {height} pixels at once")
    assert 0 <= x <= level.width - width, (x, width, level)
    assert 0 <= y <= level.height - height, (y, height, level)


def _positive(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _ome_microns(tiff: Any) -> float | None:
    """Return ``PhysicalSizeX`` of the first image of OME-XML."""
    if not tiff.ome_metadata:
        return None
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(tiff.ome_metadata)
    except ElementTree.ParseError:
        return None
    pixels = root.find(".//{*}Pixels")
    if pixels is None:
        return None
    size, unit = _positive(pixels.get("PhysicalSizeX")), pixels.get("PhysicalSizeXUnit", "µm")
    scale = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}.get(unit)
    return size * scale if size and scale else None


def _tiff_microns(page: Any) -> float | None:
    """From XResolution; dots an inch under 1000 are what a program writes that knows nothing (25 microns)."""
    unit = page.tags.valueof("ResolutionUnit", 1)
    length = {2: 25_400.0, 3: 10_000.0}.get(int(unit))
    value = page.tags.valueof("XResolution")
    if length is None or not value or not value[0] or not value[1]:
        return None
    microns = length * value[1] / value[0]
    return microns if microns < 25.0 else None


SlideFile = _Scanner | TiffSlide
"""An open slide, to be closed.

``levels`` begin with the full resolution, of which are ``microns_per_pixel`` and ``magnification``, None if
the file doesn't say. ``read`` returns ``[H, W]`` or ``[H, W, 3]`` of a part inside of a level, in its pixels.
"""


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Return 16 bit by its high byte: one scale for the whole slide, so that tiles stay comparable."""
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


OVERVIEW_SIDE = 2048  # pixels of the longer side of the overview, at most
BLOCK = 2048  # pixels of the blocks in which a level is read for it


def tissue_map(slide: SlideFile, background: str, level_above: int) -> tuple[np.ndarray, float]:
    """Return the tissue of an overview, bool ``[H, W]``, and full-resolution pixels along one of its pixels.

    The coarsest level that is large enough is read block by block and averaged; with blocks of whole
    multiples of the factor no pixel is counted twice.
    """
    longer = max(slide.levels[0].width, slide.levels[0].height)
    wanted = max(1.0, longer / OVERVIEW_SIDE)
    number = max(i for i, level in enumerate(slide.levels) if i == 0 or level.downsample <= wanted)
    level = slide.levels[number]
    factor = max(1, math.ceil(wanted / level.downsample))
    shape = math.ceil(level.height / factor), math.ceil(level.width / factor)
    tissue = np.zeros(shape, dtype=bool)
    side = BLOCK // factor * factor or factor
    for y, x in itertools.product(range(0, level.height, side), range(0, level.width, side)):
        width, height = min(side, level.width - x), min(side, level.height - y)
        pixels = to_uint8(slide.read(number, x, y, width, height))
        small = _averaged(pixels, factor)
        high = small.max(axis=2)
        if background == "light":
            # Saturation as in HSV: the measure of CLAM's tissue segmentation (Lu et al. 2021).
            low = small.min(axis=2)
            value = np.where(high > 0, (high - low) / np.maximum(high, 1.0) * 255.0, 0.0)
        else:
            value = high
        top, left = y // factor, x // factor
        tissue[top : top + len(value), left : left + value.shape[1]] = value > level_above
    return tissue, level.downsample * factor


def _averaged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Return float32 ``[h, w, channels]``: means of ``factor`` x ``factor`` pixels, of fewer at the edges."""
    values = pixels if pixels.ndim == 3 else pixels[:, :, None]
    rows = np.arange(0, values.shape[0], factor)
    columns = np.arange(0, values.shape[1], factor)
    sums = np.add.reduceat(np.add.reduceat(values.astype(np.float32), rows, 0), columns, 1)
    counts = np.diff([*rows, values.shape[0]])[:, None] * np.diff([*columns, values.shape[1]])
    return sums / counts[:, :, None].astype(np.float32)
