"""What is known of a slide's tile: the slide's class, rows of a table, outlines or a label map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.readers.named_rows import Row, beside, folder_of
from data_tools.readers.paths import OUTSIDE, below
from data_tools.readers.slide_files import BadSlide, Scale, SlideFile, TiffSlide
from data_tools.readers.slide_regions import Outline, read_outlines
from data_tools.samples import Annotation

if TYPE_CHECKING:
    from data_tools.readers.slide import Options


class Labeller:
    """What is known of a tile: annotations, or the reason why it is left out.

    ``incomplete`` names, of the tile asked for last, labels that it has too little of: they are neither said
    of it nor absent.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.incomplete: tuple[str, ...] = ()

    def annotations(
        self, x: int, y: int, scale: Scale, rows: Sequence[Row]
    ) -> list[Annotation] | str:
        raise NotImplementedError

    def of_masks(self, masks: Sequence[tuple[str, np.ndarray]]) -> list[Annotation] | str:
        """Regions of a tile as the job wants them."""
        options = self.options
        self.incomplete = ()
        if not masks:
            return [Annotation(options.outside)] if options.outside else "tile without a region"
        if options.regions_as == "boxes":
            return [Annotation(label, mask=mask) for label, mask in masks]
        covered: dict[str, np.ndarray] = {}
        for label, mask in masks:
            covered[label] = covered[label] | mask if label in covered else mask
        names = [name for name, mask in covered.items() if mask.mean() >= options.min_region]
        if not names:
            return "tile with too little of a region"
        self.incomplete = tuple(name for name in covered if name not in names)
        return [Annotation(name) for name in names]


class OfSlide(Labeller):
    """The slide's class, or rows of the table that name the tile."""

    def __init__(self, options: Options, key: str, rows: Sequence[Row]) -> None:
        super().__init__(options)
        self._whole = [
            Annotation(row.label, attributes=row.attributes) for row in rows if row.label
        ]
        if options.table is None and (folder := folder_of(key)):
            self._whole = [Annotation(folder)]

    def annotations(
        self, x: int, y: int, scale: Scale, rows: Sequence[Row]
    ) -> list[Annotation] | str:
        if not self.options.columns.x:
            return self._whole
        return [Annotation(r.label, r.box, attributes=r.attributes) for r in rows if r.label]


class OfOutlines(Labeller):
    """Outlines drawn on the slide."""

    def __init__(self, options: Options, outlines: Sequence[Outline]) -> None:
        super().__init__(options)
        self._outlines = [o for o in outlines if o.label not in options.exclude]
        self._excluded = [o for o in outlines if o.label in options.exclude]

    def annotations(
        self, x: int, y: int, scale: Scale, rows: Sequence[Row]
    ) -> list[Annotation] | str:
        size = (self.options.tile, self.options.tile)
        excluded = [o.mask(x, y, scale.full, size) for o in self._excluded]
        masks = []
        for outline in self._outlines:
            mask = outline.mask(x, y, scale.full, size)
            if mask is None:
                continue
            for other in excluded:
                if other is not None:
                    mask = mask & ~other
            if mask.any():
                masks.append((outline.label, mask))
        return self.of_masks(masks)


class OfMask(Labeller):
    """A label map of the slide, of the same size or smaller by one factor."""

    def __init__(self, options: Options, slide: SlideFile, mask: SlideFile) -> None:
        super().__init__(options)
        self._mask = mask
        self._factor = slide.levels[0].width / mask.levels[0].width

    def annotations(
        self, x: int, y: int, scale: Scale, rows: Sequence[Row]
    ) -> list[Annotation] | str:
        side = self.options.tile
        level = self._mask.levels[0]
        # The mask's pixel under the middle of every pixel of the tile.
        along = (np.arange(side) + 0.5) * scale.full
        columns = np.minimum(((x + along) / self._factor).astype(np.int64), level.width - 1)
        lines = np.minimum(((y + along) / self._factor).astype(np.int64), level.height - 1)
        left, top = int(columns[0]), int(lines[0])
        part = self._mask.read(0, left, top, int(columns[-1]) - left + 1, int(lines[-1]) - top + 1)
        values = part[lines - top][:, columns - left]
        numbers = [int(value) for value in np.unique(values)]
        return self.of_masks(
            [(str(n), values == n) for n in numbers if n != self.options.mask_background]
        )


def _existing(options: Options, key: str, pattern: str) -> Path:
    try:
        path = below(options.root, beside(key, pattern))
    except ValueError as error:
        raise BadSlide(OUTSIDE, str(error)) from error
    if not path.is_file():
        raise BadSlide("slide without its regions", f"there is no {beside(key, pattern)}")
    return path


def outlines_of(options: Options, key: str) -> list[Outline]:
    assert options.regions is not None
    return read_outlines(_existing(options, key, options.regions))


def open_mask(options: Options, key: str, slide: SlideFile) -> SlideFile:
    assert options.mask is not None
    mask = TiffSlide(_existing(options, key, options.mask), values=True)
    own, full = mask.levels[0], slide.levels[0]
    across, down = full.width / own.width, full.height / own.height
    # A smaller mask was rounded to whole pixels: at most one is missing along a side.
    fits = abs(full.height - own.height * across) <= max(across, 1) and across >= 0.99
    problem = mask.values_problem()
    if problem or not fits:
        mask.close()
    if problem:
        raise BadSlide("mask of the slide isn't a label map", problem)
    if not fits:
        sizes = f"{own.width} x {own.height} for {full.width} x {full.height}"
        raise BadSlide(
            "mask doesn't fit the slide", f"{sizes}: factors {across:.4g} and {down:.4g}"
        )
    return mask
