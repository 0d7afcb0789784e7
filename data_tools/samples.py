"""What a reader hands on: pictures with what an expert said of them, not yet cleaned.

``H`` and ``W`` are the picture's height and width in pixels; ``x`` runs along ``W``, ``y`` along ``H``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Unit:
    """The piece of a source that is read at once, by one process: an image file, a series, a volume, a video.

    Args:
        key: unique in its source and the same in every run, such as the file's path below the root.
        payload: what the reader needs to read it; small, and can be pickled.
    """

    key: str
    payload: Any = None


@dataclass(frozen=True, slots=True)
class Annotation:
    """What an expert said of a picture or of a region of it.

    Args:
        label: name or code as the source has it, in text; the job's ``labels`` turn it into a name.
        box: ``(x1, y1, x2, y2)`` in pixels, half-open, as the source has it (it may be wrong), or None.
        mask: bool ``[H, W]`` of the region or None. A mask becomes boxes in `preprocess.regions`.
        attributes: further findings in the source's words, such as ``{"side": "left", "severity": "mild"}``.
    """

    label: str
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture.

    Args:
        image: path of an ordinary image file, kept as it is if it can be, or uint8 ``[H, W]`` or
            ``[H, W, 3]``.
        source_file: path below the source's root, with ``/``, of the file that the picture comes from.
        annotations: those of the picture as a whole have neither box nor mask. Empty: nothing is known
            of it, the picture is dropped with that reason.
        part: where in the file, such as ``{"axis": "z", "slice": 40}``, ``{"frame": 12}``; in the order
            in which it is to appear in ids.
        group: patient, case, video or slide: never on both sides of a split. None: the picture alone.
        modality: when the file knows it better than the job; a name of the taxonomy or a DICOM code.
        attributes: of the picture as a whole, whitelisted: never who the patient is.
        preprocessing: what was done to the grey levels and geometry, such as
            ``{"window": "W 400 L 40", "orientation": "RAS"}``; kept with the record.
        incomplete: labels of objects of the picture that the source names and the reader left out, such as a
            box that can't be read: how many of them there are, or that there is none, can't be said.
        sha256: of what the picture was read from, where ``source_file`` is no path because the path would
            say who the patient is; ``group`` is final then, too. Else empty: it is computed from the file.
    """

    image: Path | np.ndarray
    source_file: str
    annotations: tuple[Annotation, ...] = ()
    part: Mapping[str, int | str] = field(default_factory=dict)
    group: str | None = None
    modality: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    incomplete: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something that was left out, counted under its reason.

    Args:
        reason: a few words that are the same for all of the kind, such as ``"mask smaller than 0.153 %"``.
        where: file below the root and part.
        detail: what is particular to this one.
    """

    reason: str
    where: str
    detail: str = ""
