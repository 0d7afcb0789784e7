# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.measure import label as skimage_label
from skimage.measure import regionprops

from data_tools.preprocess import PRESETS, Rules
from data_tools.preprocess.clean import clean_annotations, components
from data_tools.records import Annotation, Drops, Label

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
    found = []
    for part in parts:
        y1, x1, y2, x2 = part.bbox
        found.append(((x1, y1, x2, y2), int(part.area)))
    return sorted(found)


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.sampled_from([4, 8]))
def test_components_are_those_of_skimage(mask, connectivity):
    assert sorted(components(mask, connectivity=connectivity)) == of_skimage(mask, connectivity)


def test_components_of_thin_pictures():
    """One row or column is where a library that looks at 2 x 2 pixels at once goes wrong."""
    row = np.array([[1, 0, 0, 1, 1, 0, 1]], dtype=bool)
    assert components(row) == [((0, 0, 1, 1), 1), ((3, 0, 5, 1), 2), ((6, 0, 7, 1), 1)]
    assert components(row.T) == [((0, 0, 1, 1), 1), ((0, 3, 1, 5), 2), ((0, 6, 1, 7), 1)]


def test_diagonal_neighbours_are_one_component_under_8_and_two_under_4():
    mask = np.zeros((5, 6), dtype=bool)
    mask[1, 2] = mask[2, 3] = True
    assert components(mask, connectivity=8) == [((2, 1, 4, 3), 2)]
    assert components(mask, connectivity=4) == [((2, 1, 3, 2), 1), ((3, 2, 4, 3), 1)]


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
    assert [(region.box, region.area) for region in kept] == [
        ((0, 1, 40, 30), None),
        ((2, 2, 4, 4), None),
    ]
    assert drops == []


def test_boxes_are_cut_only_if_the_rules_say_so_and_are_counted():
    rules = Rules(clip_boxes=True)
    annotations = [Annotation("a", (-5, 10, 20, 50)), Annotation("b", (41, 0, 50, 9))]
    kept, drops, _ = regions(annotations, size=(40, 30), rules=rules)
    assert [region.box for region in kept] == [(0, 10, 20, 30)]
    assert [reason for reason, _ in drops] == [
        "box cut at the image's edge",
        "box outside the image",
    ]


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


def test_a_mask_that_is_not_split_is_one_region():
    mask = np.zeros((10, 30), dtype=bool)
    mask[1:3, 1:3] = mask[5:9, 20:24] = True
    kept, _, _ = regions([Annotation("a", mask=mask)], size=(30, 10), rules=Rules(split=False))
    assert [(region.box, region.area) for region in kept] == [((1, 1, 24, 9), 20)]


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
