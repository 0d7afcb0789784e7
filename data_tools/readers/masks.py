# SPDX-License-Identifier: Apache-2.0

"""Images with mask files: binary, numbered, in colours, one file or several for each image.

Masks are found by a pattern over the image's path, or by a JSON map from image to masks, as SA-Med2D-20M has
it. ``{label}`` is the label's code.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.readers import SourceOptions, files, patterns
from data_tools.readers.files import below, file_below, file_of, folder_of, open_sized
from data_tools.readers.patterns import Patterns, Places, one_reading, paired, place_names
from data_tools.records import NOTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import ImageError, SourceError, Unusable
from gmai_xtuner.core.imaging.images import opened, orientation_of
from gmai_xtuner.core.strict_json import STRICT_JSON

_RANGE = re.compile(r"([<>])\s*(-?\d+)")
_COLOUR = re.compile(r"#([0-9a-fA-F]{6})")


class Options(SourceOptions):
    """Keys of ``reader: masks``; docs/corpus.md explains them."""

    default_source_task: ClassVar[str] = "2D segmentation"

    images: str | None = None
    masks: Patterns = ()
    map: str | None = None
    classes: str | None = None
    kind: Literal["binary", "indexed", "colours"] = "binary"
    label: str | None = None
    foreground: int | tuple[int, ...] | str | None = None
    background: tuple[int, ...] = (0,)
    colours: dict[str, str | None] = Field(default={})

    @model_validator(mode="after")
    def _fits(self) -> Options:
        if (self.images is None) == (self.map is None):
            raise ValueError("either `images` and `masks`, or `map`")
        if self.images is not None and not self.masks:
            raise ValueError("`masks`, the pattern of the masks' paths, is missing")
        patterns.check_templates(self.images or "", *self.masks)
        named = all("label" in place_names(template) for template in self.masks)
        if self.kind == "binary" and self.label is None and not (self.masks and named):
            raise ValueError("binary masks need `label`, or {label} in the pattern `masks`")
        if self.kind != "binary" and (self.label is not None or self.foreground is not None):
            raise ValueError("`label` and `foreground` are of `kind: binary`")
        if isinstance(self.foreground, str) and not _RANGE.fullmatch(self.foreground):
            known = "values or a range such as '>127'"
            raise ValueError(f"`foreground` is {known}, got {self.foreground!r}")
        if (self.kind == "colours") != bool(self.colours):
            raise ValueError("`colours` is the map of `kind: colours`")
        if wrong := [colour for colour in self.colours if not _COLOUR.fullmatch(colour)]:
            raise ValueError(f"a colour is written #rrggbb, got {wrong[0]!r}")
        return self


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each image, with its masks' paths if a map has them."""
    folder_of(options, "", key="root")
    if options.classes is not None:
        _classes(file_of(options, options.classes, key="classes"))
    if options.map is not None:
        yield from _mapped(options, options.map)
        return
    found = paired(options, options.images or "", options.masks, labels=_codes(options))
    yield from (Unit(one.path, (one.places, one.masks)) for one in found)


def _codes(options: Options) -> Collection[str] | None:
    """Return what ``{label}`` may be, as far as the job says it."""
    if options.classes is None:
        return options.labels
    tables = _classes(below(options, options.classes))
    return {str(number) for table in tables.values() for number in table}


def _mapped(options: Options, name: str) -> Iterator[Unit]:
    """Yield the map's entries one after the other: that of SA-Med2D-20M has gigabytes."""
    import ijson

    path, empty = file_of(options, name, key="map"), True
    with path.open("rb") as file:
        try:
            for image, masks in ijson.kvitems(file, ""):
                empty = False
                yield Unit(image, masks)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            problem = f"is no JSON ({str(error).splitlines()[0]})"
            raise files.wrong(options, f"{path} {problem}.") from error
    if empty:
        problem = "is no map from pictures to their masks, or it is empty"
        raise files.wrong(options, f"{path} {problem}.")


@lru_cache(maxsize=8)
def _classes(path: Path) -> dict[str, Any]:
    """Return ``{dataset: {id: class}}``; with one table for all, ``{"": {id: class}}``."""
    try:
        content = STRICT_JSON.decode(path.read_text(encoding="utf-8-sig"))
        nested = all(isinstance(value, dict) for value in content.values())
        tables = content if nested else {"": content}
        return {
            dataset: {int(number): str(name) for name, number in table.items()}
            for dataset, table in tables.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        expected = "{class: id} or {dataset: {class: id}}"
        raise SourceError(f"{path} is no map {expected} ({error}).") from error


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield one image with its masks.

    An image of which one mask is no good is dropped as a whole: what the mask would have shown can't be told
    from what isn't there.
    """
    found, size = open_sized(options, unit.key)
    places, masks = unit.payload if options.map is None else _of_map(options, unit)
    if not masks:
        raise Unusable("image without a mask")
    shown: list[Annotation] = []
    examined: set[str] = set()
    for name, texts in masks:
        of_mask = _annotations(options, name, texts, size)
        shown += of_mask
        examined.update(annotation.label for annotation in of_mask)
        if options.kind == "binary":  # an empty one says that there is none
            examined.add(options.label or _label(options, texts, name))
        if not of_mask:
            drops.add("empty mask", unit.key, name, lost=NOTHING)
    group = places.get("group") or found.group
    yield replace(found, annotations=tuple(shown), group=group, examined=tuple(sorted(examined)))


def _of_map(options: Options, unit: Unit) -> tuple[Places, list[tuple[str, Places]]]:
    names = [unit.payload] if isinstance(unit.payload, str) else unit.payload
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Unusable("masks that are no list of paths", repr(unit.payload)[:200])
    places: Places = {}
    found = []
    for name in dict.fromkeys(names):
        fits = (patterns.pattern(template).readings(name) for template in options.masks)
        readings = next((of_one for of_one in fits if of_one), [])
        texts = one_reading(readings, _codes(options), path=name, key="masks", source=options.name)
        if options.masks and texts is None:
            raise Unusable("mask whose path doesn't fit the pattern", name)
        texts = texts or {}
        places = {"group": texts["group"]} if "group" in texts else places
        found.append((name, texts))
    return places, found


def _annotations(
    options: Options, name: str, texts: dict[str, str], size: tuple[int, int]
) -> list[Annotation]:
    path = file_below(options, name, "no such mask file")
    stated = files.size_of(path)
    if stated != size:
        sizes = f"{stated[0]} x {stated[1]}, the image {size[0]} x {size[1]}"
        raise Unusable("mask of another size than its image", f"{name}: {sizes}")
    values = _values(path, name, options)
    if options.kind == "binary":
        mask = _foreground(values, options.foreground, name)
        label = options.label or _label(options, texts, name)
        return [Annotation(label, mask=mask)] if mask.any() else []
    present = np.unique(values).tolist()
    if options.kind == "indexed":
        named: dict[int, str | None] = {
            value: _label(options, texts | {"label": str(value)}, name)
            for value in present
            if value not in options.background
        }
    else:
        named = {int(colour[1:], 16): label for colour, label in options.colours.items()}
        if unknown := [f"#{value:06x}" for value in present if value not in named]:
            detail = f"{name}: {', '.join(unknown[:8])}, {len(unknown)} in all"
            raise Unusable("mask with an unknown colour", detail)
    found = ((value, named.get(value)) for value in present)
    return [Annotation(label, mask=values == value) for value, label in found if label is not None]


def _label(options: Options, texts: dict[str, str], name: str) -> str:
    code = texts["label"]
    if options.classes is None:
        return code
    tables = _classes(below(options, options.classes))
    table = tables.get(texts.get("dataset", ""), tables.get(""))
    if table is None:
        raise Unusable("unknown dataset of a mask", f"{name}: {texts.get('dataset')!r}")
    if not (code.isascii() and code.isdigit() and len(code) < 10) or int(code) not in table:
        raise Unusable("unknown class id", f"{name}: {code[:20]!r}")
    return table[int(code)]


def _two_readings(image: Any, options: Options) -> str:
    """Return why what is stored isn't what is shown, so that nobody knows which of both is meant; or ""."""
    if orientation_of(image) != 1:
        return "it is turned by EXIF"
    if image.format == "TIFF" and image.mode != "1" and image.tag_v2.get(262) == 0:
        return "it stores white as 0"
    if image.format == "TIFF" and image.mode == "L" and image.tag_v2.get(339) == (2,):
        return "its bytes are signed"
    image.load()
    if image.mode in ("RGBA", "LA", "PA") and image.getchannel("A").getextrema() != (255, 255):
        return "it is transparent in part"
    shown = (image.getpalette() or [])[:3] if image.mode == "P" else []
    if any(shown) and options.kind == "binary" and options.foreground is None:
        return f"its palette shows 0 as {shown}; say `foreground`"
    return ""


def _values(path: Path, name: str, options: Options) -> np.ndarray:
    """Return integers ``[H, W]``: palette numbers or grey levels as stored, or ``0xrrggbb``."""
    try:
        with opened(path) as image:
            if problem := _two_readings(image, options):
                raise Unusable("mask that can be read in two ways", f"{name}: {problem}")
            if options.kind == "colours":
                rgb = np.asarray(image.convert("RGB")).astype(np.int32)
                return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
            if image.mode in ("RGB", "RGBA", "LA"):
                levels = np.asarray(image)[..., : 3 if image.mode != "LA" else 1]
                if (levels != levels[..., :1]).any():
                    raise Unusable("mask in colours where grey levels are expected", name)
                return levels[..., 0]
            if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
                values = np.asarray(image)
                return values.astype(np.uint8) if values.dtype == bool else values
            raise Unusable("mask of an unsupported kind", f"{name}: colour mode {image.mode}")
    except ImageError as error:
        detail = error.problem.removeprefix(f"image {str(path)!r} ")
        raise Unusable("mask that can't be read", f"{name}: {detail}") from error


def _foreground(
    values: np.ndarray, foreground: int | tuple[int, ...] | str | None, name: str
) -> np.ndarray:
    if isinstance(foreground, str):
        edge = int(foreground[1:])
        return values > edge if foreground[0] == ">" else values < edge
    if foreground is not None:
        return np.isin(values, foreground)
    present = np.unique(values).tolist()
    if len(present) > 2 or (len(present) == 2 and present[0] != 0):
        shown = files.listed(list(map(str, present)), at_most=8)
        detail = f"{name}: {shown}; say `foreground` or `kind: indexed`"
        raise Unusable("binary mask with several values", detail)
    return values != 0
