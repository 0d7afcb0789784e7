"""Outlines that a pathologist drew on a slide: GeoJSON (QuPath) and XML (ASAP, Aperio ImageScope).

Coordinates are full-resolution pixels of the slide; an outline becomes a mask ``[H, W]`` of the tile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from defusedxml import ElementTree

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

Ring = np.ndarray
"""float64 ``[points, 2]``: x, y."""


class BadRegions(ValueError):
    """A file of outlines that can't be used as a whole."""


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
        return mask if mask.any() else None


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
    """Every outline of a file, in its order.

    Raises:
        BadRegions: not such a file, or an outline that is none.
    """
    try:
        if path.suffix.lower() == ".xml":
            root = ElementTree.parse(path).getroot()
            if root is None:
                raise ValueError("no element at all")
            return list(_xml(root))
        return list(_geojson(json.loads(path.read_text(encoding="utf-8"))))
    except (
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        ElementTree.ParseError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        ValueError,
    ) as error:
        raise BadRegions(f"{type(error).__name__}: {error}") from error


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
