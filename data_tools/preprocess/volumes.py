"""A volume and its label maps, brought to one orientation.

``X``, ``Y`` and ``Z`` are the lengths of the three axes. After `to_ras` they run towards the patient's Right,
Anterior and Superior (NIfTI's RAS+); an oblique volume is turned to the nearest axes, never resampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

# DICOM and ITK count positions towards Left, Posterior and Superior, NIfTI towards Right, Anterior, Superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, slots=True)
class Structure:
    """What one value of one label map stands for.

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
    """Voxels with what an expert drew into them.

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
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip axes so that they run nearest to Right, Anterior, Superior; a view, not a copy.

    It is what `nibabel.as_closest_canonical` does, for arrays of any origin.

    Args:
        array: ``[I, J, K]``.
        affine: ``[4, 4]``, from indices to RAS+ millimetres.

    Raises:
        ValueError: the affine is not invertible or not finite.
    """
    from nibabel import orientations

    affine = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError("the affine can't be inverted")
    orientation = orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        raise ValueError("the affine leaves an axis without a direction")
    turned = orientations.apply_orientation(array, orientation)
    return turned, affine @ orientations.inv_ornt_aff(orientation, array.shape)


def orientation(affine: np.ndarray) -> str:
    """The axes' directions in letters, such as ``LPS``: where the indices grow to."""
    from nibabel.orientations import aff2axcodes

    return "".join(str(code) for code in aff2axcodes(affine))


def same_grid(
    shape: tuple[int, ...],
    affine: np.ndarray,
    other_shape: tuple[int, ...],
    other_affine: np.ndarray,
    *,
    tolerance: float = 0.1,
) -> str:
    """Why two grids are not the same, or an empty text.

    Args:
        tolerance: in voxels (of the smallest spacing): how far any corner may lie from its twin.
    """
    if shape != other_shape:
        return f"{_size(shape)} voxels against {_size(other_shape)}"
    corners = np.array(
        [
            [x, y, z, 1.0]
            for x in (0, shape[0] - 1)
            for y in (0, shape[1] - 1)
            for z in (0, shape[2] - 1)
        ]
    )
    distance = float(np.linalg.norm(corners @ (affine - other_affine).T, axis=1).max())
    spacing = float(np.linalg.norm(affine[:3, :3], axis=0).min())
    if distance > tolerance * spacing:
        return f"corners lie up to {distance:.3g} mm apart, voxels are {spacing:.3g} mm"
    return ""


def present(array: np.ndarray) -> list[int]:
    """The values that an integer array holds, ascending; fast for label maps of 8 and 16 bits."""
    if array.dtype in (np.uint8, np.uint16):
        return [int(value) for value in np.flatnonzero(np.bincount(array.reshape(-1)))]
    return [int(value) for value in np.unique(array)]


def structures_of(layer: np.ndarray, number: int = 0) -> tuple[Structure, ...]:
    """A structure for each value but 0, with the value as its label; one slice in memory at a time."""
    values: set[int] = set()
    for index in range(layer.shape[2]):
        values.update(present(layer[:, :, index]))
    return tuple(Structure(str(value), number, value) for value in sorted(values - {0}))


def pack(
    masks: Iterable[tuple[str, np.ndarray, Mapping[str, str]]], shape: tuple[int, ...]
) -> tuple[tuple[np.ndarray, ...], tuple[Structure, ...]]:
    """Masks that may overlap -> as few layers as a first fit finds. A mask without voxels is left out.

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


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(length) for length in shape)
