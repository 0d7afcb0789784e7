# SPDX-License-Identifier: Apache-2.0

"""What an uploaded file is once it is open: an image, frames, or a volume, each of which renders views.

All three have ``facts``; ``axes``, along which there are several images (the first is the default);
``channels``, the length of a fourth axis; ``window``, the default one, None where there are no intensities;
``own_window``, True if that is the file's; ``hounsfield``, True if windows in Hounsfield units make sense;
``extent``, the smallest and largest intensity; ``nbytes``; ``length(axis)``; and ``render(view)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from gmai_xtuner.core.imaging.volumes import AXES, pixel_spacing, plane, square_size
from gmai_xtuner.core.imaging.volumes import Axis as SpatialAxis
from gmai_xtuner.core.imaging.windows import Window
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.demo.limits import Limits

Axis = Literal["frame"] | SpatialAxis

WindowChoice = Window | Literal["file"]
"""``file`` is what the file itself says: its look-up table or window, or the default without any."""


@dataclass(frozen=True, slots=True)
class View:
    """A choice of one image of a study.

    Args:
        axis: one of the study's, None for a single image.
        index: along the axis, from 0.
        channel: of a volume with a fourth axis, from 0.
        window: for studies with intensities.
    """

    axis: Axis | None = None
    index: int = 0
    channel: int = 0
    window: WindowChoice = "file"


@dataclass(frozen=True, slots=True)
class Facts:
    """What may be shown of a file: nothing that says who the patient is.

    Args:
        kind: ``picture``, ``DICOM`` or ``NIfTI``.
        modality: DICOM's code, or empty.
        size: lengths of the axes, for people.
        notes: keys of `words`, such as ``no_orientation``.
    """

    kind: str
    modality: str
    size: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A photograph or a scan without intensities: RGB as it is."""

    image: Image.Image
    facts: Facts
    axes: tuple[Axis, ...] = ()
    channels: int = 1
    window: Window | None = None
    own_window: bool = False
    hounsfield: bool = False
    extent: tuple[float, float] = (0.0, 255.0)

    @property
    def nbytes(self) -> int:
        return self.image.width * self.image.height * 3

    def length(self, axis: Axis) -> int:
        raise KeyError(axis)

    def render(self, view: View) -> Image.Image:
        return self.image


@dataclass(frozen=True)
class Frames:
    """One or several frames of a file, in its order.

    Args:
        values: ``[N, H, W]`` intensities, or uint8 ``[N, H, W, 3]`` RGB.
        windows: of each frame by the file; one for all, or None without intensities.
        inverted: MONOCHROME1: the smallest value is white.
        lookups: VOI LUT of each frame by the file, intensities -> uint8, in the place of its window.
    """

    values: np.ndarray
    facts: Facts
    windows: Sequence[Window] | None = None
    inverted: bool = False
    lookups: Sequence[Callable[[np.ndarray], np.ndarray] | None] = ()
    own_window: bool = False
    hounsfield: bool = False
    channels: int = 1

    @property
    def axes(self) -> tuple[Axis, ...]:
        return ("frame",) if len(self.values) > 1 else ()

    @property
    def window(self) -> Window | None:
        return self.windows[0] if self.windows else None

    @cached_property
    def extent(self) -> tuple[float, float]:
        return float(self.values.min()), float(self.values.max())

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def length(self, axis: Axis) -> int:
        if axis != "frame":
            raise KeyError(axis)
        return len(self.values)

    def render(self, view: View) -> Image.Image:
        frame = self.values[view.index]
        if self.windows is None:
            return Image.fromarray(np.ascontiguousarray(frame), "RGB")
        if view.window != "file":
            grey = view.window.apply(frame)
        elif self.lookups and (lookup := self.lookups[view.index]) is not None:
            grey = lookup(frame)
        else:
            grey = self.windows[view.index if len(self.windows) > 1 else 0].apply(frame)
        return _rgb(255 - grey if self.inverted else grey)


@dataclass(frozen=True)
class Volume:
    """Voxels in RAS+.

    Args:
        values: ``[X, Y, Z, C]``.
        spacing: millimetres between voxels along x, y and z. Slices are stretched to square pixels.
        axes: along which it may be cut, the one of acquisition first.
        window: of the file, or by what is known of it.
        inverted: as in `Frames`.
    """

    values: np.ndarray
    facts: Facts
    spacing: tuple[float, float, float]
    axes: tuple[SpatialAxis, ...]
    window: Window
    inverted: bool = False
    own_window: bool = False
    hounsfield: bool = False

    @property
    def channels(self) -> int:
        return self.values.shape[3]

    @cached_property
    def extent(self) -> tuple[float, float]:
        return float(self.values.min()), float(self.values.max())

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def length(self, axis: Axis) -> int:
        return self.values.shape[AXES.index(axis)]  # type: ignore[arg-type]

    def render(self, view: View) -> Image.Image:
        axis = self.axes[0] if view.axis is None else view.axis
        assert axis != "frame"
        window = self.window if view.window == "file" else view.window
        grey = window.apply(plane(self.values[..., view.channel], axis, view.index))
        image = _rgb(255 - grey if self.inverted else grey)
        square = square_size(grey.shape, pixel_spacing(self.spacing, axis))
        if square is None:
            return image
        size = (max(1, round(square[0])), max(1, round(square[1])))
        return image.resize(size, Image.Resampling.BILINEAR)

    def checked(self, limits: Limits) -> Volume:
        """Return itself, if every slice can be shown: a wrong spacing asks for images of any size.

        Raises:
            PageError: with square pixels, slices along an axis would be too large.
        """
        for axis in self.axes:
            shape = plane(self.values[..., 0], axis, 0).shape
            square = square_size(shape, pixel_spacing(self.spacing, axis))
            width, height = square or shape[::-1]
            if width * height > limits.pixels:
                raise PageError(
                    "too_stretched",
                    spacing=" × ".join(f"{length:.4g}" for length in self.spacing),
                    width=f"{width:,.0f}",
                    height=f"{height:,.0f}",
                    limit=f"{limits.pixels:,}",
                )
        return self


Study = Picture | Frames | Volume
"""An opened file, or series of files."""


def _rgb(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(grey)).convert("RGB")


def first_view(study: Study) -> View:
    """Return the middle slice of a volume, the first frame of anything else."""
    if not study.axes:
        return View()
    axis = study.axes[0]
    index = 0 if axis == "frame" else study.length(axis) // 2
    return View(axis, index)
