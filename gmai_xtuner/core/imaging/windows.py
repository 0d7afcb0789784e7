# SPDX-License-Identifier: Apache-2.0

"""Intensities -> grey levels; what was done is put into words, which are kept with the record.

Published choices, all by name:

* ``slice``, ``volume``: from the smallest to the largest value of the image or of the whole volume.
  SA-Med2D-20M (arXiv 2311.11969) does the first, also for CT.
* ``percentile``: from the 0.5th to the 99.5th percentile of the volume's foreground, which are the voxels
  above its smallest value. MedSAM (Ma et al. 2024) for all but CT.
* a window in Hounsfield units: by name (`WINDOWS`), by its two ends, or by level and width (`Window`).
* ``auto``: soft tissue for CT, else ``percentile``. Min-max of a CT spends its grey levels on air and metal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Function = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]

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
FOREGROUND = (0.5, 99.5)
CT_NAMES = ("ct", "computed tomography", "ct scan")


@dataclass(frozen=True, slots=True)
class Window:
    """A window as viewers and DICOM (PS3.3 C.11.2.1.2) have it: centre and width in the intensities' unit.

    Of the standard's functions ``LINEAR`` has its half a unit's shift, ``LINEAR_EXACT`` has none. A
    ValueError for what can't be applied.
    """

    center: float
    width: float
    function: Function = "LINEAR_EXACT"

    def __post_init__(self) -> None:
        if self.function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
            raise ValueError("unknown VOI LUT function")
        least = 1.0 if self.function == "LINEAR" else 0.0
        finite = np.isfinite(self.center) and np.isfinite(self.width)
        if not finite or self.width < least or self.width <= 0:
            needs = f"a window needs a finite centre and a width above {least:g}"
            raise ValueError(f"{needs}, got W {self.width:g} L {self.center:g}")

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return uint8 of the shape of ``values``, rounded half up."""
        low = self.center - self.width / 2
        if self.function == "LINEAR_EXACT":
            return linear(values, low, self.center + self.width / 2)
        exact = values.astype(np.float64)
        grey: np.ndarray
        if self.function == "SIGMOID":
            # exp of a large number overflows to inf, and 255 / inf is the 0 that is meant
            with np.errstate(over="ignore"):
                grey = 255.0 / (1.0 + np.exp(-4.0 * (exact - self.center) / self.width))
        elif self.width == 1:  # a threshold
            grey = (exact > low) * 255.0
        else:
            grey = (exact - low) * (255.0 / (self.width - 1.0))
        return np.floor(np.clip(grey, 0.0, 255.0) + 0.5).astype(np.uint8)


PRESETS: dict[str, Window] = {
    name.replace(" ", "_"): Window((low + high) / 2, high - low)
    for name, (low, high) in WINDOWS.items()
    if not name.startswith("biomedparse")
}
"""The windows that the page offers."""


@dataclass(frozen=True, slots=True)
class IntensityWindow:
    """How intensities become grey levels: ``[H, W]`` -> uint8 ``[H, W]``, and what it does as a text."""

    apply: Callable[[np.ndarray], np.ndarray]
    text: str

    def inverted(self, note: str) -> IntensityWindow:
        """Return the window with black and white exchanged, and ``note`` added to its text."""
        return IntensityWindow(lambda values: 255 - self.apply(values), f"{self.text}, {note}")


def linear(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return uint8: ``low`` and below are 0, ``high`` and above 255, between them a line, rounded half up.

    Where ``low`` equals ``high`` everything is 0: an image of one grey level, which is dropped later.
    """
    if not high > low:
        return np.zeros(values.shape, dtype=np.uint8)
    share = (values.astype(np.float64) - low) / (high - low)
    return np.floor(np.clip(share, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def window_for(
    window: str | tuple[float, float] | Window, voxels: np.ndarray, *, modality: str | None
) -> IntensityWindow:
    """Return the intensity window of one volume, or of one image, by all of its finite ``voxels``.

    ``window`` is a name of the module (``modality`` decides what ``auto`` is), the two ends, or a `Window`.
    """
    if isinstance(window, Window):
        return IntensityWindow(window.apply, f"window W {window.width:g} L {window.center:g}")
    if isinstance(window, tuple):
        return _line(*window, "window")
    if window == "auto":
        # Air is -1000 HU: without a value below 0 they are no Hounsfield units.
        is_ct = (modality or "").strip().lower() in CT_NAMES and voxels.min() < 0
        window = "soft tissue" if is_ct else "percentile"
    if window == "slice":
        return IntensityWindow(_own_range, "min-max of the slice")
    if window == "volume":
        return _line(float(voxels.min()), float(voxels.max()), "min-max of the volume,")
    if window == "percentile":
        ends = _foreground(voxels)
        if ends is None:
            return IntensityWindow(_own_range, "one grey level")
        text = "percentiles {:g} and {:g} of the foreground,".format(*FOREGROUND)
        return _line(*ends, text)
    return _line(*WINDOWS[window], f"{window} window,")


def foreground_window(values: np.ndarray) -> Window:
    """Return ``percentile`` of all (finite) intensities as a window that a user can move.

    Where all of the foreground is one value, as in a mask, the window reaches down to the smallest one.
    """
    # Percentiles of a few million voxels don't change what is seen; all of a large volume take seconds.
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.size // 4_000_000)]
    ends = _foreground(flat)
    if ends is None:
        return Window(float(flat[0]), 1.0)
    low, high = ends
    if not high > low:
        low = float(flat.min())
    return Window((low + high) / 2, high - low)


def _foreground(values: np.ndarray) -> tuple[float, float] | None:
    """Return the two percentiles of what lies above the smallest value; None if nothing does."""
    foreground = values[values > values.min()]
    if not foreground.size:
        return None
    low, high = np.percentile(foreground, FOREGROUND)
    return float(low), float(high)


def _line(low: float, high: float, text: str) -> IntensityWindow:
    return IntensityWindow(lambda values: linear(values, low, high), f"{text} {low:g} to {high:g}")


def _own_range(values: np.ndarray) -> np.ndarray:
    return linear(values, float(values.min()), float(values.max()))


HALF_OF_16_BITS = 2**15


def to_8_bits(levels: np.ndarray, *, visible: np.ndarray | None = None) -> np.ndarray:
    """Scale the deep levels of an image file to uint8, by the ``visible`` ones (docs/data.md, Images).

    16 bits that use half of their range keep their high byte; others are stretched from the smallest to the
    largest level. NaN and infinity are a ValueError.
    """
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise ValueError("holds NaN or infinite values")
    shown = levels if visible is None or not visible.any() else levels[visible]
    low, high = shown.min().item(), shown.max().item()
    is_16_bit = levels.dtype.kind != "f" and low >= 0 and high <= 65535
    if is_16_bit and (high == low or high - low >= HALF_OF_16_BITS):
        return (levels.clip(0, 65535) >> 8).astype(np.uint8)
    if high == low:
        return np.zeros(levels.shape, dtype=np.uint8)
    # a table is faster than arithmetic on each pixel
    source = np.arange(65536) if is_16_bit else levels
    scaled = (source.astype(np.float64) - low) * (255.0 / (high - low))
    grey = np.rint(scaled).clip(0, 255).astype(np.uint8)
    return grey[levels.clip(0, 65535)] if is_16_bit else grey
