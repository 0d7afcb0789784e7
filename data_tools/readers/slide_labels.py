# SPDX-License-Identifier: Apache-2.0

"""Labels of a slide's tiles: the slide's class, rows of a table, outlines or a label map.

Outlines are what a pathologist drew on the slide: GeoJSON (QuPath) and XML (ASAP, Aperio ImageScope). Their
coordinates are full-resolution pixels; an outline becomes a mask ``[H, W]`` of the tile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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


NO_REGION = "mark on the slide that encloses nothing"


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


Labeller = Callable[[Tile, Drops], list[Annotation]]
"""Returns the annotations of a tile or raises `Unusable`; labels of which it has too little are lost."""


def labeller_of(
    options: Options,
    key: str,
    rows: Sequence[FileRow],
    slide: SlideFile,
    drops: Drops,
    stack: ExitStack,
) -> Labeller:
    """Return what labels the tiles of a slide.

    Args:
        options: of the source.
        key: path of the slide below the root.
        rows: of the table that name it.
        slide: open.
        drops: takes marks on the slide that enclose nothing.
        stack: closes the slide's mask.

    Raises:
        Unusable: outlines or mask can't be read, or don't fit the slide.
    """
    if options.mask is not None:
        mask = _open_mask(_beside(options, key, options.mask), slide)
        stack.callback(mask.close)
        return partial(_of_mask, options, slide, mask)
    if options.regions is not None:
        outlines = read_outlines(_beside(options, key, options.regions))
        for mark in (outline for outline in outlines if not outline.rings):
            drops.add(NO_REGION, key, mark.label, lost=[mark.label])
        return partial(_of_outlines, options, [outline for outline in outlines if outline.rings])
    whole = annotations_of(rows)
    if options.table is None and (folder := folder_name(key)):
        whole = [Annotation(folder)]
    return lambda tile, _: annotations_of(tile.rows) if options.columns.x else whole


def annotations_of(rows: Sequence[FileRow]) -> list[Annotation]:
    """Return what rows of a table say, without those whose label is empty."""
    return [Annotation(r.label, r.box, attributes=r.attributes) for r in rows if r.label]


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
            if cut is not None and (
                other.label in options.exclude or (other.negative and other.label == outline.label)
            ):
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
    """Return the regions of a tile as the job wants them."""
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


def _beside(options: Options, key: str, pattern: str) -> Path:
    return file_below(options, beside(key, pattern), "slide without its regions")


def _open_mask(path: Path, slide: SlideFile) -> SlideFile:
    mask = TiffSlide(path, values=True)
    own, full = mask.levels[0], slide.levels[0]
    across, down = full.width / own.width, full.height / own.height
    reason, detail = "mask of the slide isn't a label map", mask.values_problem()
    # A smaller mask was rounded to whole pixels: at most one is missing along a side.
    if not detail and (abs(full.height - own.height * across) > max(across, 1) or across < 0.99):
        sizes = f"{own.width} x {own.height} for {full.width} x {full.height}"
        reason, detail = "mask doesn't fit the slide", f"{sizes}: factors {across:.4g}, {down:.4g}"
    if detail:
        mask.close()
        raise Unusable(reason, detail)
    return mask


# --- outlines -------------------------------------------------------------------------------------

Ring = np.ndarray
"""float64 ``[points, 2]``: x, y."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One closed region.

    Args:
        label: class, group or name that it was given; "" without one.
        rings: the outer ring, then the holes in it; none of a point, a line or an arrow.
        negative: it is cut out of the other regions of its label.
    """

    label: str
    rings: tuple[Ring, ...] = ()
    negative: bool = False

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
