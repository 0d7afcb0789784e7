# SPDX-License-Identifier: Apache-2.0

"""Labels of a slide's tiles: the slide's class, rows of a table, outlines or a label map.

Outlines are what a pathologist drew on the slide: GeoJSON (QuPath) and XML (ASAP, Aperio ImageScope). Their
coordinates are full-resolution pixels; an outline becomes a mask ``[H, W]`` of the tile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from defusedxml import ElementTree

from data_tools.readers.file_rows import FileRow, beside, folder_name
from data_tools.readers.files import file_below
from data_tools.readers.slide_files import Scale, SlideFile, TiffSlide
from data_tools.records import Annotation, Drops
from gmai_xtuner.core.errors import Unusable

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from data_tools.readers.slide import Options

BAD_REGIONS = "regions of the slide can't be read"


class Labeller:
    """The labels of a slide's tiles."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def annotations(self, tile: Tile, drops: Drops) -> list[Annotation]:
        """Return the annotations of a tile; labels of which it has too little go to ``drops``.

        Raises:
            Unusable: the tile is left out.
        """
        raise NotImplementedError

    def of_masks(
        self, masks: Sequence[tuple[str, np.ndarray]], tile: Tile, drops: Drops
    ) -> list[Annotation]:
        """Return the regions of a tile as the job wants them."""
        options = self.options
        if not masks:
            if not options.outside:
                raise Unusable("tile without a region")
            return [Annotation(options.outside)]
        if options.regions_as == "boxes":
            return [Annotation(label, mask=mask) for label, mask in masks]
        covered: dict[str, np.ndarray] = {}
        for label, mask in masks:
            covered[label] = covered[label] | mask if label in covered else mask
        names = [name for name, mask in covered.items() if mask.mean() >= options.min_region]
        if not names:
            raise Unusable("tile with too little of a region")
        if lost := [name for name in covered if name not in names]:
            drops.add("region that covers too little of its tile", tile.where, lost=lost)
        return [Annotation(name) for name in names]


class OfSlide(Labeller):
    """The slide's class, or rows of the table that name the tile."""

    def __init__(self, options: Options, key: str, rows: Sequence[FileRow]) -> None:
        super().__init__(options)
        self._whole = annotations_of(rows)
        if options.table is None and (folder := folder_name(key)):
            self._whole = [Annotation(folder)]

    def annotations(self, tile: Tile, drops: Drops) -> list[Annotation]:
        return annotations_of(tile.rows) if self.options.columns.x else self._whole


class OfOutlines(Labeller):
    """Outlines drawn on the slide."""

    def __init__(self, options: Options, outlines: Sequence[Outline]) -> None:
        super().__init__(options)
        self._outlines = [o for o in outlines if o.label not in options.exclude]
        self._excluded = [o for o in outlines if o.label in options.exclude]

    def annotations(self, tile: Tile, drops: Drops) -> list[Annotation]:
        size = (self.options.tile, self.options.tile)

        def drawn(outlines: Sequence[Outline]) -> list[tuple[str, np.ndarray]]:
            found = [(o.label, o.mask(tile.x, tile.y, tile.scale.full, size)) for o in outlines]
            return [(label, mask) for label, mask in found if mask is not None]

        excluded = np.zeros(size, dtype=bool)
        for _, mask in drawn(self._excluded):
            excluded |= mask
        left = [(label, mask & ~excluded) for label, mask in drawn(self._outlines)]
        if hidden := [label for label, mask in left if not mask.any()]:
            drops.add("region in an excluded one, or without a pixel", tile.where, lost=hidden)
        return self.of_masks([(label, mask) for label, mask in left if mask.any()], tile, drops)


class OfMask(Labeller):
    """A label map of the slide, of the same size or smaller by one factor."""

    def __init__(self, options: Options, slide: SlideFile, mask: SlideFile) -> None:
        super().__init__(options)
        self._mask = mask
        self._factor = slide.levels[0].width / mask.levels[0].width

    def annotations(self, tile: Tile, drops: Drops) -> list[Annotation]:
        level = self._mask.levels[0]
        # The mask's pixel under the middle of every pixel of the tile.
        along = (np.arange(self.options.tile) + 0.5) * tile.scale.full
        columns = np.minimum(((tile.x + along) / self._factor).astype(np.int64), level.width - 1)
        lines = np.minimum(((tile.y + along) / self._factor).astype(np.int64), level.height - 1)
        left, top = int(columns[0]), int(lines[0])
        part = self._mask.read(0, left, top, int(columns[-1]) - left + 1, int(lines[-1]) - top + 1)
        values = part[lines - top][:, columns - left]
        present = [int(value) for value in np.unique(values)]
        masks = [(str(n), values == n) for n in present if n != self.options.mask_background]
        return self.of_masks(masks, tile, drops)


def annotations_of(rows: Sequence[FileRow]) -> list[Annotation]:
    """Return what rows of a table say, without those whose label is empty."""
    return [Annotation(r.label, r.box, attributes=r.attributes) for r in rows if r.label]


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile that is to be read.

    Args:
        where: for drops.
        x, y: full-resolution pixels of its upper left corner.
        scale: of the slide.
        rows: of the table, its own.
    """

    where: str
    x: int
    y: int
    scale: Scale
    rows: tuple[FileRow, ...] = ()


def _existing(options: Options, key: str, pattern: str) -> Path:
    return file_below(options, beside(key, pattern), "slide without its regions")


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
        raise Unusable("mask of the slide isn't a label map", problem)
    if not fits:
        sizes = f"{own.width} x {own.height} for {full.width} x {full.height}"
        raise Unusable(
            "mask doesn't fit the slide", f"{sizes}: factors {across:.4g} and {down:.4g}"
        )
    return mask


# --- outlines -------------------------------------------------------------------------------------

Ring = np.ndarray
"""float64 ``[points, 2]``: x, y."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One closed region.

    Args:
        label: class, group or name that it was given; "" without one.
        rings: the outer ring, then the holes in it.
    """

    label: str
    rings: tuple[Ring, ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 of the outer ring."""
        low, high = self.rings[0].min(axis=0), self.rings[0].max(axis=0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def mask(self, x: float, y: float, scale: float, size: tuple[int, int]) -> np.ndarray | None:
        """bool ``[H, W]`` of the part in a tile, None where it doesn't touch it.

        Args:
            x, y: the tile's corner in full-resolution pixels.
            scale: full-resolution pixels along one of the tile's.
            size: ``(width, height)`` of the tile.
        """
        x1, y1, x2, y2 = self.box
        if x2 < x or y2 < y or x1 > x + size[0] * scale or y1 > y + size[1] * scale:
            return None
        rings = [(ring - (x, y)) / scale for ring in self.rings]
        mask = _filled(rings, size)
        # A region so small that it has no pixel is in the tile all the same.
        inside = x <= x1 and y <= y1 and x2 <= x + size[0] * scale and y2 <= y + size[1] * scale
        return mask if inside or mask.any() else None


def _filled(rings: Sequence[Ring], size: tuple[int, int]) -> np.ndarray:
    """bool ``[H, W]``: pixels whose middle lies inside of an odd number of rings.

    Every edge that crosses the middle of a pixel row flips what lies to the right of the crossing; edges
    outside of the tile cost next to nothing, however long they are.
    """
    width, height = size
    flips = np.zeros((height, width + 1), dtype=np.uint8)
    for ring in rings:
        x1, y1 = ring.T
        x2, y2 = np.roll(ring, -1, axis=0).T
        # Rows whose middle y + 0.5 lies in [low, high) of the edge.
        first = np.clip(np.ceil(np.minimum(y1, y2) - 0.5), 0, height).astype(np.int64)
        count = np.clip(np.ceil(np.maximum(y1, y2) - 0.5), 0, height).astype(np.int64) - first
        edge = np.repeat(np.arange(len(ring)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        share = (row + 0.5 - y1[edge]) / (y2 - y1)[edge]
        crossing = x1[edge] + share * (x2 - x1)[edge]
        column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
        np.add.at(flips, (row, column), 1)
    return (np.cumsum(flips, axis=1, dtype=np.uint8)[:, :width] & 1).astype(bool)


def read_outlines(path: Path) -> list[Outline]:
    """Return every outline of a file, in its order.

    Raises:
        Unusable: not such a file, or an outline that is none.
    """
    try:
        if path.suffix.lower() == ".xml":
            root = ElementTree.parse(path).getroot()
            if root is None:
                raise ValueError("no element at all")
            return list(_xml(root))
        return list(_geojson(json.loads(path.read_text(encoding="utf-8"))))
    except (
        *(OSError, ElementTree.ParseError, ValueError),
        *(KeyError, TypeError, AttributeError, RecursionError),
    ) as error:
        raise Unusable(BAD_REGIONS, f"{type(error).__name__}: {error}") from error


def _geojson(document: Any) -> Iterator[Outline]:
    features = document if isinstance(document, list) else document.get("features", [document])
    for feature in features:
        properties = feature.get("properties") or {}
        label = (properties.get("classification") or {}).get("name") or properties.get("name") or ""
        geometry = feature["geometry"]
        kind, coordinates = geometry["type"], geometry["coordinates"]
        if kind == "Polygon":
            coordinates = [coordinates]
        elif kind != "MultiPolygon":
            raise ValueError(f"a {kind} encloses nothing; expected Polygon or MultiPolygon")
        for rings in coordinates:
            yield Outline(str(label), tuple(_ring(ring) for ring in rings))


def _xml(root: Element) -> Iterator[Outline]:
    if root.tag == "ASAP_Annotations":
        for annotation in root.iter("Annotation"):
            if annotation.get("Type") in ("Polygon", "Rectangle", "Spline"):
                group = annotation.get("PartOfGroup", "None")
                label = annotation.get("Name", "") if group == "None" else group
                points = sorted(
                    annotation.iter("Coordinate"), key=lambda c: float(c.get("Order", 0))
                )
                yield Outline(label, (_ring([(c.get("X"), c.get("Y")) for c in points]),))
    elif root.tag == "Annotations":
        for annotation in root.iter("Annotation"):
            label = annotation.get("Name", "")
            for region in annotation.iter("Region"):
                ring = _ring([(v.get("X"), v.get("Y")) for v in region.iter("Vertex")])
                yield Outline(region.get("Text") or label, (ring,))
    else:
        raise ValueError(f"<{root.tag}> is neither <ASAP_Annotations> nor Aperio's <Annotations>")


def _ring(points: Sequence[Sequence[Any]]) -> Ring:
    ring = np.array([[float(value) for value in point[:2]] for point in points], dtype=np.float64)
    if ring.ndim != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError(f"an outline needs three points or more, got {len(ring)}")
    return ring
