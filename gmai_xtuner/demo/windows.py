"""Intensities -> grey levels, as a viewer's window does it.

A window in Hounsfield units by its usual name, one of the file's own (PS3.3 C.11.2.1.2, with its function),
or what the corpus builder takes where nothing is known: soft tissue for CT, else the 0.5th to 99.5th
percentile of the foreground, which is what lies above the smallest value. So the model sees what it saw in
training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Function = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]

FOREGROUND = (0.5, 99.5)


@dataclass(frozen=True, slots=True)
class Window:
    """What is shown between black and white.

    Args:
        center: the grey in the middle, in the unit of the intensities.
        width: from black to white, above 0.
        function: of the DICOM standard; ``LINEAR`` has its half a unit's shift, ``LINEAR_EXACT`` has none.
    """

    center: float
    width: float
    function: Function = "LINEAR_EXACT"

    def __post_init__(self) -> None:
        least = 1.0 if self.function == "LINEAR" else 0.0
        finite = np.isfinite(self.center) and np.isfinite(self.width)
        if not finite or self.width < least or self.width <= 0:
            raise ValueError(
                f"a window needs a finite centre and a width above {least:g}, got {self.center}, {self.width}"
            )

    def apply(self, values: np.ndarray) -> np.ndarray:
        """uint8 of the shape of ``values``, rounded half up."""
        exact = values.astype(np.float64)
        if self.function == "SIGMOID":
            # exp of a large number overflows to inf, and 1 / inf is the 0 that is meant
            with np.errstate(over="ignore"):
                share = 1.0 / (1.0 + np.exp(-4.0 * (exact - self.center) / self.width))
        elif self.function == "LINEAR":
            # A width of 1 is a threshold: everything above the centre less one half is white.
            if self.width == 1:
                share = (exact > self.center - 0.5).astype(np.float64)
            else:
                share = (exact - (self.center - 0.5)) / (self.width - 1.0) + 0.5
        else:
            share = (exact - (self.center - self.width / 2)) / self.width
        return np.floor(np.clip(share, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


PRESETS: dict[str, Window] = {
    "soft_tissue": Window(40, 400),
    "lung": Window(-600, 1500),
    "brain": Window(40, 80),
    "bone": Window(400, 1800),
}
"""In Hounsfield units: MedSAM's widths and levels."""


def foreground_window(values: np.ndarray) -> Window:
    """From the 0.5th to the 99.5th percentile of what lies above the smallest value.

    Where all of that is one value, as in a mask, the window reaches down to the smallest one.

    Args:
        values: all intensities of a picture or a volume, finite.
    """
    # Percentiles of a few million voxels don't change what is seen; all of a large volume take seconds.
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.size // 4_000_000)]
    foreground = flat[flat > flat.min()]
    if not foreground.size:
        return Window(float(flat[0]), 1.0)
    low, high = (float(value) for value in np.percentile(foreground, FOREGROUND))
    if not high > low:
        low = float(flat.min())
    return Window((low + high) / 2, high - low)
