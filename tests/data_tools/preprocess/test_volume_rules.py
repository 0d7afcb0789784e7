# SPDX-License-Identifier: Apache-2.0

"""Three-dimensional rules on small volumes whose components can be counted by hand."""

from __future__ import annotations

import numpy as np

from data_tools.preprocess import PRESETS, Rules
from data_tools.preprocess.clean import clean_volume
from data_tools.preprocess.volumes import Structure, Volume
from data_tools.records import Drops


def volume(spacing=(1.0, 1.0, 1.0)) -> Volume:
    """A block of 4 x 4 x 4 = 64 voxels, one of 2 x 2 x 2 = 8 on the other side, both of value 1."""
    layer = np.zeros((20, 8, 8), dtype=np.uint8)
    layer[1:5, 1:5, 1:5] = 1
    layer[15:17, 1:3, 1:3] = 1
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = -9.5 * spacing[0]
    return Volume(np.zeros(layer.shape), affine, (layer,), (Structure("kidney", 0, 1),))


def cleaned(of: Volume, rules: Rules) -> tuple[Volume | None, list[str], set[str]]:
    """The volume or None, the reasons for what was dropped, and the labels that are lost."""
    drops = Drops()
    found = None
    with drops.image("v"):
        found = clean_volume(of, rules, drops=drops, where="v")
        lost = drops.incomplete
    return found, [drop.reason for drop in drops.found], lost if found else set()


def left(of: Volume, **rules) -> tuple[int, list[str]]:
    found, reasons, _ = cleaned(of, Rules(**rules))
    return (0 if found is None else int(np.count_nonzero(found.layers[0]))), reasons


def test_no_rule_changes_nothing():
    of = volume()
    assert cleaned(of, PRESETS["none"]) == (of, [], set())


def test_few_voxels():
    assert left(volume(), min_voxels=8) == (72, [])
    count, reasons = left(volume(), min_voxels=9)
    assert (count, len(reasons)) == (64, 1)
    assert left(volume(), min_voxels=65)[0] == 0


def test_volume_and_side_in_millimetres():
    assert left(volume((1, 1, 2)), min_volume_mm3=16)[0] == 72
    assert left(volume((1, 1, 2)), min_volume_mm3=16.1)[0] == 64
    assert left(volume((1, 1, 2)), min_side_mm=2)[0] == 72
    assert left(volume((1, 1, 2)), min_side_mm=2.1)[0] == 64
    assert left(volume((0.5, 1, 1)), min_side_mm=2.1)[0] == 0


def test_the_largest_stay():
    assert left(volume(), keep_largest=1)[0] == 64
    assert cleaned(volume(), Rules(keep_largest=1))[2] == {"kidney"}
    assert cleaned(volume(), Rules(keep_largest=2))[2] == set()


def test_mostly_background():
    share = 1 - 72 / 1280
    assert left(volume(), max_background=share + 1e-9)[0] == 72
    count, reasons = left(volume(), max_background=share - 1e-3)
    assert count == 0
    assert reasons == [f"volume of more than {100 * (share - 1e-3):g} % background"]


def test_sides_are_told_apart():
    found, _, _ = cleaned(volume(), Rules(split_left_right=True))
    sides = {
        item.attributes["side"]: int(np.count_nonzero(found.layers[item.layer] == item.value))
        for item in found.structures
    }
    # RAS+ grows to the right: the large block at low x lies on the left.
    assert sides == {"left": 64, "right": 8}


def test_components_touch_by_their_corners():
    layer = np.zeros((4, 4, 4), dtype=np.uint8)
    layer[0, 0, 0] = layer[1, 1, 1] = 1
    of = Volume(np.zeros(layer.shape), np.eye(4), (layer,), (Structure("a", 0, 1),))
    assert left(of, min_voxels=2)[0] == 2
    assert left(of, min_voxels=2, connectivity_3d=6)[0] == 0
