# SPDX-License-Identifier: Apache-2.0

"""labelme's JSON: a file for each image, with polygons, rectangles, circles and masks.

Format: github.com/wkentaro/labelme, ``labelme/_label_file.py``. The image inside of the JSON is not read.
"""

from __future__ import annotations

import base64
import binascii
import math
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np

from data_tools.preprocess.clean import components
from data_tools.readers import SourceOptions, files
from data_tools.records import ANYTHING, NOTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import ImageError, Unusable
from gmai_xtuner.core.imaging.images import decode_pixels
from gmai_xtuner.core.strict_json import STRICT_JSON

BAD = "JSON of labelme that can't be read"
_RESERVED = {"__ignore__": (ANYTHING,), "_background_": NOTHING}
"""labelme's own labels (labelme2voc.py) -> what may be lost with them."""


class Options(SourceOptions):
    """Keys of ``reader: labelme``.

    JSON files lie in ``annotations``, by default the root; ``imagePath`` is relative to them. ``regions:
    masks`` takes shapes as they are drawn, ``boxes`` the upright boxes around them.
    """

    masks_are_objects: ClassVar[bool] = True
    default_source_task: ClassVar[str] = "2D segmentation"

    annotations: str = ""
    regions: Literal["masks", "boxes"] = "masks"


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each JSON file."""
    yield from map(Unit, files.annotation_files(options, options.annotations, ".json"))


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the image of one JSON file with its shapes; a flag that is set is a label of the whole image."""
    try:
        content = STRICT_JSON.decode(
            files.read_annotation_file(options, unit.key, BAD).decode("utf-8-sig")
        )
    except (ValueError, RecursionError) as error:
        raise Unusable(BAD, type(error).__name__) from error
    shapes = content.get("shapes") if isinstance(content, dict) else None
    name = content.get("imagePath") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not isinstance(name, str):
        raise Unusable("JSON without `shapes` and `imagePath`", "not written by labelme?")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(unit.key), name.replace("\\", "/")))
    stated = (content.get("imageWidth"), content.get("imageHeight"))
    found, size = files.open_sized(options, path, stated)
    flags = content.get("flags") if isinstance(content.get("flags"), dict) else {}
    annotations = [Annotation(key) for key, is_set in flags.items() if is_set is True]
    objects: dict[Any, list[Annotation]] = {}
    for number, shape in enumerate(shapes):
        shape = shape if isinstance(shape, dict) else {}
        label = shape.get("label")
        label = label.strip() if isinstance(label, str) else ""
        where = f"{unit.key} shape {number}"
        if label in _RESERVED:
            drops.add("shape whose label labelme reserves", where, label, lost=_RESERVED[label])
            continue
        with drops.annotation(where, label):
            if not label:
                raise Unusable("no label", "a shape without a name")
            piece = _annotation(options, shape, label, size)
            group = shape.get("group_id")  # shapes of one label and group are one object
            key = number if group is None else (label, str(group))
            objects.setdefault(key, []).append(piece)
    annotations += map(_joined, objects.values())
    yield replace(found, annotations=tuple(annotations))


def _joined(pieces: list[Annotation]) -> Annotation:
    """Return one object, drawn as several shapes; its box keeps cleaning from splitting it."""
    masks = [piece.mask for piece in pieces if piece.mask is not None]
    boxes = [piece.box for piece in pieces if piece.box is not None]
    boxes += [box for mask in masks for box, _ in components(mask, split=False)]
    if len(pieces) == 1 or not boxes:
        return pieces[0]
    box = files.upright_box([corner for x1, y1, x2, y2 in boxes for corner in ((x1, y1), (x2, y2))])
    whole = np.any(masks, axis=0) if len(masks) == len(pieces) else None
    return replace(pieces[0], box=box, mask=whole)


def _annotation(
    options: Options, shape: dict[str, Any], label: str, size: tuple[int, int]
) -> Annotation:
    kind = shape.get("shape_type", "polygon")
    points = _points(shape.get("points"))
    if kind == "rectangle" and len(points) in (2, 4):  # other tools write all corners
        return Annotation(label, files.upright_box(points))
    if kind == "mask" and len(points) == 2:
        return Annotation(label, mask=_mask(shape.get("mask"), points[0], size))
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        angles = np.linspace(0, 2 * math.pi, 90, endpoint=False).tolist()
        points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    elif kind not in ("polygon", "rotated_rectangle", "oriented_rectangle", "rotation"):
        raise Unusable("shape that is no region", f"{kind} of {len(points)} points"[:200])
    if options.regions == "boxes":
        return Annotation(label, files.upright_box(points))
    flat = [value for point in points for value in point]
    return Annotation(label, mask=files.polygon_mask([flat], size, options.clean))


def _points(values: Any) -> list[tuple[float, float]]:
    try:
        found = [files.numbers({"x": x, "y": y}) for x, y in values]
        return [(place["x"], place["y"]) for place in found] or [(0.0, 0.0)]
    except (TypeError, ValueError) as error:
        raise Unusable("polygon that can't be read", str(error)[:200]) from error


def _mask(text: Any, corner: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """Return the mask of the image from a PNG of its box, in base64."""
    try:
        pixels = decode_pixels(base64.b64decode(text, validate=True), "mask").pixels
    except (TypeError, binascii.Error, ValueError, ImageError) as error:
        raise Unusable("mask that can't be read", str(error)[:200]) from error
    x, y = round(corner[0]), round(corner[1])
    height, width = pixels.shape[:2]
    if min(x, y) < 0 or x + width > size[0] or y + height > size[1] or pixels.ndim != 2:
        detail = f"{width} x {height} at {x}, {y} in {size[0]} x {size[1]}"
        raise Unusable("mask of another size than its image", detail)
    whole = np.zeros(size[::-1], dtype=bool)
    whole[y : y + height, x : x + width] = pixels > 0
    return whole
