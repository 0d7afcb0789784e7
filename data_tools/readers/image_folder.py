# SPDX-License-Identifier: Apache-2.0

"""A folder for each class, images or DICOM files in it; subfolders belong to the class they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from data_tools.readers import SourceOptions
from data_tools.readers.files import LINK, files, folder_of, is_image, open_image, wrong
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable


class Options(SourceOptions):
    """Keys of ``reader: image_folder``.

    ``folders`` below the root, such as ``[train, val]``, hold the class folders; default the root itself. The
    class is named by the ``first`` folder below them, or by the ``last``, the one that the image lies in.
    """

    folders: tuple[str, ...] = ("",)
    label_from: Literal["first", "last"] = "first"


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each file below the folders."""
    for folder in options.folders:
        folder_of(options, folder, key="folders")
    if not any(
        entry.is_dir() and not entry.name.startswith((".", "__"))
        for folder in options.folders
        for entry in (options.root / folder).iterdir()
    ):
        problem = f"{str(options.root)!r} holds no folder, where one for each class is expected"
        raise wrong(options, f"{problem}. Correct `root` or `folders`, or use another reader.")
    for number, folder in enumerate(options.folders):
        for name in files(options, folder.strip("/")):
            yield Unit(name, number)


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the image of one file with its folder's name as label."""
    inside = unit.key[len(options.folders[unit.payload].strip("/")) :].strip("/").split("/")
    if (options.root / unit.key).is_dir():
        raise Unusable(LINK, "put the folder itself there, or name it as a root of its own")
    if len(inside) < 2:
        raise Unusable("file in no class folder")
    if not is_image(unit.key) and "." in inside[-1]:
        raise Unusable("not an image file", f"suffix {inside[-1].rsplit('.')[-1]!r}")
    label = inside[0] if options.label_from == "first" else inside[-2]
    yield replace(open_image(options, unit.key), annotations=(Annotation(label),))
