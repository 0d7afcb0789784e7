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

from data_tools.readers import SourceOptions
from data_tools.readers.files import (
    IMAGE_SUFFIXES,
    annotation_files,
    file_of,
    folder_of,
    open_sized,
    read_annotation_file,
)
from data_tools.readers.shapes import numbers, turned, upright_box
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import SourceError, Unusable

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Options(SourceOptions):
    """Keys of ``reader: voc``.

    Args:
        annotations: folder of the XML files.
        images: folder of the images.
        splits: lists below ``split_folder`` of the images to read, without ``.txt``; default all.
        split_folder: of the lists.
        image_by: ``filename``, the element of that name, or ``stem``, the XML file's own name.
        corners: ``edges``: ``xmax - xmin`` is the width; ``pixels``: counted from 1, the last pixel
            belongs to the box, as in the VOC sets themselves.
        difficult: whether objects marked so are kept; they are counted else.
    """

    default_source_task: ClassVar[str] = "2D detection"

    reader: Literal["voc"]
    annotations: str = "Annotations"
    images: str = "JPEGImages"
    splits: tuple[str, ...] = ()
    split_folder: str = "ImageSets/Main"
    image_by: Literal["filename", "stem"] = "filename"
    corners: Literal["edges", "pixels"] = "edges"
    difficult: bool = True


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each XML file, or for each line of the split lists.

    Raises:
        SourceError: a folder or a list is missing, or there is no XML file.
    """
    folder_of(options, options.images, key="images")
    names = annotation_files(options, options.annotations, ".xml")
    yield from map(Unit, _names_of_splits(options) if options.splits else names)


def _names_of_splits(options: Options) -> dict[str, None]:
    names: dict[str, None] = {}
    for split in options.splits:
        path = file_of(options, f"{options.split_folder}/{split}.txt", key="splits")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"Source {options.name}: {path} is no UTF-8 text ({error})."
            ) from error
        # Lists of a class have a second column, 1 or -1.
        stems = (line.split()[0] for line in lines if line.strip())
        names |= dict.fromkeys(f"{options.annotations}/{stem}.xml" for stem in stems)
    return names


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the image of one XML file with its objects as boxes."""
    tree = _parse(options, unit.key)
    by_stem = options.image_by == "stem"
    name = _by_stem(options, unit.key) if by_stem else (tree.findtext("filename") or "").strip()
    if not name:
        raise Unusable("XML without a needed element", "<filename> is missing or empty")
    stated = [tree.findtext(f"size/{side}") for side in ("width", "height")]
    found, _ = open_sized(options, f"{options.images}/{name}", stated)
    annotations = []
    for number, thing in enumerate(tree.findall("object")):
        label = (thing.findtext("name") or "").strip()
        with drops.annotation(f"{unit.key} object {number}", label):
            annotations.append(_object(options, thing, label))
    yield replace(found, annotations=tuple(annotations))


def _parse(options: Options, name: str) -> Element:
    import defusedxml
    from defusedxml import ElementTree

    data = read_annotation_file(options, name, "XML can't be read")
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
    for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)):
        if os.path.isfile(options.root / options.images / (stem + suffix)):
            return stem + suffix
    return stem


def _object(options: Options, thing: Element, label: str) -> Annotation:
    if not label:
        raise Unusable("no label", "<object> without <name>")
    marks = {
        mark: "yes"
        for mark in ("difficult", "truncated", "occluded")
        if (thing.findtext(mark) or "0").strip() == "1"
    }
    if "difficult" in marks and not options.difficult:
        raise Unusable("object marked difficult", label)
    try:
        corners = numbers({key: thing.findtext(f"bndbox/{key}") for key in _CORNERS})
    except ValueError as error:
        raise Unusable("box that can't be read", f"{label}: {error}") from error
    x1, y1, x2, y2 = (corners[key] for key in _CORNERS)
    if options.corners == "pixels":
        x1, y1 = x1 - 1, y1 - 1
    box = (x1, y1, x2, y2)
    for attribute in thing.iterfind("attributes/attribute"):
        if attribute.findtext("name") == "rotation":  # CVAT: of the rectangle before it is turned
            box = upright_box(turned(box, attribute.findtext("value")))
    return Annotation(label, box, attributes=marks)
