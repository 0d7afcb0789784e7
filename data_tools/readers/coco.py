# SPDX-License-Identifier: Apache-2.0

"""COCO's annotation file: boxes, polygons or run-length codes of one JSON for many images.

The file is held as a whole while the job's main process hands out its images, about six times its size.
Format: cocodataset.org/#format-data; masks by pycocotools.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from data_tools.readers import SourceOptions
from data_tools.readers.files import file_of, folder_of, open_sized
from data_tools.readers.shapes import polygon_mask, run_length_mask, turned, upright_box
from data_tools.records import NOTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import SourceError, Unusable

STRAYS = "annotations without an image"


class Options(SourceOptions):
    """Keys of ``reader: coco``.

    Args:
        annotations: the JSON file.
        images: folder that ``file_name`` is below; default the root.
        regions: ``boxes`` takes ``bbox``; ``masks`` takes ``segmentation``, and cleaning makes boxes of it.
        group_key: key of an entry of ``images`` that tells patient or case, such as ``patient_id``.
    """

    default_source_task: ClassVar[str] = "2D detection"

    reader: Literal["coco"]
    annotations: str
    images: str = ""
    regions: Literal["boxes", "masks"] = "boxes"
    group_key: str | None = None


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each entry of ``images`` in the file's order, and one for annotations of none of them.

    Raises:
        SourceError: the file is no COCO file.
    """
    path = file_of(options, options.annotations, key="annotations")
    if options.images:
        folder_of(options, options.images, key="images")
    images, found, categories = _load(path, options.name)
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    while found:
        entry = found.pop()
        by_image[_id(entry, "image_id")].append(_slim(entry, options))
    images = [image if isinstance(image, dict) else {} for image in images]
    keys = Counter(_id(image, "id") for image in images)
    names = Counter(str(image.get("file_name")) for image in images)
    # An annotation that names no image, or one by another type of id, may be of any.
    texts = {str(key) for key in keys}
    strays = {key: entries for key, entries in by_image.items() if key not in keys or key is None}
    lost = sorted({
        categories.get(_id(entry, "category_id"), "")
        for key, entries in strays.items()
        for entry in entries
        if key is None or str(key) in texts
    })  # fmt: skip
    for place, image in enumerate(images):
        key, name = _id(image, "id"), image.get("file_name")
        entries = by_image.get(key, [])[::-1]
        used = {_id(entry, "category_id") for entry in entries} & categories.keys()
        payload: dict[str, Any] = {"image": image, "annotations": entries, "lost": lost}
        payload["categories"] = {category: categories[category] for category in used}
        # Of two entries each has what the other lacks, and of one id nobody knows which image is meant.
        if key is None or keys[key] > 1:
            payload = {"drop": ("image without an id of its own", f"id {image.get('id')!r}")}
        elif names[str(name)] > 1:
            payload = {"drop": ("image listed twice", f"{name} has another id too")}
        yield Unit(f"images[{place}]" if "drop" in payload else f"{name}#{key}", payload)
    if strays:
        ids = [str(entry.get("image_id")) for entries in strays.values() for entry in entries]
        yield Unit(STRAYS, {"strays": ids})


def _load(path: Path, source: str) -> tuple[list[Any], list[Any], dict[Any, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"Source {source}: {path} is no JSON ({error}).") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            keys = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise SourceError(
                f"Source {source}: {path} is no COCO file: it needs the lists `images`, `annotations` and "
                f"`categories`, `{key}` is missing; there is {keys}."
            )
    categories: dict[Any, str] = {}
    for category in content["categories"]:
        number = _id(category, "id")
        name = category.get("name") if isinstance(category, dict) else None
        if number is None or not isinstance(name, str):
            raise SourceError(
                f"Source {source}: {path}: category without id or name: {category!r}."
            )
        if categories.setdefault(number, name) != name:
            raise SourceError(
                f"Source {source}: {path}: category id {number!r} is both "
                f"{categories[number]!r} and {name!r}."
            )
    return content["images"], content["annotations"], categories


def _id(entry: Any, key: str) -> int | str | None:
    """Return an id of an entry, None if there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _slim(entry: Any, options: Options) -> dict[str, Any]:
    """Return what is used of an annotation: a segmentation is long."""
    keys = ["id", "image_id", "category_id", "iscrowd"]
    keys.append("bbox" if options.regions == "boxes" else "segmentation")
    if not isinstance(entry, dict):
        return {}
    attributes = entry.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    turn = {"rotation": rotation, "bbox": entry.get("bbox")} if rotation else {}
    return {key: entry[key] for key in keys if key in entry} | turn


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the image of one entry with its annotations."""
    payload = unit.payload
    if "drop" in payload:
        raise Unusable(*payload["drop"])
    if "strays" in payload:
        for stray in payload["strays"]:
            reason = "annotation of an image that isn't listed"
            drops.add(reason, STRAYS, f"image_id {stray}", lost=NOTHING)
        return
    image = payload["image"]
    name = image.get("file_name")
    if not isinstance(name, str):
        raise Unusable("image without a file name", repr(name))
    path = f"{options.images}/{name}" if options.images else name
    found, size = open_sized(options, path, (image.get("width"), image.get("height")))
    drops.lose(*payload["lost"])  # counted with the strays
    annotations = []
    for entry in payload["annotations"]:
        label = payload["categories"].get(_id(entry, "category_id"), "")
        with drops.annotation(f"{unit.key} annotation {entry.get('id')}", label):
            annotations.append(_annotation(options, entry, payload["categories"], size))
    group = image.get(options.group_key) if options.group_key else None
    yield replace(
        found, annotations=tuple(annotations), group=None if group is None else str(group)
    )


def _annotation(
    options: Options, entry: dict[str, Any], categories: dict[Any, str], size: tuple[int, int]
) -> Annotation:
    category = _id(entry, "category_id")
    if category not in categories:
        raise Unusable("unknown class id", f"category_id {entry.get('category_id')!r}")
    if entry.get("iscrowd"):
        raise Unusable("crowd annotation", categories[category])
    # CVAT: `bbox` is the rectangle before it is turned; it has no segmentation, or the same rectangle's.
    corners = turned(_box(entry.get("bbox")), entry["rotation"]) if "rotation" in entry else None
    if options.regions == "boxes":
        box = upright_box(corners) if corners else _box(entry.get("bbox"))
        return Annotation(categories[category], box)
    shape = entry.get("segmentation")
    if corners and (not shape or (isinstance(shape, list) and np.shape(shape[0]) == (8,))):
        shape = [[value for corner in corners for value in corner]]
    if isinstance(shape, list):
        return Annotation(categories[category], mask=polygon_mask(shape, size, options.clean))
    return Annotation(categories[category], mask=run_length_mask(shape, size))


def _box(values: Any) -> tuple[float, float, float, float]:
    numbers = [
        float(value)
        for value in (values if isinstance(values, list) else ())
        if isinstance(value, int | float) and abs(value) < 2**53
    ]
    if len(numbers) != 4 or len(values) != 4 or not all(map(math.isfinite, numbers)):
        raise Unusable("box that can't be read", f"bbox {values!r}"[:200])
    x, y, width, height = numbers
    return (x, y, x + width, y + height)
