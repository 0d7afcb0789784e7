# SPDX-License-Identifier: Apache-2.0

"""Readers by name. A module is imported when a job uses it: one that reads DICOM needs pydicom, others don't.

docs/corpus.md says what a reader is made of. Where it names no ``lost`` labels, any may be lost; a drop that
concerns images of other units is marked there by `drops.lose`. Where a module has a ``VERSION``, a new number
makes finished jobs read their sources again.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from data_tools.options import Options
from data_tools.preprocess import PRESETS, Rules
from data_tools.records import Drop, Drops, Sample, Unit
from gmai_xtuner.core.agreements import agreement_of, plain_host
from gmai_xtuner.core.imaging.bounded import iterate_bounded

_MODULES = (
    *("image_folder", "table", "coco", "voc", "yolo", "labelme", "masks", "arrays", "dicom"),
    *("volume", "nnunet", "video", "slide"),
)
READERS = {name: f"{__name__}.{name}" for name in _MODULES} | {"decathlon": f"{__name__}.nnunet"}


class Permission(Options):
    """A host that may have the content of a source although its licence forbids third parties.

    ``host`` is a name or address without port and path; ``retention`` for how long it keeps what it is sent,
    in the words of its contract; ``evidence`` says so, and that it may: a contract, an approval, with its
    date.
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
    """One entry of ``sources``; each reader adds its own keys. docs/corpus.md explains them.

    Without ``labels`` names are taken as they are; without ``group`` the reader knows the patient, or each
    image stands alone; without ``negatives`` the job's ``make.negatives`` holds, or what annotations show.
    By default names are anonymous where they may be patients': DICOM, and sets that an agreement closes.
    """

    default_source_task: ClassVar[str] = "2D classification"
    masks_are_objects: ClassVar[bool] = False
    """Whether each mask is an object of its own; else those of one label are one map."""
    names_patients: ClassVar[bool] = False
    """Whether names of files may be patients' names, so that they are hidden by default."""

    native_memory: ClassVar[int] = 0
    """Bytes for native libraries that read whole files, in a process of their own; 0: there is none."""

    reader: str = ""
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
    clean: Rules = PRESETS["sa-med2d"]
    text_in_pixels: Literal["keep", "flag", "crop", "drop"] = "keep"
    anonymous_names: bool | None = None
    salt: str | None = None

    @property
    def names_licences(self) -> bool:
        """Whether samples may have licences of their own; what a job allows then decides what is read."""
        return False

    @field_validator("may_be_sent_to", mode="before")
    @classmethod
    def _is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _settle_names(self) -> Self:
        if self.anonymous_names is None:
            agreement = agreement_of(self.licence, (self.name, self.dataset, self.url))
            closed = agreement is not None and not agreement.third_parties
            object.__setattr__(self, "anonymous_names", self.names_patients or closed)
        return self

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that files may really lie in."""
        return (self.root, *self.links)


class Reader(Protocol):
    """The interface of a reader's module."""

    Options: type[SourceOptions]

    def units(self, options: Any) -> Iterator[Unit]: ...

    def read(self, options: Any, unit: Unit, drops: Drops) -> Iterator[Sample]: ...


def load(name: str) -> Reader:
    """Return the module of a reader; KeyError for an unknown one, ImportError without its library."""
    return importlib.import_module(READERS[name])  # type: ignore[return-value]


_SECONDS = 120
"""Of computing that native libraries may take for one image, and one more for each MiB of its file."""
_Read = tuple[Sample | None, list[Drop], set[str]]
"""A sample or the end, what was left out since the one before, and the labels that are lost in it."""


def samples(source: SourceOptions, unit: Unit) -> Iterator[_Read]:
    """Read a unit, in a process of its own if native libraries read the whole file."""
    if not (memory := source.native_memory):
        return _read(source, unit)
    memory += 2 * getattr(source, "max_bytes", 0)
    try:
        size = (source.root / unit.key).stat().st_size
    except (OSError, ValueError):
        size = 0
    return iterate_bounded(_read, source, unit, memory=memory, seconds=_SECONDS + size // 2**20)


def _read(source: SourceOptions, unit: Unit) -> Iterator[_Read]:
    reader, drops, told = load(source.reader), Drops(), 0  # type: ignore[attr-defined]
    with drops.image(unit.key):
        for sample in reader.read(source, unit, drops):
            yield sample, drops.found[told:], drops.incomplete
            told = len(drops.found)
    yield None, drops.found[told:], set()
