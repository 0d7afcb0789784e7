"""From a scanner's intensities to 8 bits; what was done is put into words and kept with the record.

Published choices, all by name:

* ``slice``, ``volume``: from the smallest to the largest value of the picture or of the whole volume.
  SA-Med2D-20M (arXiv 2311.11969) does the first, also for CT.
* ``percentile``: from the 0.5th to the 99.5th percentile of the volume's foreground, which are the voxels
  above its smallest value. MedSAM (Ma et al. 2024) for all but CT.
* a window in Hounsfield units: by name (`WINDOWS`), ``[low, high]`` or ``{level: 40, width: 400}``.
* ``auto``: soft tissue for CT, else ``percentile``. Min-max of a CT spends its grey levels on air and metal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.options import Options

# Name -> (low, high) in Hounsfield units. MedSAM gives width and level (soft tissue 400/40, lung 1500/-600,
# brain 80/40, bone 1800/400), BiomedParse (Zhao et al. 2024) the two ends.
WINDOWS: dict[str, tuple[float, float]] = {
    "soft tissue": (-160, 240),
    "lung": (-1350, 150),
    "brain": (0, 80),
    "bone": (-500, 1300),
    "biomedparse abdomen": (-150, 250),
    "biomedparse lung": (-1000, 1000),
    "biomedparse pelvis": (-55, 200),
    "biomedparse liver": (-25, 230),
    "biomedparse colon": (-68, 187),
    "biomedparse pancreas": (-100, 200),
}
METHODS = ("auto", "slice", "volume", "percentile")
FOREGROUND = (0.5, 99.5)
CT_NAMES = ("ct", "computed tomography", "ct scan")


class LevelAndWidth(Options):
    """``{level: 40, width: 400}`` shows -160 to 240."""

    level: float
    width: float = Field(gt=0)


class Range(Options):
    """``{low: -160, high: 240}``; in a job also ``[-160, 240]``."""

    low: float
    high: float

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, value: object) -> object:
        if isinstance(value, list | tuple) and len(value) == 2:
            return {"low": value[0], "high": value[1]}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"a window runs from low to high, not from {self.low} to {self.high}")
        return self


Window = (
    Literal[
        "auto",
        "slice",
        "volume",
        "percentile",
        "soft tissue",
        "lung",
        "brain",
        "bone",
        "biomedparse abdomen",
        "biomedparse lung",
        "biomedparse pelvis",
        "biomedparse liver",
        "biomedparse colon",
        "biomedparse pancreas",
    ]
    | LevelAndWidth
    | Range
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How intensities become grey levels.

    Args:
        apply: intensities ``[H, W]`` of any number type -> uint8 ``[H, W]``.
        text: what it does, for ``Sample.preprocessing``.
    """

    apply: Callable[[np.ndarray], np.ndarray]
    text: str


def linear(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8: ``low`` and below are 0, ``high`` and above 255, between them a line, rounded half up.

    Where ``low`` equals ``high`` everything is 0: a picture of one grey level, which is dropped later.
    """
    if not high > low:
        return np.zeros(values.shape, dtype=np.uint8)
    share = (values.astype(np.float64) - low) / (high - low)
    return np.floor(np.clip(share, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def is_ct(modality: str | None) -> bool:
    """Whether a name or DICOM code means computed tomography."""
    return (modality or "").strip().lower() in CT_NAMES


def scale_for(window: Window, voxels: np.ndarray, *, modality: str | None) -> Scale:
    """The scale of one volume (or of one picture).

    Args:
        window: see the module.
        voxels: all of its intensities, finite.
        modality: decides what ``auto`` is.
    """
    if window == "auto":
        window = "soft tissue" if is_ct(modality) else "percentile"
    if window == "slice":
        return Scale(_own_range, "min-max of the slice")
    if window == "volume":
        low, high = float(voxels.min()), float(voxels.max())
        return _line(low, high, f"min-max of the volume, {low:g} to {high:g}")
    if window == "percentile":
        foreground = voxels[voxels > voxels.min()]
        if not foreground.size:
            return Scale(_own_range, "one grey level")
        low, high = (float(value) for value in np.percentile(foreground, FOREGROUND))
        text = "percentiles {:g} and {:g} of the foreground".format(*FOREGROUND)
        return _line(low, high, f"{text}, {low:g} to {high:g}")
    if isinstance(window, LevelAndWidth):
        text = f"window W {window.width:g} L {window.level:g}"
        half = window.width / 2
        return _line(window.level - half, window.level + half, text)
    if isinstance(window, Range):
        return _line(window.low, window.high, f"window {window.low:g} to {window.high:g}")
    low, high = WINDOWS[window]
    return _line(low, high, f"{window} window, {low:g} to {high:g}")


def _line(low: float, high: float, text: str) -> Scale:
    return Scale(lambda values: linear(values, low, high), text)


def _own_range(values: np.ndarray) -> np.ndarray:
    return linear(values, float(values.min()), float(values.max()))
