# SPDX-License-Identifier: Apache-2.0

"""Tiles of whole-slide images and other large TIFFs, at a level, a magnification or microns a pixel.

Which tiles: a grid over the tissue, or those that a table names. Their labels: the slide's class (of its
folder or of a table), the table's rows, outlines drawn on the slide, or a mask of the slide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from data_tools.readers import SourceOptions
from data_tools.readers.file_rows import FileRow, RowColumns, beside, units_of
from data_tools.readers.files import file_below
from data_tools.readers.slide_files import Scale, SlideFile, open_slide, tissue_map, to_uint8
from data_tools.readers.slide_labels import Tile, labeller_of
from data_tools.records import NOTHING, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable

SUFFIXES = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif"),
    *(".tif", ".tiff", ".qptiff", ".dcm"),
)


class SlideColumns(RowColumns):
    """The columns of a table; those of `RowColumns`, and the tile's upper left corner.

    It is in full-resolution pixels; without it a row is of the slide.
    """

    x: str | None = None
    y: str | None = None

    @model_validator(mode="after")
    def _both(self) -> SlideColumns:
        if bool(self.x) != bool(self.y):
            raise ValueError("name both columns, x and y, or none")
        if self.box and not self.x:
            raise ValueError("boxes are of tiles: name the columns x and y of the tile's corner")
        return self


class Options(SourceOptions):
    """Keys of ``reader: slide``; docs/corpus.md explains them."""

    native_memory: ClassVar[int] = 2**32

    files: str = "**/*"
    tile: int = Field(default=512, ge=16, le=8192)
    stride: int | None = Field(default=None, ge=1)
    level: int | None = Field(default=None, ge=0)
    microns_per_pixel: float | None = Field(default=None, gt=0)
    magnification: float | None = Field(default=None, gt=0)
    slide_microns_per_pixel: float | None = Field(default=None, gt=0)
    slide_magnification: float | None = Field(default=None, gt=0)
    min_tissue: float = Field(default=0.5, ge=0, le=1)
    background: Literal["light", "dark"] = "light"
    tissue_level: int = Field(default=15, ge=0, le=254)
    max_tiles: int | None = Field(default=None, gt=0)
    table: Path | None = None
    columns: SlideColumns = SlideColumns()
    regions: str | None = None
    exclude: tuple[str, ...] = ()
    mask: str | None = None
    mask_background: int = 0
    regions_as: Literal["boxes", "tile"] = "boxes"
    min_region: float = Field(default=0.5, gt=0, le=1)
    outside: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        if sum(v is not None for v in (self.level, self.microns_per_pixel, self.magnification)) > 1:
            raise ValueError("give one of level, microns_per_pixel and magnification")
        if sum(v is not None for v in (self.table, self.regions, self.mask)) > 1:
            raise ValueError("labels come from one of table, regions and mask; give one of them")
        for pattern in (self.regions, self.mask):
            if pattern is not None and "{stem}" not in pattern:
                advice = "write {stem} for its name"
                raise ValueError(f"{pattern!r} is the same for every slide; {advice}")
        if self.exclude and not self.regions:
            raise ValueError("'exclude' names classes of 'regions'; there are none")
        return self


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each slide; the payload are its rows of the table, or None without a table."""
    extra = [name for name in (options.columns.x, options.columns.y) if name]
    chosen = partial(_chosen, options.mask)
    yield from units_of(options, SUFFIXES, "slide", extra=extra, chosen=chosen)


def _chosen(mask: str | None, root: Path, names: list[str]) -> list[str]:
    """Return files that are no masks, of a DICOM slide the largest of its series: OpenSlide finds others."""
    from data_tools.readers.dicom_headers import WHOLE_SLIDE
    from gmai_xtuner.core.imaging.dicom import header_of, open_dataset

    kept = [name for name in names if not name.lower().endswith(".dcm")]
    largest: dict[tuple[PurePosixPath, str], tuple[int, str]] = {}
    for name in set(names) - set(kept):
        try:
            header = header_of(open_dataset(root / name, header_only=True), name)
        except Unusable:
            continue
        if header.sop_class == WHOLE_SLIDE:
            series = (PurePosixPath(name).parent, header.series)
            found = ((root / name).stat().st_size, name)
            largest[series] = max(found, largest.get(series, found))
    slides = sorted([*kept, *(name for _, name in largest.values())])
    masks = [] if mask is None else [beside(name, mask) for name in slides]
    return [name for name in slides if name not in masks]


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the tiles of one slide."""
    rows: tuple[FileRow, ...] = unit.payload or ()
    if options.table is not None and unit.payload is None:
        raise Unusable("slide of the table not found")
    path = file_below(options, unit.key, "slide can't be read")
    if options.table is not None and not rows:
        raise Unusable("slide without a row in the table")
    with ExitStack() as stack:
        slide = stack.enter_context(closing(open_slide(path)))
        scale = scale_of(options, slide)
        labels_of = labeller_of(options, unit, slide, drops, stack)
        if options.columns.x:
            tiles = _listed(options, unit.key, rows, drops)
        else:
            tiles = dict.fromkeys(_grid(options, unit.key, slide, scale, drops), ())
        for (x, y), own in tiles.items():
            tile = Tile(f"{unit.key} x {x} y {y}", x, y, scale, own)
            with drops.image(tile.where):
                pixels, notes = _pixels(options, slide, tile)
                yield Sample(
                    pixels,
                    unit.key,
                    tuple(labels_of(tile, drops)),
                    part={"x": x, "y": y},
                    group=unit.key,
                    preprocessing=notes,
                )


def _pixels(options: Options, slide: SlideFile, tile: Tile) -> tuple[np.ndarray, dict[str, str]]:
    scale = tile.scale
    level = slide.levels[scale.level]
    left, top = round(tile.x / level.downsample), round(tile.y / level.downsample)
    if left + scale.read > level.width or top + scale.read > level.height or min(left, top) < 0:
        size = f"{slide.levels[0].width} x {slide.levels[0].height}"
        raise Unusable("tile outside the slide", f"the slide has {size} pixels")
    pixels = to_uint8(slide.read(scale.level, left, top, scale.read, scale.read))
    notes = {"level": str(scale.level), "full-resolution pixels a pixel": f"{scale.full:g}"}
    if slide.microns_per_pixel:
        notes["microns a pixel"] = f"{slide.microns_per_pixel * scale.full:.4g}"
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.size != (options.tile, options.tile):
        image = image.resize((options.tile, options.tile), Image.Resampling.LANCZOS)
    return np.asarray(image), notes


def scale_of(options: Options, slide: SlideFile) -> Scale:
    """Return how tiles of a slide are read; `Unusable` if it doesn't say its scale, or is too coarse."""
    levels = slide.levels
    microns = options.slide_microns_per_pixel or slide.microns_per_pixel
    power = options.slide_magnification or slide.magnification
    if options.microns_per_pixel is not None:
        what, key, full = "microns a pixel", "microns_per_pixel", microns
        full = full and options.microns_per_pixel / full
    elif options.magnification is not None:
        what, key, full = "magnification", "magnification", power
        full = full and full / options.magnification
    else:
        number = options.level or 0
        if number >= len(levels):
            raise Unusable("slide without this level", f"{len(levels)} levels, {number} asked for")
        return Scale(number, options.tile, levels[number].downsample)
    if full is None:
        raise Unusable(f"slide doesn't say its {what}", f"set slide_{key} or level")
    if full < 0.99:
        detail = f"it would be enlarged {1 / full:.3g} times"
        raise Unusable("slide is coarser than asked for", detail)
    # One percent of slack: pyramids' scales are rounded to whole pixels.
    level = max(i for i, entry in enumerate(levels) if i == 0 or entry.downsample <= full * 1.01)
    return Scale(level, max(1, round(options.tile * full / levels[level].downsample)), full)


def _grid(
    options: Options, key: str, slide: SlideFile, scale: Scale, drops: Drops
) -> list[tuple[int, int]]:
    """Return the corners of tiles with enough tissue, row by row; the others are dropped."""
    side, step = options.tile * scale.full, (options.stride or options.tile) * scale.full
    width, height = slide.levels[0].width, slide.levels[0].height
    if width < side or height < side:
        detail = f"{width} x {height} pixels, tile {side:g}"
        raise Unusable("slide smaller than a tile", detail)
    columns, rows = (
        [round(index * step) for index in range(int((length - side) // step) + 1)]
        for length in (width, height)
    )
    corners = [(x, y) for y in rows for x in columns]
    if options.min_tissue > 0:
        enough = _tissue_shares(options, slide, np.array(corners), side) >= options.min_tissue
        for x, y in compress(corners, ~enough):
            drops.add("tile with too little tissue", f"{key} x {x} y {y}", lost=NOTHING)
        corners = list(compress(corners, enough))
    if options.max_tiles is not None and len(corners) > options.max_tiles:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
        chosen = np.random.default_rng(seed).permutation(len(corners))[: options.max_tiles]
        corners = [corners[index] for index in sorted(chosen.tolist())]
    return corners


def _tissue_shares(
    options: Options, slide: SlideFile, corners: np.ndarray, side: float
) -> np.ndarray:
    """Return the share of tissue, float64 ``[N]``, in the tiles at corners (x, y), ``[N, 2]``."""
    tissue, factor = tissue_map(slide, options.background, options.tissue_level)
    # summed[y, x]: tissue pixels above and to the left
    summed = np.pad(tissue.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    x1, y1 = first = (corners / factor).astype(np.int64).T
    end = np.rint((corners + side) / factor).astype(np.int64)
    x2, y2 = last = np.maximum(first + 1, np.minimum(end, tissue.shape[::-1]).T)
    count = summed[y2, x2] - summed[y1, x2] - summed[y2, x1] + summed[y1, x1]
    return count / (last - first).prod(axis=0)


def _listed(
    options: Options, key: str, rows: Sequence[FileRow], drops: Drops
) -> dict[tuple[int, int], tuple[FileRow, ...]]:
    tiles: dict[tuple[int, int], tuple[FileRow, ...]] = {}
    for row in rows:
        x, y = (row.cells[str(column)] for column in (options.columns.x, options.columns.y))
        with drops.annotation(key, *row.lost):  # it may be about any tile: lost in all of them
            try:
                corner, problem = (int(float(x)), int(float(y))), row.problem
            except (ValueError, OverflowError):
                problem = f"x, y are {x!r}, {y!r}, not two numbers"
            if problem:
                detail = f"line {row.line} of the table: {problem}"
                raise Unusable("row of the table can't be read", detail)
            tiles[corner] = (*tiles.get(corner, ()), row)
    return tiles
