# SPDX-License-Identifier: Apache-2.0

"""A volume with its label maps, ``[X, Y, Z]`` in RAS+, and which of its slices become images.

`gmai_xtuner.core.imaging.volumes` says how slices are turned; label maps are turned like the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from data_tools.options import Options
from data_tools.records import Annotation
from gmai_xtuner.core.imaging import volumes
from gmai_xtuner.core.imaging.volumes import AXES, Axis, plane
from gmai_xtuner.core.imaging.windows import IntensityWindow


@dataclass(frozen=True, slots=True)
class Structure:
    """A label, as the source has it: one value of the label map of this index."""

    label: str
    layer: int
    value: int
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Volume:
    """Voxels ``[X, Y, Z]`` in RAS+, finite, and label maps that an expert drew.

    ``affine`` is float64 ``[4, 4]``, from voxel indices to millimetres in RAS+; ``layers`` integer ``[X, Y,
    Z]`` each: structures that overlap lie in different ones. A value without a structure is not annotated.
    ``unclear`` are bool ``[X, Y, Z]``: voxels that nobody decided on; a slice that holds one is dropped.
    """

    voxels: np.ndarray
    affine: np.ndarray
    layers: tuple[np.ndarray, ...] = ()
    structures: tuple[Structure, ...] = ()
    unclear: np.ndarray | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along ``X``, ``Y`` and ``Z``."""
        return volumes.spacing_of(self.affine)


def present(array: np.ndarray) -> list[int]:
    """Return the values that an integer array holds, ascending; fast for label maps of 8 and 16 bits."""
    if array.dtype in (np.uint8, np.uint16):
        return [int(value) for value in np.flatnonzero(np.bincount(array.reshape(-1)))]
    return [int(value) for value in np.unique(array)]


def structures_of(layer: np.ndarray, number: int = 0) -> tuple[Structure, ...]:
    """Return a structure for each value but 0, with the value as its label; one slice in memory at a time."""
    values = set().union(*(present(layer[:, :, index]) for index in range(layer.shape[2])))
    return tuple(Structure(str(value), number, value) for value in sorted(values - {0}))


def pack(
    masks: Iterable[tuple[str, np.ndarray, Mapping[str, str]]], shape: tuple[int, ...]
) -> tuple[tuple[np.ndarray, ...], tuple[Structure, ...]]:
    """Put (label, bool mask, attributes) into as few layers as a first fit finds; empty ones are left out."""
    layers: list[np.ndarray] = []
    used: list[int] = []
    structures = []
    for label, mask, attributes in masks:
        if not mask.any():
            continue
        for number, layer in enumerate(layers):
            if used[number] < 255 and not (layer[mask] > 0).any():
                break
        else:
            number = len(layers)
            layers.append(np.zeros(shape, dtype=np.uint8))
            used.append(0)
        used[number] += 1
        layers[number][mask] = used[number]
        structures.append(Structure(label, number, used[number], attributes))
    return tuple(layers), tuple(structures)


class Slicing(Options):
    """Keys of the job: which slices of a volume become images; docs/corpus.md explains them."""

    axes: tuple[Axis, ...] = Field(AXES, min_length=1)
    keep: Literal["labelled", "all"] = "labelled"
    every: int = Field(1, ge=1)
    at_most_a_label: int | None = Field(None, ge=1)
    at_most_a_volume: int | None = Field(None, ge=1)
    square_pixels: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """One image, uint8 ``[H, W]``, of a volume, with an annotation for each structure that it holds.

    ``unclear``: it holds voxels that nobody decided on. ``stretched``: the millimetres of its square pixels.
    """

    image: np.ndarray
    annotations: tuple[Annotation, ...]
    axis: Axis
    index: int
    unclear: bool
    stretched: float | None


def slices(
    volume: Volume, window: IntensityWindow, slicing: Slicing, axes: Sequence[Axis] = ()
) -> Iterator[Slice]:
    """Yield the chosen slices, axis by axis (default: the job's), one in memory at a time."""
    for along in axes or slicing.axes:
        for index in chosen(volume, along, slicing):
            yield take(volume, window, along, index, square_pixels=slicing.square_pixels)


def take(
    volume: Volume, window: IntensityWindow, axis: Axis, index: int, *, square_pixels: bool = False
) -> Slice:
    """Return one slice as an image with its masks."""
    image = window.apply(plane(volume.voxels, axis, index))
    maps = [plane(layer, axis, index) for layer in volume.layers]
    spacing = volumes.pixel_spacing(volume.spacing, axis)
    square = volumes.square_size(image.shape, spacing) if square_pixels else None
    if square:
        size = max(1, round(square[0])), max(1, round(square[1]))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        maps = [_nearest(values, size) for values in maps]
    held = [set(present(values)) for values in maps]
    annotations = tuple(
        Annotation(item.label, mask=maps[item.layer] == item.value, attributes=item.attributes)
        for item in volume.structures
        if item.value in held[item.layer]
    )
    unclear = volume.unclear is not None and bool(plane(volume.unclear, axis, index).any())
    stretched = min(spacing) if square else None
    return Slice(np.ascontiguousarray(image), annotations, axis, index, unclear, stretched)


def chosen(volume: Volume, axis: Axis, slicing: Slicing) -> list[int]:
    """Return the chosen indices along ``axis``, ascending."""
    number = AXES.index(axis)
    length = volume.voxels.shape[number]
    wanted = np.zeros(length, dtype=bool)
    wanted[:: slicing.every] = True
    holds = _holds(volume, number) & wanted
    taken = np.zeros(length, dtype=bool)
    for row in holds:
        taken[_spread(np.flatnonzero(row), slicing.at_most_a_label)] = True
    if slicing.keep == "all" or not volume.structures:
        taken |= wanted & ~holds.any(axis=0)
    indices: list[int] = _spread(np.flatnonzero(taken), slicing.at_most_a_volume).tolist()
    return indices


def _holds(volume: Volume, number: int) -> np.ndarray:
    """Return bool ``[structures, length]``: which slices hold which structure."""
    holds = np.zeros((len(volume.structures), volume.voxels.shape[number]), dtype=bool)
    for index in range(holds.shape[1]):
        at = tuple(index if axis == number else slice(None) for axis in range(3))
        held = [set(present(layer[at])) for layer in volume.layers]
        for row, item in enumerate(volume.structures):
            holds[row, index] = item.value in held[item.layer]
    return holds


def _spread(indices: np.ndarray, number: int | None) -> np.ndarray:
    """Return at most ``number`` of the indices, the middles of as many equal parts of them."""
    if number is None or len(indices) <= number:
        return indices
    places = np.floor((np.arange(number) + 0.5) * len(indices) / number).astype(np.int64)
    return indices[places]


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return ``[H, W]`` of ``size`` ``(W, H)``: the value at each new pixel's centre, as PIL has it."""
    height, width = values.shape
    rows = np.minimum(((np.arange(size[1]) + 0.5) * height / size[1]).astype(np.int64), height - 1)
    columns = np.minimum(((np.arange(size[0]) + 0.5) * width / size[0]).astype(np.int64), width - 1)
    return values[rows[:, None], columns[None, :]]
