# SPDX-License-Identifier: Apache-2.0

"""COCO's annotation file: boxes, polygons or run-length codes of one JSON for many images.

The file is held as a whole while the job's main process hands out its images, about six times its size.
Format: cocodataset.org/#format-data; masks by pycocotools.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np

from data_tools.licences import read as read_licence
from data_tools.readers import SourceOptions, files
from data_tools.records import NOTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable

VERSION = 2
STRAYS = "annotations without an image"
_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/licenses/([a-z-]+)/(\d\.\d)", re.IGNORECASE)
UNLISTED = "annotation of an image that isn't listed"


class Options(SourceOptions):
    """Keys of ``reader: coco``.

    ``annotations`` is the JSON file, ``images`` the folder that ``file_name`` is below, by default the root.
    ``regions: boxes`` takes ``bbox``; ``masks`` takes ``segmentation``, and cleaning makes boxes of it.
    ``group_key`` of an entry of ``images`` tells patient or case. ``image_licences``: an entry's ``license``
    is its own licence instead of the source's, by name or Creative Commons address in ``licenses``.
    """

    masks_are_objects: ClassVar[bool] = True
    default_source_task: ClassVar[str] = "2D detection"

    annotations: str
    images: str = ""
    regions: Literal["boxes", "masks"] = "boxes"
    group_key: str | None = None
    image_licences: bool = True

    @property
    def names_licences(self) -> bool:
        return self.image_licences


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each entry of ``images`` in the file's order, and one for strays."""
    if options.images:
        files.folder_of(options, options.images, key="images")
    images, found, categories, licences = _load(options)
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    while found:
        entry = found.pop()
        by_image[_id(entry, "image_id")].append(_slim(entry, options))
    images = [image if isinstance(image, dict) else {} for image in images]
    keys = Counter(_id(image, "id") for image in images)
    names = Counter(str(image.get("file_name")) for image in images)
    # An annotation that names no image, or one by another type of id, may be of any.
    texts = {str(key) for key in keys}
    alone = {None, *(by_image.keys() - keys.keys())}
    strays = [(key, entry) for key in by_image if key in alone for entry in by_image[key]]
    may_be_any = [entry for key, entry in strays if key is None or str(key) in texts]
    lost = sorted({categories.get(_id(entry, "category_id"), "") for entry in may_be_any})
    for place, image in enumerate(images):
        key, name = _id(image, "id"), image.get("file_name")
        # Of two entries each has what the other lacks, and of one id nobody knows which image is meant.
        if key is None or keys[key] > 1:
            drop = ("image without an id of its own", f"id {image.get('id')!r}")
        elif names[str(name)] > 1:
            drop = ("image listed twice", f"{name} has another id too")
        elif (licence := _own_licence(options, image, licences)) is None:
            drop = ("licence of the image isn't listed", f"{name}: license {image['license']!r}")
        else:
            entries = by_image.get(key, [])[::-1]
            used = {_id(entry, "category_id") for entry in entries} & categories.keys()
            payload = {"image": image, "annotations": entries, "lost": lost}
            payload |= {"licence": licence} if licence else {}
            payload["categories"] = {category: categories[category] for category in used}
            yield Unit(f"{name}#{key}", payload)
            continue
        yield Unit(f"images[{place}]", {"drop": drop})
    if strays:
        yield Unit(STRAYS, {"strays": [str(entry.get("image_id")) for _, entry in strays]})


def _load(options: Options) -> tuple[list[Any], list[Any], dict[Any, str], dict[Any, str]]:
    path = files.file_of(options, options.annotations, key="annotations")
    content = files.read_json(options, path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            keys = sorted(content) if isinstance(content, dict) else type(content).__name__
            needs = "it needs the lists `images`, `annotations` and `categories`"
            missing = f"`{key}` is missing; there is {keys}"
            raise files.wrong(options, f"{path} is no COCO file: {needs}, {missing}.")
    categories: dict[Any, str] = {}
    for category in content["categories"]:
        number = _id(category, "id")
        name = category.get("name") if isinstance(category, dict) else None
        if number is None or not isinstance(name, str):
            raise files.wrong(options, f"{path}: category without id or name: {category!r}.")
        if (known := categories.setdefault(number, name)) != name:
            problem = f"category id {number!r} is both {known!r} and {name!r}"
            raise files.wrong(options, f"{path}: {problem}.")
    licences: dict[Any, str] = {}
    listed = content.get("licenses") or []
    for entry in listed if isinstance(listed, list) else [listed]:
        if (number := _id(entry, "id")) is None:
            raise files.wrong(options, f"{path}: licence without an id: {entry!r}.")
        name = _licence(entry)
        demands = read_licence(str(entry.get("name"))).demands
        if demands not in (("unknown",), read_licence(name).demands):
            problem = f"licence id {number!r} is {entry['name']!r}, and {name!r} by its url"
            raise files.wrong(options, f"{path}: {problem}.")
        if licences.setdefault(number, name) != name:
            problem = f"licence id {number!r} is both {licences[number]!r} and {name!r}"
            raise files.wrong(options, f"{path}: {problem}.")
    return content["images"], content["annotations"], categories, licences


def _own_licence(options: Options, image: dict[str, Any], licences: dict[Any, str]) -> str | None:
    """Return the licence of an entry of ``images``; empty: the source's; None: it isn't listed."""
    if not options.image_licences or image.get("license") is None:
        return ""
    return licences.get(_id(image, "license"))


def _licence(entry: dict[str, Any]) -> str:
    """Return the name of a licence; empty where nothing is said, as in the forms that tools fill in."""
    url, name = (str(entry.get(key) or "").strip() for key in ("url", "name"))
    if match := _CREATIVE_COMMONS.search(url):
        return f"CC {match[1].upper()} {match[2]}"
    return name or url


def _id(entry: Any, key: str) -> int | str | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _slim(entry: Any, options: Options) -> dict[str, Any]:
    """Return what is used of an annotation: a segmentation is long."""
    if not isinstance(entry, dict):
        return {}
    keys = ["id", "image_id", "category_id", "iscrowd", "ignore"]
    keys.append("bbox" if options.regions == "boxes" else "segmentation")
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
            drops.add(UNLISTED, STRAYS, f"image_id {stray}", lost=NOTHING)
        return
    image = payload["image"]
    name = image.get("file_name")
    if not isinstance(name, str):
        raise Unusable("image without a file name", repr(name))
    path = f"{options.images}/{name}" if options.images else name
    found, size = files.open_sized(options, path, (image.get("width"), image.get("height")))
    drops.lose(*payload["lost"])  # counted with the strays
    annotations = []
    for entry in payload["annotations"]:
        label = payload["categories"].get(_id(entry, "category_id"), "")
        with drops.annotation(f"{unit.key} annotation {entry.get('id')}", label):
            annotations.append(_annotation(options, entry, payload["categories"], size))
    group = image.get(options.group_key) if options.group_key else None
    group = None if group is None else str(group)
    licence = payload.get("licence", "")
    yield replace(found, annotations=tuple(annotations), group=group, licence=licence)


def _annotation(
    options: Options, entry: dict[str, Any], categories: dict[Any, str], size: tuple[int, int]
) -> Annotation:
    category = _id(entry, "category_id")
    if category not in categories:
        raise Unusable("unknown class id", f"category_id {entry.get('category_id')!r}")
    if entry.get("iscrowd") or entry.get("ignore"):
        raise Unusable("crowd annotation", categories[category])
    # CVAT: `bbox` is the rectangle before it is turned; it has no segmentation, or the same rectangle's.
    turn = entry.get("rotation")
    corners = files.turned(_box(entry.get("bbox")), turn) if turn is not None else None
    if options.regions == "boxes":
        box = files.upright_box(corners) if corners else _box(entry.get("bbox"))
        return Annotation(categories[category], box)
    shape = entry.get("segmentation")
    if corners and (not shape or (isinstance(shape, list) and np.shape(shape[0]) == (8,))):
        shape = [[value for corner in corners for value in corner]]
    if isinstance(shape, list):
        return Annotation(categories[category], mask=files.polygon_mask(shape, size, options.clean))
    return Annotation(categories[category], mask=files.run_length_mask(shape, size))


def _box(values: Any) -> tuple[float, float, float, float]:
    four = values if isinstance(values, list) and len(values) == 4 else [None]
    if not all(isinstance(value, int | float) and abs(value) < 2**53 for value in four):
        raise Unusable("box that can't be read", f"bbox {values!r}"[:200])
    x, y, width, height = map(float, values)
    return (x, y, x + width, y + height)
