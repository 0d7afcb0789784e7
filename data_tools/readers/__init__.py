# SPDX-License-Identifier: Apache-2.0

"""Readers by name. A module is imported when a job uses it: one that reads DICOM needs pydicom, others don't.

A reader is a module with ``Options`` (its keys in the job), ``units(options)`` (what there is to read,
in a fixed order) and ``read(options, unit, drops)`` (the samples of one unit). For all that it leaves
out it raises `Unusable` inside `drops.image` or `drops.annotation`, or calls ``drops.add(...,
lost=labels)``; where it names no labels, any may be lost. A drop that concerns images of other units is
marked there by `drops.lose`. Where a module has a ``VERSION``, a new number makes finished jobs read
their sources again. A new format is one such file, its line in `READERS` and its test.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import Field, field_validator

from data_tools.options import Options
from data_tools.preprocess.rules import Rules, preset
from data_tools.records import Drops, Sample, Unit
from gmai_xtuner.core.agreements import plain_host

READERS = {
    "image_folder": "data_tools.readers.image_folder",
    "table": "data_tools.readers.table",
    "coco": "data_tools.readers.coco",
    "voc": "data_tools.readers.voc",
    "yolo": "data_tools.readers.yolo",
    "labelme": "data_tools.readers.labelme",
    "masks": "data_tools.readers.masks",
    "arrays": "data_tools.readers.arrays",
    "dicom": "data_tools.readers.dicom",
    "volume": "data_tools.readers.volume",
    "decathlon": "data_tools.readers.nnunet",
    "nnunet": "data_tools.readers.nnunet",
    "video": "data_tools.readers.video",
    "slide": "data_tools.readers.slide",
}


class Permission(Options):
    """A host that may have the content of a source although its licence forbids third parties.

    Args:
        host: its name or address, without port and path.
        retention: for how long it keeps what it is sent, in the words of its contract.
        evidence: what says so, and that it may: a contract, an approval, with its date.
    """

    host: str
    retention: str = Field(min_length=1)
    evidence: str = Field(min_length=1)

    @field_validator("host")
    @classmethod
    def _is_a_host(cls, value: str) -> str:
        name = plain_host(value)
        if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f]*:[0-9a-f:]+", name):
            raise ValueError(f"expected a host's name or address alone, got {value!r}")
        return name


class SourceOptions(Options):
    """One entry of ``sources``; each reader adds its own keys.

    Args:
        name: unique in the job; part of ids and file names.
        root: folder of the set, relative to the job file; ``package:NAME/FOLDER`` lies in an installed
            Python package. `job.load` makes it absolute.
        links: folders outside of ``root`` that links below it may lead to, such as the store of
            git-annex, DVC or a hub's cache; relative to the job file.
        dataset: title of the published set; default ``name``.
        licence: of the images, as the set states it. Required: a corpus without it can't be passed on.
        may_be_sent_to: hosts beside this machine that may have its content although the licence, by the
            table of agreements, forbids third parties or isn't known; one `Permission` or a list.
        url: where the set can be had.
        modality: of the taxonomy; may be left out where the files know it.
        department: of the taxonomy; ``None`` as a text is its nineteenth value.
        clinical_task: of the taxonomy.
        source_task: default is what the format is made for, `default_source_task`.
        labels: code or name in the source -> name in the corpus. With this map given, a label that is not in
            it is left out, and its image is known to show more; an image of which no label is in it is
            dropped. Null drops the image on purpose, as unclear. Without the map names are taken as they are.
        codes_are_names: labels that are numbers or numbered words (``7``, ``Segment_1``) are meant as names;
            else no text is made of them, and the run ends with an error.
        synonyms: label name -> further names of the same thing.
        chinese: label name -> Chinese name.
        attributes: constants of every image of the set.
        negatives: of which labels all is annotated in every image, so that they may be counted, and denied
            where there is none: true for all of them, a list of names, false for none. Default: the job's
            ``make.negatives``, else what the annotations themselves show (see docs/corpus.md).
        exclusive: groups of labels of which an image has one at most, ``[[benign, malignant]]``; an image
            with two of them as a whole is dropped.
        group: regular expression on the path below ``root``; its first group (or the whole match) is
            the patient, case or slide. Default: what the reader finds, else each image alone.
        clean: rules for masks and slices, a preset of `preprocess.rules` by name, or rules in full.
    """

    default_source_task: ClassVar[str] = "2D classification"

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    root: Path
    links: tuple[Path, ...] = ()
    dataset: str = ""
    licence: str = Field(min_length=1)
    may_be_sent_to: tuple[Permission, ...] = ()
    url: str = ""
    modality: str | None = None
    department: str | None = None
    clinical_task: str | None = None
    source_task: str | None = None
    labels: dict[str, str | None] | None = None
    codes_are_names: bool = False
    synonyms: dict[str, tuple[str, ...]] = Field(default={})
    chinese: dict[str, str] = Field(default={})
    attributes: dict[str, str] = Field(default={})
    negatives: bool | tuple[str, ...] | None = None
    exclusive: tuple[tuple[str, ...], ...] = ()
    group: str | None = None
    clean: str | Rules = "sa-med2d"

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that files may really lie in."""
        return (self.root, *self.links)

    @field_validator("may_be_sent_to", mode="before")
    @classmethod
    def _is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, dict) else value

    @field_validator("clean")
    @classmethod
    def _is_a_preset(cls, value: str | Rules) -> str | Rules:
        if isinstance(value, str):
            preset(value)
        return value


class Reader(Protocol):
    """The interface of a reader's module."""

    Options: type[SourceOptions]

    def units(self, options: Any) -> Iterator[Unit]: ...

    def read(self, options: Any, unit: Unit, drops: Drops) -> Iterator[Sample]: ...


def load(name: str) -> Reader:
    """Return the module of a reader.

    Raises:
        KeyError: there is no reader of this name.
        ImportError: a library that it needs is not installed.
    """
    return importlib.import_module(READERS[name])  # type: ignore[return-value]
