# SPDX-License-Identifier: Apache-2.0

"""Labels of a slide's tiles: the slide's class, rows of a table, outlines or a label map.

Outlines are what a pathologist drew on the slide: GeoJSON (QuPath) and XML (ASAP, Aperio ImageScope). Their
coordinates are full-resolution pixels; an outline becomes a mask ``[H, W]`` of the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from defusedxml import ElementTree

from data_tools.readers.file_rows import FileRow, beside
from data_tools.readers.files import file_below
from data_tools.readers.slide_files import Scale, SlideFile, TiffSlide
from data_tools.records import Annotation, Drops, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.strict_json import STRICT_JSON

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from data_tools.readers.slide import Options

BAD_REGIONS = "regions of the slide can't be read"
NOT_THERE = "slide without its regions"
NO_REGION = "mark on the slide that encloses nothing"


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile that is to be read: its corner in full-resolution pixels, and its own rows of the table."""

    where: str
    x: int
    y: int
    scale: Scale
    rows: tuple[FileRow, ...] = ()


Labeller = Callable[[Tile, Drops], list[Annotation]]
"""Returns the annotations of a tile or raises `Unusable`; labels of which it has too little are lost."""


def labeller_of(
    options: Options, unit: Unit, slide: SlideFile, drops: Drops, stack: ExitStack
) -> Labeller:
    """Return what labels the tiles of a slide, whose rows of a table the unit has; ``stack`` closes its mask.

    Marks on the slide that enclose nothing are dropped. `Unusable` if outlines or mask can't be read, or
    don't fit the slide.
    """
    key = unit.key
    if options.mask is not None:
        path = file_below(options, beside(key, options.mask), NOT_THERE)
        mask = stack.enter_context(closing(TiffSlide(path, values=True)))
        _check_mask(mask, slide)
        return partial(_of_mask, options, slide, mask)
    if options.regions is not None:
        outlines = read_outlines(file_below(options, beside(key, options.regions), NOT_THERE))
        for mark in (outline for outline in outlines if not outline.rings):
            drops.add(NO_REGION, key, mark.label, lost=[mark.label])
        return partial(_of_outlines, options, [outline for outline in outlines if outline.rings])
    folder = Path(key).parent.name if options.table is None else None

    def of_rows(tile: Tile, _: Drops) -> list[Annotation]:
        own = tile.rows if options.columns.x else unit.payload or ()
        said = [Annotation(r.label, r.box, attributes=r.attributes) for r in own if r.label]
        return [Annotation(folder)] if folder else said

    return of_rows


def _of_outlines(
    options: Options, outlines: Sequence[Outline], tile: Tile, drops: Drops
) -> list[Annotation]:
    size = (options.tile, options.tile)
    drawn = [(o, o.mask(tile.x, tile.y, tile.scale.full, size)) for o in outlines]
    masks: list[tuple[str, np.ndarray]] = []
    for outline, mask in drawn:
        if mask is None or outline.negative or outline.label in options.exclude:
            continue
        for other, cut in drawn:
            is_negative = other.negative and other.label == outline.label
            if cut is not None and (is_negative or other.label in options.exclude):
                mask = mask & ~cut
        masks.append((outline.label, mask))
    if hidden := [label for label, mask in masks if not mask.any()]:
        drops.add("region in an excluded one, or without a pixel", tile.where, lost=hidden)
    return _of_masks(options, [(label, mask) for label, mask in masks if mask.any()], tile, drops)


def _of_mask(
    options: Options, slide: SlideFile, mask: SlideFile, tile: Tile, drops: Drops
) -> list[Annotation]:
    level, factor = mask.levels[0], slide.levels[0].width / mask.levels[0].width
    # The mask's pixel under the middle of every pixel of the tile.
    along = (np.arange(options.tile) + 0.5) * tile.scale.full
    columns = np.minimum(((tile.x + along) / factor).astype(np.int64), level.width - 1)
    lines = np.minimum(((tile.y + along) / factor).astype(np.int64), level.height - 1)
    left, top = int(columns[0]), int(lines[0])
    part = mask.read(0, left, top, int(columns[-1]) - left + 1, int(lines[-1]) - top + 1)
    values = part[lines - top][:, columns - left]
    codes = [code for code in np.unique(values).tolist() if code != options.mask_background]
    return _of_masks(options, [(str(int(code)), values == code) for code in codes], tile, drops)


def _of_masks(
    options: Options, masks: Sequence[tuple[str, np.ndarray]], tile: Tile, drops: Drops
) -> list[Annotation]:
    if not masks:
        if not options.outside:
            raise Unusable("tile without a region")
        return [Annotation(options.outside)]
    if options.regions_as == "boxes":
        return [Annotation(label, mask=mask) for label, mask in masks]
    covered: dict[str, np.ndarray] = {}
    for label, mask in masks:
        covered[label] = covered.get(label, False) | mask
    names = [name for name, mask in covered.items() if mask.mean() >= options.min_region]
    if not names:
        raise Unusable("tile with too little of a region")
    if lost := [name for name in covered if name not in names]:
        drops.add("region that covers too little of its tile", tile.where, lost=lost)
    return [Annotation(name) for name in names]


def _check_mask(mask: TiffSlide, slide: SlideFile) -> None:
    own, full = mask.levels[0], slide.levels[0]
    across, down = full.width / own.width, full.height / own.height
    # A smaller mask was rounded to whole pixels: at most one is missing along a side.
    if abs(full.height - own.height * across) > max(across, 1) or across < 0.99:
        sizes = f"{own.width} x {own.height} for {full.width} x {full.height}"
        detail = f"{sizes}: factors {across:.4g}, {down:.4g}"
        raise Unusable("mask doesn't fit the slide", detail)


_BAD = (
    *(OSError, ElementTree.ParseError, ValueError, KeyError, TypeError),
    *(AttributeError, RecursionError),
)
Ring = np.ndarray
"""float64 ``[points, 2]``: x, y."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One closed region.

    ``rings`` are the outer one, then the holes in it; none of a point, a line or an arrow. A ``negative`` one
    is cut out of the other regions of its label.
    """

    label: str
    rings: tuple[Ring, ...] = ()
    negative: bool = False

    def mask(self, x: float, y: float, scale: float, size: tuple[int, int]) -> np.ndarray | None:
        """Return bool ``[H, W]`` of the part in a tile of width and height, None where it doesn't touch it.

        The corner ``x``, ``y``, and ``scale`` along one of the tile's pixels, are full-resolution pixels.
        """
        rings = [(ring - (x, y)) / scale for ring in self.rings]
        low, high = rings[0].min(axis=0), rings[0].max(axis=0)
        if (high < 0).any() or (low > size).any():
            return None
        mask = _filled(rings, size)
        # A region so small that it has no pixel is in the tile all the same.
        inside = (low >= 0).all() and (high <= size).all()
        return mask if inside or mask.any() else None


def _filled(rings: Sequence[Ring], size: tuple[int, int]) -> np.ndarray:
    """Return bool ``[H, W]``: pixels whose middle lies inside of an odd number of rings.

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
    """Return every outline of a file, in its order, or raise `Unusable`."""
    try:
        if path.suffix.lower() == ".xml":
            root = ElementTree.parse(path).getroot()
            if root is None:
                raise ValueError("no element at all")
            return list(_xml(root))
        return list(_geojson(STRICT_JSON.decode(path.read_text(encoding="utf-8"))))
    except _BAD as error:
        raise Unusable(BAD_REGIONS, f"{type(error).__name__}: {error}") from error


def _geojson(document: Any) -> Iterator[Outline]:
    features = document if isinstance(document, list) else document.get("features", [document])
    for feature in features:
        properties = feature.get("properties") or {}
        label = (properties.get("classification") or {}).get("name") or properties.get("name") or ""
        geometry = feature["geometry"]
        kind, coordinates = geometry["type"], geometry.get("coordinates", ())
        if kind not in ("Polygon", "MultiPolygon"):
            yield Outline(str(label))
            continue
        for rings in [coordinates] if kind == "Polygon" else coordinates:
            yield Outline(str(label), tuple(_ring(ring) for ring in rings))


def _xml(root: Element) -> Iterator[Outline]:
    if root.tag == "ASAP_Annotations":
        for annotation in root.iter("Annotation"):
            group = annotation.get("PartOfGroup", "None")
            label = annotation.get("Name", "") if group == "None" else group
            if annotation.get("Type") not in ("Polygon", "Rectangle", "Spline"):
                yield Outline(label)
                continue
            points = sorted(annotation.iter("Coordinate"), key=lambda c: float(c.get("Order", 0)))
            yield Outline(label, (_ring([(c.get("X"), c.get("Y")) for c in points]),))
    elif root.tag == "Annotations":
        for annotation in root.iter("Annotation"):
            for region in annotation.iter("Region"):
                label = region.get("Text") or annotation.get("Name") or ""
                if region.get("Type", "0") not in ("0", "1"):  # ellipse, arrow, ruler: two points
                    yield Outline(label)
                    continue
                ring = _ring([(v.get("X"), v.get("Y")) for v in region.iter("Vertex")])
                yield Outline(label, (ring,), region.get("NegativeROA") == "1")
    else:
        raise ValueError(f"<{root.tag}> is neither <ASAP_Annotations> nor Aperio's <Annotations>")


def _ring(points: Sequence[Sequence[Any]]) -> Ring:
    ring = np.array([[float(value) for value in point[:2]] for point in points], dtype=np.float64)
    if ring.ndim != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError(f"an outline needs three points or more, got {len(ring)}")
    return ring
