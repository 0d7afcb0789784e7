"""Readers by name. A module is imported when a job uses it: one that reads DICOM needs pydicom, others don't.

A reader is a module with ``Options`` (its keys in the job), ``units(options)`` (what there is to read, in a
fixed order) and ``read(options, unit, drops)`` (the samples of one unit; it raises `Unusable` or calls
``drops`` for all that it leaves out). Where a module has a ``VERSION``, a new number makes finished jobs read
their sources again. A new format is one such file, its line in `READERS` and its test.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

from data_tools.records import Drops, Sample, Unit

READERS = {
    "image_folder": "data_tools.readers.image_folder",
    "table": "data_tools.readers.table",
    "coco": "data_tools.readers.coco",
    "voc": "data_tools.readers.voc",
    "yolo": "data_tools.readers.yolo",
    "masks": "data_tools.readers.masks",
    "dicom": "data_tools.readers.dicom",
    "volume": "data_tools.readers.volume",
    "decathlon": "data_tools.readers.decathlon",
    "nnunet": "data_tools.readers.nnunet",
    "video": "data_tools.readers.video",
    "slide": "data_tools.readers.slide",
}


class Reader(Protocol):
    """What a reader's module offers."""

    Options: Any

    def units(self, options: Any) -> Iterator[Unit]: ...

    def read(self, options: Any, unit: Unit, drops: Drops) -> Iterator[Sample]: ...


def load(name: str) -> Reader:
    """The module of a reader.

    Raises:
        KeyError: there is no reader of this name.
        ImportError: a library that it needs is not installed.
    """
    return importlib.import_module(READERS[name])  # type: ignore[return-value]
