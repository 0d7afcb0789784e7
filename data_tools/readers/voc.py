# SPDX-License-Identifier: Apache-2.0

"""Pascal VOC: an XML file for each image (Everingham et al., IJCV 88, 303, 2010).

The VOC sets count pixels from 1 and name the last one inside the box; labelling tools write the edges of the
rectangle that was drawn. ``corners`` says which: a file can't.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal
from xml.etree.ElementTree import Element, ParseError

from data_tools.readers import SourceOptions, files
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable

_MARKS = ("difficult", "truncated", "occluded")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Options(SourceOptions):
    """Keys of ``reader: voc``; docs/corpus.md explains them."""

    default_source_task: ClassVar[str] = "2D detection"

    annotations: str = "Annotations"
    images: str = "JPEGImages"
    splits: tuple[str, ...] = ()
    split_folder: str = "ImageSets/Main"
    image_by: Literal["filename", "stem"] = "filename"
    corners: Literal["edges", "pixels"] = "edges"
    difficult: bool = True


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each XML file, or for each line of the split lists."""
    files.folder_of(options, options.images, key="images")
    names = files.annotation_files(options, options.annotations, ".xml")
    yield from map(Unit, _names_of_splits(options) if options.splits else names)


def _names_of_splits(options: Options) -> dict[str, None]:
    names: dict[str, None] = {}
    for split in options.splits:
        path = files.file_of(options, f"{options.split_folder}/{split}.txt", key="splits")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise files.wrong(options, f"{path} is no UTF-8 text ({error}).") from error
        # Lists of a class have a second column, 1 or -1.
        stems = (line.split()[0] for line in lines if line.strip())
        names |= dict.fromkeys(f"{options.annotations}/{stem}.xml" for stem in stems)
    return names


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the image of one XML file with its objects as boxes."""
    tree = _parse(options, unit.key)
    name = (tree.findtext("filename") or "").strip()
    if options.image_by == "stem":
        name = _by_stem(options, unit.key)
    if not name:
        raise Unusable("XML without a needed element", "<filename> is missing or empty")
    stated = [tree.findtext(f"size/{side}") for side in ("width", "height")]
    found, _ = files.open_sized(options, f"{options.images}/{name}", stated)
    annotations = []
    for number, thing in enumerate(tree.findall("object")):
        label = (thing.findtext("name") or "").strip()
        with drops.annotation(f"{unit.key} object {number}", label):
            annotations.append(_object(options, thing, label))
        for part in thing.iterfind("part"):
            drops.add("part of an object", unit.key, lost=[part.findtext("name") or ""])
    yield replace(found, annotations=tuple(annotations))


def _parse(options: Options, name: str) -> Element:
    import defusedxml
    from defusedxml import ElementTree

    data = files.read_annotation_file(options, name, "XML can't be read")
    try:
        tree: Any = ElementTree.fromstring(data, forbid_dtd=True)
    except defusedxml.DefusedXmlException as error:
        raise Unusable("XML that declares entities or a document type", str(error)) from error
    except (ParseError, ValueError, LookupError, RecursionError) as error:
        raise Unusable("XML can't be read", f"{type(error).__name__}: {error}") from error
    if tree.tag != "annotation":
        raise Unusable("XML of another kind", f"<{tree.tag}> where <annotation> is expected")
    return tree


def _by_stem(options: Options, name: str) -> str:
    stem = name[len(options.annotations) :].strip("/")[: -len(".xml")]
    suffixes = (*files.IMAGE_SUFFIXES, *map(str.upper, files.IMAGE_SUFFIXES))
    paths = (options.root / options.images / (stem + suffix) for suffix in suffixes)
    found = [path for path in paths if os.path.isfile(path)]
    if any(not os.path.samefile(found[0], other) for other in found):
        raise Unusable("XML of several images", files.listed([path.name for path in found]))
    return stem + found[0].suffix if found else stem


def _object(options: Options, thing: Element, label: str) -> Annotation:
    if not label:
        raise Unusable("no label", "<object> without <name>")
    marks = {mark: "yes" for mark in _MARKS if (thing.findtext(mark) or "0").strip() == "1"}
    if "difficult" in marks and not options.difficult:
        raise Unusable("object marked difficult", label)
    try:
        corners = files.numbers({key: thing.findtext(f"bndbox/{key}") for key in _CORNERS})
    except ValueError as error:
        raise Unusable("box that can't be read", f"{label}: {error}") from error
    x1, y1, x2, y2 = (corners[key] for key in _CORNERS)
    if options.corners == "pixels":
        x1, y1 = x1 - 1, y1 - 1
    box = (x1, y1, x2, y2)
    for attribute in thing.iterfind("attributes/attribute"):
        # CVAT: of the rectangle before it is turned.
        if attribute.findtext("name") == "rotation":
            box = files.upright_box(files.turned(box, attribute.findtext("value")))
    return Annotation(label, box, attributes=marks)
