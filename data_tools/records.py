"""The standard record ``<image, modality, label, department, bbox [optional]>`` with its provenance.

GMAI-VL (arXiv 2411.14522), section 3.1: every picture of the corpus is described in this one form before any
text is written, and every statement of the text is held against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Label:
    """One finding.

    Args:
        name: what it is, in English, lower case unless a name or an abbreviation.
        box: ``(x1, y1, x2, y2)`` in pixels of the stored image, half-open (``x2 - x1`` is the width), or
            None if it is said of the picture as a whole.
        area: pixels of the region's mask; None without a mask.
        attributes: such as ``{"side": "left"}``.
    """

    name: str
    box: Box | None = None
    area: int | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a record comes from.

    Args:
        source: name of the source in the job.
        dataset: title of the published set.
        licence: as the job states it.
        url: where the set can be had; may be empty.
        file: path below the source's root.
        sha256: of that file's bytes, hexadecimal.
        part: slice, frame or tile, see `samples.Sample`.
        group: unit of the split; unique over all sources, begins with ``source/``.
        preprocessing: see `samples.Sample`.
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
    """One picture with everything that is known of it.

    Args:
        id: in the authors' form ``2d#cls#histopathology#crc100k#images#NORM#example.tif``; unique.
        image: path of the stored picture below the corpus folder, ``images/...``.
        width, height: of the stored picture, pixels.
        modality, department, clinical_task: names of the taxonomy; the task may be None.
        source_task: ``"2D classification"``, ``"2D detection"``, ``"2D segmentation"`` or
            ``"3D segmentation"``.
        labels: at least one.
        attributes: of the picture as a whole, such as ``{"body part": "chest", "view": "AP"}``.
        provenance: see `Provenance`.
        incomplete: labels of which the source has more in this picture than ``labels``: regions that the
            rules or a fault left out. So they can't be counted, and none of them is absent.
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

    def to_json(self) -> dict[str, Any]:
        """The record as in ``records.jsonl``: ``label`` are the distinct names, ``bbox`` the boxes."""
        values = asdict(self)
        values["labels"] = [
            {key: value for key, value in label.items() if value not in (None, {})}
            for label in values["labels"]
        ]
        values["label"] = list(dict.fromkeys(label.name for label in self.labels))
        values["bbox"] = [list(label.box) for label in self.labels if label.box] or None
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`; ``label`` and ``bbox`` are derived and not read."""
        labels = tuple(
            Label(
                label["name"],
                tuple(label["box"]) if label.get("box") else None,
                label.get("area"),
                label.get("attributes", {}),
            )
            for label in values["labels"]
        )
        own = {
            key: value for key, value in values.items() if key not in ("label", "bbox", "labels")
        }
        own["incomplete"] = tuple(values.get("incomplete", ()))
        return cls(**own | {"labels": labels, "provenance": Provenance(**values["provenance"])})

    @property
    def names(self) -> tuple[str, ...]:
        """Distinct label names in their order."""
        return tuple(dict.fromkeys(label.name for label in self.labels))
