# SPDX-License-Identifier: Apache-2.0

"""Opened files, each of which renders views of itself; and how much of them may be brought and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from gmai_xtuner.core.imaging.volumes import AXES, pixel_spacing, plane, square_size
from gmai_xtuner.core.imaging.volumes import Axis as SpatialAxis
from gmai_xtuner.core.imaging.windows import Window
from gmai_xtuner.demo.i18n import PageError

MEBIBYTE = 2**20
Axis = Literal["frame"] | SpatialAxis


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits beyond which something is refused, with a message, before it costs memory.

    Args:
        upload_bytes: of all files of one upload together.
        pixels: width x height of one image or slice.
        voxels: of a volume, a series, or all frames of a file.
        memory_bytes: opened images of all visitors together.
        images: in one visitor's tray.
        question_characters: of one question.
        waiting: questions in the queue.
    """

    upload_bytes: int = 256 * MEBIBYTE
    pixels: int = 50_000_000
    voxels: int = 300_000_000
    memory_bytes: int = 4096 * MEBIBYTE
    images: int = 12
    question_characters: int = 20_000
    waiting: int = 32

    def check(self, *, width: int, height: int, voxels: int) -> None:
        """Check a file's sizes before its pixels are read: more than allowed, or none, is a ``PageError``."""
        if width < 1 or height < 1 or voxels < 1:
            raise PageError("damaged")
        if width * height > self.pixels:
            raise PageError("too_many_pixels", width=width, height=height, limit=f"{self.pixels:,}")
        if voxels > self.voxels:
            raise PageError("too_many_voxels", count=f"{voxels:,}", limit=f"{self.voxels:,}")


class Memory:
    """Counts the bytes of all opened images; safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self.used = limit, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Count bytes in; if they don't fit, raise ``PageError`` and count nothing."""
        with self._lock:
            if self.used + count > self._limit:
                raise PageError("memory_full")
            self.used += count

    def give_back(self, count: int) -> None:
        """Count bytes out."""
        with self._lock:
            self.used -= count

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """:meth:`take`, and back again if what is done with them fails."""
        self.take(count)
        try:
            yield
        except BaseException:
            self.give_back(count)
            raise


@dataclass(frozen=True, slots=True)
class View:
    """A choice of one image of a study: axis (None for a single image), index, channel (of a fourth axis).

    The window, for studies with intensities, may be ``file``, what the file itself says: its look-up table or
    window, or the default without any.
    """

    axis: Axis | None = None
    index: int = 0
    channel: int = 0
    window: Window | Literal["file"] = "file"


@dataclass(frozen=True, slots=True)
class Facts:
    """What may be shown of a file: nothing that says who the patient is.

    ``kind`` is ``picture``, ``DICOM`` or ``NIfTI``, ``modality`` DICOM's code, or empty; ``notes`` are keys
    of `words`, such as ``no_orientation``.
    """

    kind: str
    modality: str
    size: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Study:
    """What frames and volumes share.

    ``inverted``: MONOCHROME1, the smallest value is white; ``own_window``: the default window is the file's;
    ``hounsfield``: windows in Hounsfield units make sense.
    """

    values: np.ndarray
    facts: Facts
    _: KW_ONLY
    inverted: bool = False
    own_window: bool = False
    hounsfield: bool = False

    @cached_property
    def extent(self) -> tuple[float, float]:
        """The smallest and largest intensity."""
        return float(self.values.min()), float(self.values.max())

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def _image(self, grey: np.ndarray) -> Image.Image:
        levels = 255 - grey if self.inverted else grey
        return Image.fromarray(np.ascontiguousarray(levels)).convert("RGB")


@dataclass(frozen=True)
class Frames(_Study):
    """One or several frames of a file, in its order.

    Args:
        values: ``[N, H, W]`` intensities, or uint8 ``[N, H, W, 3]`` RGB.
        windows: of each frame by the file, or one for all; empty without intensities.
        lookups: VOI LUT of each frame by the file, intensities -> uint8, in the place of its window.
    """

    windows: Sequence[Window] = ()
    lookups: Sequence[Callable[[np.ndarray], np.ndarray] | None] = ()
    channels = 1

    @property
    def axes(self) -> tuple[Axis, ...]:
        return ("frame",) if len(self.values) > 1 else ()

    @property
    def window(self) -> Window | None:
        """The default window."""
        return self.windows[0] if self.windows else None

    def length(self, axis: Axis) -> int:
        return len(self.values)

    def render(self, view: View) -> Image.Image:
        frame = self.values[view.index]
        if not self.windows:
            return Image.fromarray(np.ascontiguousarray(frame), "RGB")
        if view.window != "file":
            return self._image(view.window.apply(frame))
        if self.lookups and (lookup := self.lookups[view.index]) is not None:
            return self._image(lookup(frame))
        return self._image(self.windows[view.index if len(self.windows) > 1 else 0].apply(frame))


def photograph(image: Image.Image) -> Frames:
    """Return an RGB image without intensities as a study."""
    facts = Facts("picture", "", f"{image.width} × {image.height}")
    return Frames(np.asarray(image)[None], facts)


@dataclass(frozen=True)
class Volume(_Study):
    """Voxels in RAS+.

    Args:
        values: ``[X, Y, Z, C]``.
        spacing: millimetres between voxels along x, y and z. Slices are stretched to square pixels.
        axes: along which it may be cut, the one of acquisition first.
        window: of the file, or by what is known of it.
    """

    spacing: tuple[float, float, float]
    axes: tuple[SpatialAxis, ...]
    window: Window

    @property
    def channels(self) -> int:
        return self.values.shape[3]

    def length(self, axis: Axis) -> int:
        return self.values.shape[AXES.index(axis)]  # type: ignore[arg-type]

    def render(self, view: View) -> Image.Image:
        axis = self.axes[0] if view.axis is None else view.axis
        assert axis != "frame"
        window = self.window if view.window == "file" else view.window
        image = self._image(window.apply(plane(self.values[..., view.channel], axis, view.index)))
        width, height = self._size(axis)
        size = (max(1, round(width)), max(1, round(height)))
        return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)

    def _size(self, axis: SpatialAxis) -> tuple[float, float]:
        """Return width and height of a slice with square pixels."""
        shape = plane(self.values[..., 0], axis, 0).shape
        return square_size(shape, pixel_spacing(self.spacing, axis)) or shape[::-1]

    def checked(self, limits: Limits) -> Volume:
        """Return itself, if every slice can be shown: a wrong spacing asks for images of any size."""
        for width, height in map(self._size, self.axes):
            if width * height > limits.pixels:
                raise PageError(
                    "too_stretched",
                    spacing=" × ".join(f"{length:.4g}" for length in self.spacing),
                    width=f"{width:,.0f}",
                    height=f"{height:,.0f}",
                    limit=f"{limits.pixels:,}",
                )
        return self


Study = Frames | Volume
"""An opened file, or series of files."""


def first_view(study: Study) -> View:
    """Return the middle slice of a volume, the first frame of anything else."""
    if not study.axes:
        return View()
    axis = study.axes[0]
    return View(axis, 0 if axis == "frame" else study.length(axis) // 2)
