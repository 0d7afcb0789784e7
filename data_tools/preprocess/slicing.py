"""Pictures out of volumes, each with what was drawn into it, turned the way radiologists look at them.

The volume is in RAS+ (see `volumes`). What is up and what is left in the picture:

=====  =========  ==========================  ===========================
axis   plane      top of the picture          left of the picture
=====  =========  ==========================  ===========================
``x``  sagittal   superior                    anterior
``y``  coronal    superior                    the patient's right
``z``  axial      anterior                    the patient's right
=====  =========  ==========================  ===========================

So an axial picture is what a DICOM viewer shows of an axial series. The same flips are made for the label
maps. ``slice`` counts voxels along the RAS+ axis from its low end: ``z`` 0 is the slice nearest the feet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from data_tools.options import Options
from data_tools.preprocess.volumes import Volume, present
from data_tools.preprocess.windows import Scale
from data_tools.records import Annotation

Axis = Literal["x", "y", "z"]
AXES: tuple[Axis, ...] = ("x", "y", "z")
PLANES = {"x": "sagittal", "y": "coronal", "z": "axial"}


class Slicing(Options):
    """Which slices of a volume become pictures.

    Args:
        axes: SA-Med2D-20M takes all three; its rule on short edges (``min_edge_ratio`` of the cleaning
            rules) then drops the thin ones.
        keep: ``labelled``: slices that hold a structure; ``all``: also those without one. A volume without
            a label map gives all of its slices.
        every: take each Nth voxel layer, counted from index 0.
        at_most_a_label: slices of each structure on each axis, spread evenly over those that hold it.
        at_most_a_volume: slices of each axis, spread evenly over those that are left.
        square_pixels: stretch pictures of unequal spacing to the finer of the two (bilinear; label maps by
            nearest neighbour on the same grid), so that shapes are as in the body.
    """

    axes: tuple[Axis, ...] = Field(AXES, min_length=1)
    keep: Literal["labelled", "all"] = "labelled"
    every: int = Field(1, ge=1)
    at_most_a_label: int | None = Field(None, ge=1)
    at_most_a_volume: int | None = Field(None, ge=1)
    square_pixels: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """One picture of a volume.

    Args:
        image: uint8 ``[H, W]``.
        annotations: one each structure that the slice holds, with its mask.
        axis, index: which.
        unclear: whether it holds voxels that nobody decided on.
        stretched: the spacing that the pixels were brought to, millimetres, or None.
    """

    image: np.ndarray
    annotations: tuple[Annotation, ...]
    axis: Axis
    index: int
    unclear: bool
    stretched: float | None


def slices(volume: Volume, scale: Scale, slicing: Slicing) -> Iterator[Slice]:
    """The chosen slices, axis by axis, one in memory at a time."""
    for axis in slicing.axes:
        for index in chosen(volume, axis, slicing):
            yield take(volume, scale, axis, index, square_pixels=slicing.square_pixels)


def take(
    volume: Volume, scale: Scale, axis: Axis, index: int, *, square_pixels: bool = False
) -> Slice:
    """One slice as a picture with its masks."""
    image = scale.apply(plane(volume.voxels, axis, index))
    maps = [plane(layer, axis, index) for layer in volume.layers]
    spacing = pixel_spacing(volume, axis) if square_pixels else None
    size = square_size(image.shape, spacing) if spacing else None
    if size:
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        maps = [_nearest(values, size) for values in maps]
    held = [set(present(values)) for values in maps]
    annotations = tuple(
        Annotation(item.label, mask=maps[item.layer] == item.value, attributes=item.attributes)
        for item in volume.structures
        if item.value in held[item.layer]
    )
    unclear = volume.unclear is not None and bool(plane(volume.unclear, axis, index).any())
    return Slice(
        np.ascontiguousarray(image),
        annotations,
        axis,
        index,
        unclear,
        min(spacing) if spacing and size else None,
    )


def plane(array: np.ndarray, axis: Axis, index: int) -> np.ndarray:
    """``[H, W]``, a view: one slice of ``[X, Y, Z]``, turned as the module's table says."""
    if axis == "x":
        return array[index, ::-1, ::-1].T
    if axis == "y":
        return array[::-1, index, ::-1].T
    return array[::-1, ::-1, index].T


def pixel_spacing(volume: Volume, axis: Axis) -> tuple[float, float]:
    """Millimetres from row to row and from column to column of an axis' pictures."""
    x, y, z = volume.spacing
    return {"x": (z, y), "y": (z, x), "z": (y, x)}[axis]


def square_size(shape: tuple[int, ...], spacing: tuple[float, float]) -> tuple[int, int] | None:
    """``(W, H)`` with square pixels of the finer spacing; None if they are square within 1 %."""
    fine = min(spacing)
    if max(spacing) <= fine * 1.01:
        return None
    return max(1, round(shape[1] * spacing[1] / fine)), max(1, round(shape[0] * spacing[0] / fine))


def chosen(volume: Volume, axis: Axis, slicing: Slicing) -> list[int]:
    """Indices along ``axis``, ascending."""
    number = AXES.index(axis)
    length = volume.voxels.shape[number]
    wanted = np.zeros(length, dtype=bool)
    wanted[:: slicing.every] = True
    holds = _holds(volume, number) & wanted
    if slicing.at_most_a_label is not None:
        held = [_spread(np.flatnonzero(row), slicing.at_most_a_label) for row in holds]
        labelled = np.unique(np.concatenate([*held, np.zeros(0, dtype=np.int64)]))
    else:
        labelled = np.flatnonzero(holds.any(axis=0))
    if not volume.structures:
        taken = np.flatnonzero(wanted)
    elif slicing.keep == "all":
        bare = np.flatnonzero(wanted & ~holds.any(axis=0))
        taken = np.union1d(labelled, bare)
    else:
        taken = labelled
    if slicing.at_most_a_volume is not None:
        taken = _spread(taken, slicing.at_most_a_volume)
    return [int(index) for index in taken]


def _holds(volume: Volume, number: int) -> np.ndarray:
    """bool ``[structures, length]``: which slices hold which structure; one slice in memory at a time."""
    holds = np.zeros((len(volume.structures), volume.voxels.shape[number]), dtype=bool)
    for index in range(holds.shape[1]):
        at = tuple(index if axis == number else slice(None) for axis in range(3))
        held = [set(present(layer[at])) for layer in volume.layers]
        for row, item in enumerate(volume.structures):
            holds[row, index] = item.value in held[item.layer]
    return holds


def _spread(indices: np.ndarray, number: int) -> np.ndarray:
    """At most ``number`` of the indices, the middles of as many equal parts of them."""
    if len(indices) <= number:
        return indices
    places = np.floor((np.arange(number) + 0.5) * len(indices) / number).astype(np.int64)
    return indices[places]


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[H, W]`` of ``size`` ``(W, H)``: the value at each new pixel's centre, as PIL's resizing has it."""
    height, width = values.shape
    rows = np.minimum(((np.arange(size[1]) + 0.5) * height / size[1]).astype(np.int64), height - 1)
    columns = np.minimum(((np.arange(size[0]) + 0.5) * width / size[0]).astype(np.int64), width - 1)
    return values[rows[:, None], columns[None, :]]
