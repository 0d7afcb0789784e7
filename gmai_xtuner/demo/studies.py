"""What an uploaded file is once it is open: a picture, frames, or a volume, each of which renders views.

Axes of a volume are those of RAS+; what is up and left follows the corpus builder and radiologists' habit:

=====  =========  ==========================  ===========================
axis   plane      top of the picture          left of the picture
=====  =========  ==========================  ===========================
``x``  sagittal   superior                    anterior
``y``  coronal    superior                    the patient's right
``z``  axial      anterior                    the patient's right
=====  =========  ==========================  ===========================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from gmai_xtuner.demo.limits import Limits
from gmai_xtuner.demo.windows import Window
from gmai_xtuner.demo.words import PageError

Axis = Literal["frame", "x", "y", "z"]
SPATIAL: tuple[Axis, ...] = ("x", "y", "z")

WindowChoice = Window | Literal["file"]
"""``file`` is what the file itself says: its look-up table or window, or the default without any."""


@dataclass(frozen=True, slots=True)
class View:
    """Which picture of a study.

    Args:
        axis: one of the study's, None for a single picture.
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


class Study(Protocol):
    """An opened file, or series of files."""

    @property
    def facts(self) -> Facts:
        """What may be shown of it."""
        ...

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Along which there are several pictures; the first is the default."""
        ...

    @property
    def channels(self) -> int:
        """Length of the fourth axis."""
        ...

    @property
    def window(self) -> Window | None:
        """The default window; None where there are no intensities to window."""
        ...

    @property
    def own_window(self) -> bool:
        """Whether the default is the file's own window or look-up table."""
        ...

    @property
    def hounsfield(self) -> bool:
        """Whether windows in Hounsfield units make sense."""
        ...

    @property
    def extent(self) -> tuple[float, float]:
        """Smallest and largest intensity."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory."""
        ...

    def length(self, axis: Axis) -> int:
        """Pictures along an axis."""
        ...

    def render(self, view: View) -> Image.Image:
        """RGB picture of a view."""
        ...


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
        lookup: VOI LUT of the file, intensities -> uint8, in the place of its window.
        own_window: see `Study`.
        hounsfield: see `Study`.
    """

    values: np.ndarray
    facts: Facts
    windows: Sequence[Window] | None = None
    inverted: bool = False
    lookup: Callable[[np.ndarray], np.ndarray] | None = None
    own_window: bool = False
    hounsfield: bool = False
    channels: int = 1
    known_extent: list[tuple[float, float]] = field(default_factory=list, repr=False)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return ("frame",) if len(self.values) > 1 else ()

    @property
    def window(self) -> Window | None:
        return self.windows[0] if self.windows else None

    @property
    def extent(self) -> tuple[float, float]:
        return _extent(self.values, self.known_extent)

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
        elif self.lookup is not None:
            grey = self.lookup(frame)
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
        default: window of the file, or by what is known of it.
        inverted: as in `Frames`.
        own_window, hounsfield: see `Study`.
    """

    values: np.ndarray
    facts: Facts
    spacing: tuple[float, float, float]
    axes: tuple[Axis, ...]
    default: Window
    inverted: bool = False
    own_window: bool = False
    hounsfield: bool = False
    known_extent: list[tuple[float, float]] = field(default_factory=list, repr=False)

    @property
    def channels(self) -> int:
        return self.values.shape[3]

    @property
    def window(self) -> Window:
        return self.default

    @property
    def extent(self) -> tuple[float, float]:
        return _extent(self.values, self.known_extent)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def length(self, axis: Axis) -> int:
        return self.values.shape[SPATIAL.index(axis)]

    def render(self, view: View) -> Image.Image:
        axis = view.axis or self.axes[0]
        plane = _plane(self.values[..., view.channel], axis, view.index)
        window = self.default if view.window == "file" else view.window
        grey = window.apply(plane)
        picture = _rgb(255 - grey if self.inverted else grey)
        width, height = self._stretched(axis)
        if (width, height) == picture.size:
            return picture
        size = (max(1, round(width)), max(1, round(height)))
        return picture.resize(size, Image.Resampling.BILINEAR)

    def checked(self, limits: Limits) -> Volume:
        """Itself, if every slice can be shown: a wrong spacing asks for pictures of any size.

        Raises:
            PageError: with square pixels, slices along an axis would be too large.
        """
        for axis in self.axes:
            width, height = self._stretched(axis)
            if width * height > limits.pixels:
                raise PageError(
                    "too_stretched",
                    spacing=" × ".join(f"{length:.4g}" for length in self.spacing),
                    width=f"{width:,.0f}",
                    height=f"{height:,.0f}",
                    limit=f"{limits.pixels:,}",
                )
        return self

    def _stretched(self, axis: Axis) -> tuple[float, float]:
        """Width and height of a slice with square pixels; those of its voxels if they are nearly square."""
        across, up = {"x": (1, 2), "y": (0, 2), "z": (0, 1)}[axis]
        columns, rows = self.spacing[across], self.spacing[up]
        width, height = self.values.shape[across], self.values.shape[up]
        fine = min(rows, columns)
        if max(rows, columns) <= fine * 1.01:
            return width, height
        return width * columns / fine, height * rows / fine


def _plane(array: np.ndarray, axis: Axis, index: int) -> np.ndarray:
    """``[H, W]`` of ``[X, Y, Z]``, turned as the module's table says."""
    if axis == "x":
        return array[index, ::-1, ::-1].T
    if axis == "y":
        return array[::-1, index, ::-1].T
    return array[::-1, ::-1, index].T


def _rgb(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(grey)).convert("RGB")


def _extent(values: np.ndarray, known: list[tuple[float, float]]) -> tuple[float, float]:
    if not known:
        known.append((float(values.min()), float(values.max())))
    return known[0]


def first_view(study: Study) -> View:
    """The middle slice of a volume, the first frame of anything else."""
    if not study.axes:
        return View()
    axis = study.axes[0]
    index = 0 if axis == "frame" else study.length(axis) // 2
    return View(axis, index)
