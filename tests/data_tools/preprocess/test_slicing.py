# SPDX-License-Identifier: Apache-2.0

"""Which slices are taken, and how they are turned."""

import numpy as np

from data_tools.preprocess.volumes import Slicing, Structure, Volume, slices
from gmai_xtuner.core.imaging.windows import Scale

SCALE = Scale(lambda values: values.astype(np.uint8), "as it is")


def volume(shape=(3, 4, 5), spacing=(1, 1, 1)) -> Volume:
    layer = np.zeros(shape, dtype=np.uint8)
    layer[1, 2, 1:5] = 1
    layer[0, 0, 3] = 2
    voxels = np.arange(np.prod(shape)).reshape(shape)
    structures = (Structure("long", 0, 1), Structure("short", 0, 2))
    return Volume(voxels, np.diag([*spacing, 1.0]), (layer,), structures)


def taken(of: Volume, **keys) -> list[tuple[str, int]]:
    return [(item.axis, item.index) for item in slices(of, SCALE, Slicing(**keys))]


def test_only_slices_that_hold_something():
    assert taken(volume(), axes=["z"]) == [("z", 1), ("z", 2), ("z", 3), ("z", 4)]
    assert taken(volume(), axes=["x", "y"]) == [("x", 0), ("x", 1), ("y", 0), ("y", 2)]
    assert taken(volume(), axes=["z"], keep="all") == [("z", index) for index in range(5)]


def test_every_nth_counts_from_the_low_end():
    assert taken(volume(), axes=["z"], every=2) == [("z", 2), ("z", 4)]


def test_a_rare_structure_keeps_its_slice():
    # one of the long structure, the middle of 1, 2, 3, 4 rounded up, and the only one of the short
    assert taken(volume(), axes=["z"], at_most_a_label=1) == [("z", 3)]
    assert taken(volume(), axes=["z"], at_most_a_label=2) == [("z", 2), ("z", 3), ("z", 4)]
    assert taken(volume(), axes=["z"], at_most_a_volume=2) == [("z", 2), ("z", 4)]


def test_a_volume_without_a_label_map_gives_all():
    bare = Volume(np.zeros((2, 2, 3)), np.eye(4))
    assert taken(bare, axes=["z"]) == [("z", 0), ("z", 1), ("z", 2)]


def test_masks_are_turned_like_the_picture():
    of = volume()
    for item in slices(of, SCALE, Slicing()):
        for annotation in item.annotations:
            value = {"long": 1, "short": 2}[annotation.label]
            held = of.voxels[of.layers[0] == value]
            assert set(item.image[annotation.mask]) <= set(held.tolist())
            assert annotation.mask.any()


def test_corners_lie_where_radiologists_look_for_them():
    voxels = np.zeros((2, 2, 2), dtype=np.uint8)
    voxels[0, 1, 1] = 7  # the patient's left (RAS+ grows to the right), front, top
    planes = {
        item.axis: item.image.tolist()
        for item in slices(Volume(voxels, np.eye(4)), SCALE, Slicing())
        if item.index == {"x": 0, "y": 1, "z": 1}[item.axis]
    }
    assert planes == {
        "z": [[0, 7], [0, 0]],  # front on top, the patient's left on the right
        "y": [[0, 7], [0, 0]],  # head on top, the patient's left on the right
        "x": [[7, 0], [0, 0]],  # head on top, front on the left
    }


def test_square_pixels():
    of = volume((3, 4, 5), spacing=(1, 2, 1))
    (item, *_) = slices(of, SCALE, Slicing(axes=["z"], square_pixels=True))
    assert item.image.shape == (8, 3)
    assert item.annotations[0].mask.shape == (8, 3)
    assert item.stretched == 1
