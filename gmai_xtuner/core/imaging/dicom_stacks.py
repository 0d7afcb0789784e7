# SPDX-License-Identifier: Apache-2.0

"""Slices of a DICOM series, or frames of an enhanced object, one behind the other: order and place.

Slices that lie unevenly, or that a tilted gantry shifts against each other, are images of their own plane
only: a cut across them would be distorted, so `Stack.flaw` says not to make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import Header
from gmai_xtuner.core.imaging.volumes import AXES, Axis

MIXED = "series of differing sizes or directions"
TWICE = "series with two slices at one place"
NO_SPACING = "series without a pixel spacing"

UNEVEN = 0.1
"""How far a slice may lie from where even spacing puts it, as a share of the spacing."""
JITTER = 1e-3
"""How far direction cosines, and spacings in millimetres, of one stack may differ."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Stack:
    """The place of slices in the body.

    Args:
        order: indices of the headers along their normal.
        planes: the headers in that order.
        affine: from (slice, row, column) to LPS millimetres; the slices' shift in their plane is not in it.
        flaw: why nothing can be cut across the slices; empty if it can.
    """

    order: tuple[int, ...]
    planes: tuple[Header, ...]
    affine: np.ndarray
    flaw: str

    @property
    def axis(self) -> Axis:
        """The body's axis along which the slices lie one behind the other."""
        return AXES[int(np.abs(self.affine[:3, 0]).argmax())]

    @property
    def heights(self) -> np.ndarray:
        """Millimetres of each slice along the normal."""
        return np.array([plane.position for plane in self.planes]) @ _normal(self.planes[0])

    def indices(self, points: np.ndarray) -> np.ndarray:
        """Return (slice, row, column) of LPS points ``[N, 3]``, fractional, each in its nearest plane."""
        heights, first = self.heights, self.planes[0]
        axes = np.array(first.orientation, dtype=float)
        steps = np.diff(heights) if len(heights) > 1 else np.ones(1)
        # one more slice at either end, so that what lies outside has an index too
        known = np.r_[heights[0] - steps[0], heights, heights[-1] + steps[-1]]
        height = points @ _normal(first)
        slices = np.interp(height, known, np.arange(-1, len(heights) + 1))
        slices[height < known[0]], slices[height > known[-1]] = -1, len(heights)
        nearest = np.clip(np.rint(slices).astype(int), 0, len(heights) - 1)
        offset = points - np.array([plane.position for plane in self.planes])[nearest]
        spacing = first.spacing or (1.0, 1.0)
        return np.c_[slices, offset @ axes[3:] / spacing[0], offset @ axes[:3] / spacing[1]]


def _normal(header: Header) -> np.ndarray:
    axes = np.array(header.orientation, dtype=float)
    return np.cross(axes[:3], axes[3:])


def is_stack(headers: Sequence[Header]) -> bool:
    """Return True if files of a series are slices: single frames with a place each, at two places or more."""
    return (
        len(headers) > 1
        and all(header.frames == 1 and header.orientation and header.position for header in headers)
        and len({header.position for header in headers}) > 1
    )


def alike(one: Header, other: Header) -> bool:
    """Return True if two images have the same size, and the same direction and spacing but for jitter."""
    if (one.rows, one.columns) != (other.rows, other.columns):
        return False
    return _close(one.orientation, other.orientation) and _close(one.spacing, other.spacing)


def _close(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(abs(a - b) <= JITTER for a, b in zip(one, other, strict=True))


def stack_of(headers: Sequence[Header]) -> Stack:
    """Return the place of slices, which are one or for which `is_stack` is true.

    Raises:
        Unusable: they differ in size, spacing or direction, two lie at one place, or a spacing is missing.
    """
    first, count = headers[0], f"{len(headers)} images"
    if any(header.spacing is None for header in headers):
        raise Unusable(NO_SPACING, count)
    assert first.spacing is not None
    if not all(alike(first, header) for header in headers):
        raise Unusable(MIXED, count)
    axes = np.array(first.orientation, dtype=float)
    lengths = np.linalg.norm(axes.reshape(2, 3), axis=1)
    if not np.allclose(lengths, 1, atol=0.01) or abs(axes[:3] @ axes[3:]) > 0.01:
        raise Unusable(MIXED, "direction cosines that are no right angle")
    normal = _normal(first)
    places = np.array([header.position for header in headers], dtype=float)
    heights = places @ normal
    order = sorted(
        range(len(headers)), key=lambda at: (heights[at], headers[at].number, headers[at].path)
    )
    distances = np.diff(heights[order])
    spacing = float(np.median(distances)) if len(headers) > 1 else 1.0
    if spacing <= 0 or (len(headers) > 1 and distances.min() < 1e-3 * spacing):
        raise Unusable(TWICE, f"{count}; name one echo or time point per series")
    shift = places - places[order[0]]
    shift -= np.outer(shift @ normal, normal)
    flaw = ""
    if len(headers) > 1 and np.abs(distances - spacing).max() > UNEVEN * spacing:
        flaw = "uneven distances"
    elif np.linalg.norm(shift, axis=1).max() > max(
        0.5 * min(first.spacing), 0.01 * np.ptp(heights)
    ):
        flaw = "shifted against each other, as by a tilted gantry"
    affine = np.eye(4)
    affine[:3, 0] = normal * (np.ptp(heights) / (len(headers) - 1) if len(headers) > 1 else 1.0)
    affine[:3, 1] = axes[3:] * first.spacing[0]
    affine[:3, 2] = axes[:3] * first.spacing[1]
    affine[:3, 3] = places[order[0]]
    return Stack(tuple(order), tuple(headers[at] for at in order), affine, flaw)
