"""COCO's annotation file: boxes, polygons or run-length codes of one JSON for many pictures.

The file is held as a whole while the job's main process hands out its pictures, about six times its size.
Format: cocodataset.org/#format-data; masks by pycocotools.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.preprocess.rules import resolve
from data_tools.readers import SourceOptions
from data_tools.readers.files import check_size, file_of, folder_of, open_image, size_of
from data_tools.readers.shapes import polygon_mask, run_length_mask
from data_tools.records import Annotation, Drops, Sample, Unit
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
    """A unit for each entry of ``images`` in the file's order, and one for annotations that belong to none.

    Raises:
        SourceError: the file is no COCO file.
    """
    path = file_of(options.root, options.annotations, source=options.name, key="annotations")
    if options.images:
        folder_of(options.root, options.images, source=options.name, key="images")
    images, found, categories = _load(path, options.name)
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    while found:
        entry = found.pop()
        image = entry.get("image_id") if isinstance(entry, dict) else None
        by_image[image if isinstance(image, int | str) else None].append(_slim(entry, options))
    seen: set[Any] = set()
    names_seen: set[str] = set()
    for number, image in enumerate(images):
        image = image if isinstance(image, dict) else {}
        key = image.get("id")
        if not isinstance(key, int | str) or key in seen:
            yield Unit(f"images[{number}]", {"image": image, "problem": repr(key)})
            continue
        seen.add(key)
        if image.get("file_name") in names_seen:
            yield Unit(f"images[{number}]", {"image": image, "twice": True})
            by_image.pop(key, None)
            continue
        names_seen.add(str(image.get("file_name")))
        entries = by_image.pop(key, [])[::-1]
        names = {
            entry["category_id"]: categories[entry["category_id"]]
            for entry in entries
            if _hashable(entry.get("category_id")) in categories
        }
        yield Unit(
            f"{image.get('file_name')}#{key}",
            {"image": image, "annotations": entries, "categories": names},
        )
    if by_image:
        strays = [str(entry.get("image_id")) for entries in by_image.values() for entry in entries]
        yield Unit(STRAYS, {"strays": strays})


def _load(path: Path, source: str) -> tuple[list[Any], list[Any], dict[Any, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file)
    except (
        ValueError,
        RecursionError,
    ) as error:  # UnicodeDecodeError and JSONDecodeError among them
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
        valid = isinstance(category, dict) and isinstance(category.get("name"), str)
        if not valid or _hashable(category.get("id")) is None:
            raise SourceError(
                f"Source {source}: {path}: category without id or name: {category!r}."
            )
        if categories.get(category["id"], category["name"]) != category["name"]:
            raise SourceError(
                f"Source {source}: {path}: category id {category['id']!r} is both "
                f"{categories[category['id']]!r} and {category['name']!r}."
            )
        categories[category["id"]] = category["name"]
    return content["images"], content["annotations"], categories


def _hashable(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _slim(entry: Any, options: Options) -> dict[str, Any]:
    """Only what is used of an annotation: a segmentation is long."""
    keys = ["id", "image_id", "category_id", "iscrowd"]
    keys.append("bbox" if options.regions == "boxes" else "segmentation")
    return {key: entry[key] for key in keys if key in entry} if isinstance(entry, dict) else {}


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the image of one entry with its annotations."""
    payload = unit.payload
    if "strays" in payload:
        for image in payload["strays"]:
            drops.add("annotation of an image that isn't listed", STRAYS, f"image_id {image}")
        return
    image = payload["image"]
    if "problem" in payload:
        raise Unusable("image without an id of its own", f"id {payload['problem']}")
    if "twice" in payload:
        raise Unusable("image listed twice", f"{image.get('file_name')} has another id too")
    name = image.get("file_name")
    if not isinstance(name, str):
        raise Unusable("image without a file name", repr(name))
    found = open_image(options.root, f"{options.images}/{name}" if options.images else name)
    size = size_of(found)
    check_size(size, (image.get("width"), image.get("height")))
    annotations = []
    for entry in payload["annotations"]:
        label = payload["categories"].get(_hashable(entry.get("category_id")), "")
        with drops.annotation(f"{unit.key} annotation {entry.get('id')}", label):
            annotations.append(_annotation(options, entry, payload["categories"], size))
    group = image.get(options.group_key) if options.group_key else None
    yield replace(
        found, annotations=tuple(annotations), group=None if group is None else str(group)
    )


def _annotation(
    options: Options, entry: dict[str, Any], categories: dict[Any, str], size: tuple[int, int]
) -> Annotation:
    category = _hashable(entry.get("category_id"))
    if category not in categories:
        raise Unusable("unknown class id", f"category_id {entry.get('category_id')!r}")
    if entry.get("iscrowd"):
        raise Unusable("crowd annotation", categories[category])
    if options.regions == "boxes":
        return Annotation(categories[category], _box(entry.get("bbox")))
    shape = entry.get("segmentation")
    if isinstance(shape, list):
        clip = resolve(options.clean).clip_boxes
        return Annotation(categories[category], mask=polygon_mask(shape, size, clip=clip))
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
