# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from skimage.measure import label as skimage_label
from skimage.measure import regionprops

from data_tools.preprocess import PRESETS, Rules
from data_tools.preprocess.clean import clean_annotations, clean_volume, components
from data_tools.preprocess.volumes import Slicing, Structure, Volume, slices
from data_tools.readers import image_folder
from data_tools.records import Annotation, Drops, Label
from gmai_xtuner.core.imaging.windows import IntensityWindow


def test_the_presets_numbers():
    """As published; see the sources named in the module."""
    assert PRESETS["sa-med2d"].min_area_share == pytest.approx(0.00152587890625)
    assert PRESETS["sa-med2d"].min_edge_ratio == 0.5
    assert PRESETS["sa-med2d"].connectivity == 8
    assert (PRESETS["medsam"].min_voxels, PRESETS["medsam"].min_area_pixels) == (1000, 100)
    model = PRESETS["sam-med3d"]
    assert (model.min_volume_mm3, model.min_side_mm, model.max_background) == (1000, 15, 0.99)
    assert (model.keep_largest, model.split_left_right) == (5, True)
    assert {name: rules.preset for name, rules in PRESETS.items()} == {
        name: name for name in PRESETS
    }


def test_a_preset_can_be_changed_in_places():
    rules = Rules.model_validate({"preset": "sa-med2d", "min_area_pixels": 20, "min_edge_ratio": 0})
    found = (rules.min_area_share, rules.min_area_pixels, rules.min_edge_ratio)
    assert found == (100 / 65536, 20, 0)


@pytest.mark.parametrize("clean", ["sa-med", {"preset": "sa-med"}, {"min_area": 3}])
def test_a_source_names_its_rules(clean, tmp_path):
    keys = {"name": "a", "licence": "x", "reader": "image_folder", "root": tmp_path}
    assert image_folder.Options(**keys).clean == PRESETS["sa-med2d"]
    message = r"is no preset; there are none, sa-med2d|Extra inputs"
    with pytest.raises(ValidationError, match=message):
        image_folder.Options(**keys, clean=clean)


# --- Three-dimensional rules on small volumes whose components can be counted by hand ---


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


@pytest.mark.parametrize(
    ("spacing", "rules", "kept"),
    [
        ((1, 1, 1), {"min_voxels": 8}, 72),
        ((1, 1, 1), {"min_voxels": 9}, 64),
        ((1, 1, 1), {"min_voxels": 65}, 0),
        ((1, 1, 2), {"min_volume_mm3": 16}, 72),
        ((1, 1, 2), {"min_volume_mm3": 16.1}, 64),
        ((1, 1, 2), {"min_side_mm": 2}, 72),
        ((1, 1, 2), {"min_side_mm": 2.1}, 64),
        ((0.5, 1, 1), {"min_side_mm": 2.1}, 0),
        ((1, 1, 1), {"keep_largest": 1}, 64),
        ((1, 1, 1), {"keep_largest": 2}, 72),
    ],
)
def test_what_is_too_small_goes_and_its_label_is_lost(spacing, rules, kept):
    found, reasons, lost = cleaned(volume(spacing), Rules(**rules))
    assert np.count_nonzero(found.layers[0]) == kept
    assert (len(reasons), lost) == {72: (0, set()), 64: (1, {"kidney"}), 0: (2, {"kidney"})}[kept]


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
    for connectivity, kept in ((26, 2), (6, 0)):
        assert left(of, min_voxels=2, connectivity_3d=connectivity)[0] == kept


NONE = PRESETS["none"]


def regions(
    annotations: list[Annotation], *, size: tuple[int, int], rules: Rules
) -> tuple[list[Label], list[tuple[str, str]], set[str]]:
    """What is kept, reason and detail of what is dropped, and the labels that are lost."""
    drops = Drops()
    kept = clean_annotations(annotations, size=size, rules=rules, drops=drops, where="")
    return kept, [(drop.reason, drop.detail) for drop in drops.found], drops.incomplete


def of_skimage(mask: np.ndarray, connectivity: int) -> list[tuple[tuple[int, ...], int]]:
    """Half-open boxes and areas as skimage gives them, x before y."""
    parts = regionprops(skimage_label(mask, connectivity=2 if connectivity == 8 else 1))
    found = ((*part.bbox, int(part.area)) for part in parts)
    return sorted(((x1, y1, x2, y2), area) for y1, x1, y2, x2, area in found)


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.sampled_from([4, 8]))
def test_components_are_those_of_skimage(mask, connectivity):
    assert sorted(components(mask, connectivity=connectivity)) == of_skimage(mask, connectivity)


def test_components_of_thin_pictures():
    """One row or column is where a library that looks at 2 x 2 pixels at once goes wrong."""
    row = np.array([[1, 0, 0, 1, 1, 0, 1]], dtype=bool)
    assert components(row) == [((0, 0, 1, 1), 1), ((3, 0, 5, 1), 2), ((6, 0, 7, 1), 1)]
    assert components(row.T) == [((0, 0, 1, 1), 1), ((0, 3, 1, 5), 2), ((0, 6, 1, 7), 1)]


@pytest.mark.parametrize(("side", "kept"), [(10, 1), (9, 0)])
def test_sa_med2d_keeps_what_has_100_of_65536_pixels(side, kept):
    mask = np.zeros((256, 256), dtype=bool)
    mask[3 : 3 + side, 5 : 5 + 10] = True
    found, drops, _ = regions(
        [Annotation("a", mask=mask)], size=(256, 256), rules=PRESETS["sa-med2d"]
    )
    assert len(found) == kept
    assert [drop for drop, _ in drops] == ["mask smaller than 0.153 % of the image"] * (1 - kept)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((5, 5, 5, 9), "box of no size"),
        ((5.2, 5, 5.3, 9), "box of no size"),
        ((0.1, 0.2, 0.6, 0.9), "box inside of one pixel, as fractions of an image's size are"),
        ((9, 5, 5, 9), "box with swapped corners"),
        ((5, 9, 9, 5), "box with swapped corners"),
        ((-2, 0, 5, 5), "box outside the image"),
        ((0, 0, 41, 5), "box outside the image"),
        ((0, 0, 5, 31), "box outside the image"),
        ((50, 5, 60, 9), "box outside the image"),
        ((0, 0, float("nan"), 5), "box with a coordinate that is no number"),
        ((0, 0, float("inf"), 5), "box with a coordinate that is no number"),
    ],
)
def test_a_box_that_is_none_is_dropped_with_its_reason(box, reason):
    kept, drops, _ = regions([Annotation("a", box)], size=(40, 30), rules=NONE)
    assert kept == []
    assert [drop for drop, _ in drops] == [reason]
    assert "40 x 30" in drops[0][1]


def test_boxes_are_rounded_to_whole_pixels_and_may_touch_the_edge():
    annotations = [Annotation("a", (-0.4, 0.5, 40.3, 30.0)), Annotation("b", (1.6, 2.4, 3.5, 4.4))]
    kept, drops, _ = regions(annotations, size=(40, 30), rules=NONE)
    assert [region.box for region in kept] == [(0, 1, 40, 30), (2, 2, 4, 4)]
    assert drops == []


def test_boxes_are_cut_only_if_the_rules_say_so_and_are_counted():
    rules = Rules(clip_boxes=True)
    annotations = [Annotation("a", (-5, 10, 20, 50)), Annotation("b", (41, 0, 50, 9))]
    kept, drops, _ = regions(annotations, size=(40, 30), rules=rules)
    assert [region.box for region in kept] == [(0, 10, 20, 30)]
    cut, outside = (reason for reason, _ in drops)
    assert (cut, outside) == ("box cut at the image's edge", "box outside the image")


def test_the_largest_components_stay_in_their_place():
    mask = np.zeros((10, 30), dtype=bool)
    mask[1:3, 1:3], mask[1:6, 6:11], mask[1:5, 20:24], mask[8, 0] = True, True, True, True
    kept, drops, _ = regions(
        [Annotation("a", mask=mask)], size=(30, 10), rules=Rules(keep_largest=2)
    )
    assert [(region.box, region.area) for region in kept] == [
        ((6, 1, 11, 6), 25),
        ((20, 1, 24, 5), 16),
    ]
    assert [reason for reason, _ in drops] == ["component beyond the largest that are kept"] * 2
    kept, _, _ = regions([Annotation("a", mask=mask)], size=(30, 10), rules=Rules(split=False))
    assert [(region.box, region.area) for region in kept] == [((0, 1, 24, 9), 46)]


def test_empty_masks_and_masks_of_another_size_are_counted():
    annotations = [
        Annotation("a", mask=np.zeros((30, 40), dtype=bool)),
        Annotation("b", mask=np.ones((40, 30), dtype=bool)),
        Annotation("c"),
    ]
    kept, drops, _ = regions(annotations, size=(40, 30), rules=NONE)
    assert [(region.name, region.box) for region in kept] == [("c", None)]
    assert [reason for reason, _ in drops] == ["empty mask", "mask of another size than its image"]


def test_labels_of_what_is_dropped_are_named():
    """A speck under the cut is in the picture: nobody may count its label, or say that it is absent."""
    speck, large = np.zeros((256, 256), bool), np.zeros((256, 256), bool)
    speck[0, 0] = True
    large[10:90, 10:90] = True
    annotations = [
        Annotation("speck", mask=speck), Annotation("large", mask=large), Annotation("whole"),
        Annotation("outside", (900, 0, 950, 9)), Annotation("empty", mask=np.zeros((256, 256), bool)),
    ]  # fmt: skip
    kept, _, incomplete = regions(annotations, size=(256, 256), rules=PRESETS["sa-med2d"])
    assert [region.name for region in kept] == ["large", "whole"]
    assert incomplete == {"speck", "outside", "empty"}
    clipped = [Annotation("cut", (250, 0, 260, 9))]
    kept, drops, incomplete = regions(clipped, size=(256, 256), rules=Rules(clip_boxes=True))
    assert (len(kept), len(drops), incomplete) == (1, 1, set())


# --- Which slices are taken, and how they are turned ---


WINDOW = IntensityWindow(lambda values: values.astype(np.uint8), "as it is")


def grid(shape=(3, 4, 5), spacing=(1, 1, 1)) -> Volume:
    layer = np.zeros(shape, dtype=np.uint8)
    layer[1, 2, 1:5] = 1
    layer[0, 0, 3] = 2
    voxels = np.arange(np.prod(shape)).reshape(shape)
    structures = (Structure("long", 0, 1), Structure("short", 0, 2))
    return Volume(voxels, np.diag([*spacing, 1.0]), (layer,), structures)


def taken(of: Volume, **keys) -> list[tuple[str, int]]:
    return [(item.axis, item.index) for item in slices(of, WINDOW, Slicing(**keys))]


@pytest.mark.parametrize(
    ("keys", "indices"),
    [
        ({}, [1, 2, 3, 4]),
        ({"keep": "all"}, [0, 1, 2, 3, 4]),
        ({"every": 2}, [2, 4]),  # counts from the low end
        # one of the long structure, the middle of 1, 2, 3, 4 rounded up, and the only one of the short
        ({"at_most_a_label": 1}, [3]),
        ({"at_most_a_label": 2}, [2, 3, 4]),
        ({"at_most_a_volume": 2}, [2, 4]),
    ],
)
def test_only_slices_that_hold_something_are_taken(keys, indices):
    assert taken(grid(), axes=["z"], **keys) == [("z", index) for index in indices]
    assert taken(grid(), axes=["x", "y"]) == [("x", 0), ("x", 1), ("y", 0), ("y", 2)]


def test_a_volume_without_a_label_map_gives_all():
    bare = Volume(np.zeros((2, 2, 3)), np.eye(4))
    assert taken(bare, axes=["z"]) == [("z", 0), ("z", 1), ("z", 2)]


def test_masks_are_turned_like_the_picture():
    of = grid()
    for item in slices(of, WINDOW, Slicing()):
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
        for item in slices(Volume(voxels, np.eye(4)), WINDOW, Slicing())
        if item.index == {"x": 0, "y": 1, "z": 1}[item.axis]
    }
    assert planes == {
        "z": [[0, 7], [0, 0]],  # front on top, the patient's left on the right
        "y": [[0, 7], [0, 0]],  # head on top, the patient's left on the right
        "x": [[7, 0], [0, 0]],  # head on top, front on the left
    }


def test_square_pixels():
    of = grid((3, 4, 5), spacing=(1, 2, 1))
    (item, *_) = slices(of, WINDOW, Slicing(axes=["z"], square_pixels=True))
    assert item.image.shape == (8, 3)
    assert item.annotations[0].mask.shape == (8, 3)
    assert item.stretched == 1
