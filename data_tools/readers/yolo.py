# SPDX-License-Identifier: Apache-2.0

"""YOLO's label files: a text file for each image, a line for each object, coordinates as fractions.

``images/train/a.jpg`` has its lines in ``labels/train/a.txt``; the last folder named ``images`` is exchanged,
as Ultralytics does (ultralytics/data/utils.py, `img2label_paths`). What the numbers of a line mean depends on
the task and can't be seen from them (nine are four corners or an oriented box): ``format`` says it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar, Literal

from data_tools.readers import SourceOptions, files
from data_tools.records import NOTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import SourceError, Unusable
from gmai_xtuner.core.yaml_lines import Document

_EDGE = 1e-4  # fractions are written with five or six digits


class Options(SourceOptions):
    """Keys of ``reader: yolo``; docs/corpus.md explains them."""

    masks_are_objects: ClassVar[bool] = True
    default_source_task: ClassVar[str] = "2D detection"

    names: tuple[str, ...] | str
    format: Literal["boxes", "polygons", "oriented"] = "boxes"
    folders: tuple[str, ...] = ("",)
    images: str = "images"
    annotations: str = "labels"


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each image, with the class names; further ones for label files without one."""
    names = _names(options)
    empty = True
    for folder in options.folders:
        files.folder_of(options, folder, key="folders")
        for name in files.files(options, folder.strip("/")):
            if files.is_image(name) and _label_file(options, name) is not None:
                empty = False
                yield Unit(name, names)
        if options.images:
            yield from _lonely_labels(options, folder.strip("/"))
    if empty:
        where = f"in a folder {options.images!r} below {str(options.root)!r}"
        raise files.wrong(options, f"no picture {where}. Correct `folders` and `images`.")


def _lonely_labels(options: Options, folder: str) -> Iterator[Unit]:
    """Yield units for label files without an image, which tell of a set that was copied in part."""
    exchanged = _exchanged(folder, options.images, options.annotations)
    if exchanged is not None and not os.path.isdir(options.root / exchanged):
        return
    for name in files.files(options, folder if exchanged is None else exchanged):
        above, _, own = name.rpartition("/")
        images = _exchanged(above, options.annotations, options.images)
        if images is None or not own.endswith(".txt"):
            continue
        if own.removesuffix(".txt") not in _stems(str(options.root / images)):
            yield Unit(name)


def _exchanged(folder: str, old: str, new: str) -> str | None:
    """Return the path with its last folder named ``old`` called ``new``; None if it has none."""
    parts = folder.split("/")
    if old not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index(old)] = new
    return "/".join(parts)


@lru_cache(maxsize=2)
def _stems(folder: str) -> Counter[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return Counter(name.rsplit(".", 1)[0] for name in names if files.is_image(name))


def _names(options: Options) -> tuple[str, ...]:
    if not isinstance(options.names, str):
        return options.names
    path = files.file_of(options, options.names, key="names")
    if path.suffix.lower() in (".yaml", ".yml"):
        content = Document(path, what="file of names", error=SourceError, as_text=True).data
    else:
        try:  # an empty line has its number, too
            text = path.read_text(encoding="utf-8-sig").rstrip()
        except (OSError, UnicodeDecodeError) as error:
            raise files.wrong(options, f"{path} can't be read: {error}.") from error
        return tuple(line.strip() for line in text.splitlines())
    found = content.get("names") if isinstance(content, dict) else None
    if isinstance(found, dict) and set(found) == set(map(str, range(len(found)))):
        found = [found[str(number)] for number in range(len(found))]
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return tuple(found)
    raise files.wrong(options, f"{path} has no `names`, a list or a map from 0, 1, 2 ... to names.")


def _label_file(options: Options, image: str) -> str | None:
    """Return the label file that belongs to an image; None if the image is in no folder of images."""
    stem = image.rsplit(".", 1)[0] + ".txt"
    if not options.images:
        return stem
    above, _, own = stem.rpartition("/")
    folder = _exchanged(above, options.images, options.annotations)
    return None if folder is None else f"{folder}/{own}"


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield one image with the lines of its label file. An empty file says that nothing is to be seen."""
    names: tuple[str, ...] | None = unit.payload
    if names is None:
        raise Unusable("label file without an image")
    folder, _, own = unit.key.rpartition("/")
    if _stems(str(options.root / folder))[own.rsplit(".", 1)[0]] > 1:
        raise Unusable("label file of several images", "images differ in their suffix alone")
    unreadable = "label file that can't be read"
    try:
        data = files.read_annotation_file(options, str(_label_file(options, unit.key)), unreadable)
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise Unusable(unreadable, f"{type(error).__name__}: {error}") from error
    found, size = files.open_sized(options, unit.key)
    annotations: list[Annotation] = []
    seen: set[tuple[str, ...]] = set()
    for number, line in enumerate(lines, start=1):
        where = f"{unit.key} line {number}"
        number_of_class, *values = parts = tuple(line.split()) or ("",)
        if parts in seen:
            drops.add("duplicate row", where, line[:200], lost=NOTHING)
        elif number_of_class:
            seen.add(parts)
            with drops.annotation(where, *names):  # its class isn't known, if it can't be read
                label = _label(options, number_of_class, len(values), names)
                with drops.annotation(where, label):
                    annotations.append(_annotation(options, label, values, size))
    yield replace(found, annotations=tuple(annotations))


def _label(options: Options, number: str, count: int, names: tuple[str, ...]) -> str:
    fits = {"boxes": count == 4, "polygons": count >= 6 and count % 2 == 0, "oriented": count == 8}
    if not fits[options.format]:
        detail = f"{count} values behind the class, in a file of {options.format}"
        raise Unusable("line of another format", detail)
    plain = number.isascii() and number.isdigit() and len(number) < 10
    if not plain or int(number) >= len(names) or not names[int(number)]:
        there = f"the list of names has {len(names)}, {names.count('')} of them empty"
        raise Unusable("unknown class id", f"{number[:20]!r}; {there}")
    return names[int(number)]


def _annotation(
    options: Options, label: str, texts: list[str], size: tuple[int, int]
) -> Annotation:
    try:
        named = {f"value {n}": text for n, text in enumerate(texts, 1)}
        values = list(files.numbers(named).values())
    except ValueError as error:
        raise Unusable("box that can't be read", str(error)) from error
    if min(values) < -_EDGE or max(values) > 1 + _EDGE:
        raise Unusable("fraction below 0 or above 1", f"{label} {' '.join(texts)}"[:200])
    pixels = [value * size[number % 2] for number, value in enumerate(values)]
    if options.format == "boxes":
        cx, cy, width, height = pixels
        return Annotation(label, (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))
    if options.format == "oriented":
        corners = list(zip(pixels[::2], pixels[1::2], strict=True))
        return Annotation(label, files.upright_box(corners))
    return Annotation(label, mask=files.polygon_mask([pixels], size, options.clean))
