# SPDX-License-Identifier: Apache-2.0

"""A volume with its label maps, ``[X, Y, Z]`` in RAS+ (see `gmai_xtuner.core.imaging.volumes`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gmai_xtuner.core.imaging.volumes import spacing_of


@dataclass(frozen=True, slots=True)
class Structure:
    """A label: one value of one label map.

    Args:
        label: as the source has it.
        layer: index into the volume's ``layers``.
        value: of its voxels in that layer.
        attributes: such as ``{"side": "left"}``.
    """

    label: str
    layer: int
    value: int
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Volume:
    """Voxels, and label maps that an expert drew.

    Args:
        voxels: ``[X, Y, Z]`` in RAS+, finite.
        affine: float64 ``[4, 4]``, from voxel indices to millimetres in RAS+.
        layers: integer ``[X, Y, Z]`` each; structures that overlap lie in different layers.
        structures: what the layers' values stand for; a value without a structure is not annotated.
        unclear: bool ``[X, Y, Z]``: voxels that nobody decided on; a slice that holds one is dropped.
    """

    voxels: np.ndarray
    affine: np.ndarray
    layers: tuple[np.ndarray, ...] = ()
    structures: tuple[Structure, ...] = ()
    unclear: np.ndarray | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along ``X``, ``Y`` and ``Z``."""
        return spacing_of(self.affine)


def present(array: np.ndarray) -> list[int]:
    """Return the values that an integer array holds, ascending; fast for label maps of 8 and 16 bits."""
    if array.dtype in (np.uint8, np.uint16):
        return [int(value) for value in np.flatnonzero(np.bincount(array.reshape(-1)))]
    return [int(value) for value in np.unique(array)]


def structures_of(layer: np.ndarray, number: int = 0) -> tuple[Structure, ...]:
    """Return a structure for each value but 0, with the value as its label; one slice in memory at a time."""
    values: set[int] = set()
    for index in range(layer.shape[2]):
        values.update(present(layer[:, :, index]))
    return tuple(Structure(str(value), number, value) for value in sorted(values - {0}))


def pack(
    masks: Iterable[tuple[str, np.ndarray, Mapping[str, str]]], shape: tuple[int, ...]
) -> tuple[tuple[np.ndarray, ...], tuple[Structure, ...]]:
    """Put masks that may overlap into as few layers as a first fit finds. A mask without voxels is left out.

    Args:
        masks: label, bool array of ``shape``, attributes.
        shape: ``[X, Y, Z]``.
    """
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
