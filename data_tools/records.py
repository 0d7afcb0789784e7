# SPDX-License-Identifier: Apache-2.0

"""The shapes on the way from a source to the corpus: `Unit` -> `Sample` -> `Record`, and `Drop` for the rest.

A `Record` is GMAI-VL's ``<image, modality, label, department, bbox [optional]>`` (arXiv 2411.14522, section
3.1) with its provenance: every image of the corpus is described in this one form before any text is written,
and every statement of the text is checked against it.

``H`` and ``W`` are an image's height and width in pixels; ``x`` runs along ``W``, ``y`` along ``H``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmai_xtuner.core.errors import Unusable

if TYPE_CHECKING:
    import numpy as np

Box = tuple[int, int, int, int]

ANYTHING = "*"
"""Stands for every label: in ``incomplete`` if it isn't known which of them were left out."""
NOTHING = ()
"""What `Drops.add` is told if no annotation of an image is lost by a drop."""


# --- what a reader gives --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unit:
    """The piece of a source that one process reads at once: an image file, a series, a volume, a video.

    ``key`` is unique in its source and the same in every run, such as the file's path below the root;
    ``payload`` what the reader needs to read it: small, and can be pickled.
    """

    key: str
    payload: Any = None


@dataclass(frozen=True, slots=True)
class Annotation:
    """One expert statement about an image or a region of it; ``label`` is a name or code of the source.

    ``box`` is ``(x1, y1, x2, y2)`` in pixels, half-open, as the source has it (it may be wrong), ``mask``
    bool ``[H, W]`` of the region, of which `preprocess.clean` makes boxes. ``attributes`` are further
    findings in the source's words, such as ``{"side": "left", "severity": "mild"}``.
    """

    label: str
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its annotations, not yet cleaned.

    Args:
        image: path of an ordinary image file, kept as it is if it can be, or uint8 ``[H, W]`` or
            ``[H, W, 3]``.
        source_file: path below the source's root, with ``/``, of the file that the image comes from; it and
            ``group`` leave by neutral names, see `privacy`.
        annotations: those of the image as a whole have neither box nor mask. Without any the image is
            dropped with that reason.
        part: position in the file, such as ``{"axis": "z", "slice": 40}``, ``{"frame": 12}``; in the order
            in which it is to appear in ids.
        group: patient, case, video or slide: never on both sides of a split. None: the image alone.
        modality: when the file knows it better than the job; a name of the taxonomy or a DICOM code.
        licence: of this image where it differs from the source's; else empty.
        attributes: of the image as a whole, from an allow-list: never who the patient is.
        preprocessing: what was done to the grey levels and geometry, such as
            ``{"window": "W 400 L 40", "orientation": "RAS"}``; kept with the record.
        examined: labels that the source has looked for in this image: all of each is annotated, or there is
            none. Of every other label only what is annotated is known. `ANYTHING`: all labels of the source.
        sha256: of what the image was read from, if that is more than ``source_file``; else it is computed.
    """

    image: Path | np.ndarray
    source_file: str
    annotations: tuple[Annotation, ...] = ()
    part: Mapping[str, int | str] = field(default_factory=dict)
    group: str | None = None
    modality: str | None = None
    licence: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Mapping[str, str] = field(default_factory=dict)
    examined: tuple[str, ...] = ()
    sha256: str = ""


# --- what is left out -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drop:
    """An image or annotation that was left out, counted under its reason.

    ``stage`` is ``read`` (by the reader), ``clean`` (a region, by the rules) or ``record``; ``reason`` the
    same text for all of the kind; ``where`` file below the root and part; ``detail`` is particular to this
    one.
    """

    stage: str
    reason: str
    where: str
    detail: str = ""


def by_reason(drops: Iterable[Drop]) -> dict[tuple[str, str], tuple[int, Drop]]:
    """Return how often something was left out for each stage and reason, and the first of it."""
    found: dict[tuple[str, str], tuple[int, Drop]] = {}
    for drop in drops:
        count, first = found.get((drop.stage, drop.reason), (0, drop))
        found[drop.stage, drop.reason] = count + 1, first
    return found


class Drops:
    """Everything that is left out of a unit, and the labels of which its images lack annotations.

    A reader is handed one and has no other way to leave something out. It raises `Unusable`, and the
    nearest scope decides what falls::

        with drops.image(name):                             # the image
            for line, entry in enumerate(entries):
                with drops.annotation(f"{name} line {line}", entry.label):   # or only this annotation
                    annotations.append(parse(entry))
            yield Sample(...)

    Outside of any scope the rest of the unit falls. Labels of annotations that fall make the images of
    their scope incomplete: nobody may count these labels there, or say that there is none. Outside of
    `image` that is every image of the unit from then on. Whoever doesn't say which labels fall makes the
    images incomplete for `ANYTHING`; that nothing falls has to be said (`NOTHING`).

    Attributes:
        found: the drops in their order.
    """

    def __init__(self) -> None:
        self.found: list[Drop] = []
        self._lost: list[set[str]] = [set()]

    @property
    def incomplete(self) -> set[str]:
        """Labels that the current image may show though annotations of them were left out.

        As the source names them; nobody may count them there, or say that there is none.
        """
        return set().union(*self._lost)

    def add(
        self,
        reason: str,
        where: str,
        detail: str = "",
        *,
        lost: Iterable[str] = (ANYTHING,),
        stage: str = "read",
    ) -> None:
        """Count a drop.

        Args:
            reason, where, detail, stage: see `Drop`.
            lost: labels of the annotations that are left out by it and that are to be seen in the image; an
                empty one may be any. `NOTHING` for a whole image, a repetition, or an annotation of nothing.
        """
        self.found.append(Drop(stage, reason, where, detail))
        self.lose(*lost)

    def lose(self, *labels: str) -> None:
        """Mark labels as lost in this scope by a drop that is counted elsewhere."""
        self._lost[-1].update(label.strip() or ANYTHING for label in labels)

    @contextmanager
    def image(self, where: str, *, stage: str = "read") -> Iterator[set[str]]:
        """Scope of one image (or of several that share a file): `Unusable` drops it.

        Yields:
            The labels that are lost in it.
        """
        lost: set[str] = set()
        self._lost.append(lost)
        try:
            yield lost
        except Unusable as error:
            self.add(error.reason, where, error.detail, stage=stage, lost=NOTHING)
        finally:
            self._lost.pop()

    @contextmanager
    def annotation(self, where: str, *labels: str) -> Iterator[None]:
        """Scope of one annotation: `Unusable` drops it, and its labels are lost; without labels, any."""
        try:
            yield
        except Unusable as error:
            self.add(error.reason, where, error.detail, lost=labels or (ANYTHING,))


def _fields(made: Any) -> dict[str, Any]:
    """Return the fields of a dataclass with slots; `dataclasses.asdict` takes ten times as long."""
    return {name: getattr(made, name) for name in made.__slots__}


# --- what the corpus holds ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Label:
    """One finding.

    ``name`` is English, lower case unless a name or an abbreviation. ``box`` is ``(x1, y1, x2, y2)`` in
    pixels of the stored image, half-open (``x2 - x1`` is the width), None of the image as a whole; ``area``
    pixels of its mask, if any.
    """

    name: str
    box: Box | None = None
    area: int | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what is known of it."""
        return {key: value for key, value in _fields(self).items() if value not in (None, {})}


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a record: its source of the job, with title, licence and address of the published set.

    ``file`` is the path below the source's root or its neutral name, ``sha256`` of its bytes, hexadecimal;
    ``part`` and ``preprocessing`` as of `Sample`; ``group`` is the unit of the split, begins with
    ``source/`` and is unique. The licence may be one that a table names for this image.
    """

    source: str
    dataset: str
    licence: str
    url: str
    file: str
    sha256: str
    part: Mapping[str, int | str]
    group: str
    preprocessing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One image with everything that is known of it.

    ``id`` has the authors' form ``2d#cls#histopathology#crc100k#images#NORM#example.tif`` and is unique;
    ``image`` is the path below the corpus folder; width and height are pixels. ``modality``, ``department``
    and ``clinical_task`` are names of the taxonomy; the task may be None. ``attributes`` are of the image as
    a whole, such as ``{"body part": "chest", "view": "AP"}``.

    ``incomplete`` are labels of which the source has more in this image than ``labels``, of which there is
    one at least: regions that the rules or a fault left out. So they can't be counted, and none of them is
    absent. `ANYTHING` stands for all. ``examined``: labels that the source has looked for in this image, see
    `Sample`.
    """

    id: str
    image: str
    width: int
    height: int
    modality: str
    department: str
    clinical_task: str | None
    source_task: str
    labels: tuple[Label, ...]
    attributes: Mapping[str, str]
    provenance: Provenance
    incomplete: tuple[str, ...] = ()
    examined: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the line of ``records.jsonl``: ``label`` are the distinct names, ``bbox`` the boxes."""
        return {
            **_fields(self),
            "labels": [label.to_json() for label in self.labels],
            "provenance": _fields(self.provenance),
            "label": list(self.names),
            "bbox": [list(label.box) for label in self.labels if label.box] or None,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Distinct label names in their order."""
        return tuple(dict.fromkeys(label.name for label in self.labels))
