# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
from pydantic import ValidationError

from data_tools.preprocess import PRESETS, Rules
from data_tools.readers import image_folder


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


def test_none_removes_nothing():
    rules = PRESETS["none"].model_dump()
    removing = ["min_area_share", "min_area_pixels", "min_voxels", "min_volume_mm3", "min_side_mm"]
    assert [rules[name] for name in [*removing, "min_edge_ratio"]] == [0] * 6
    assert (rules["keep_largest"], rules["max_background"]) == (None, 1)


def test_a_preset_can_be_changed_in_places():
    rules = Rules.model_validate({"preset": "sa-med2d", "min_area_pixels": 20, "min_edge_ratio": 0})
    assert (rules.min_area_share, rules.min_area_pixels, rules.min_edge_ratio) == (
        100 / 65536,
        20,
        0,
    )


@pytest.mark.parametrize("clean", ["sa-med", {"preset": "sa-med"}, {"min_area": 3}])
def test_a_source_names_its_rules(clean, tmp_path):
    keys = {"name": "a", "licence": "x", "reader": "image_folder", "root": tmp_path}
    assert image_folder.Options(**keys).clean == PRESETS["sa-med2d"]
    with pytest.raises(
        ValidationError, match=r"is no preset; there are none, sa-med2d|Extra inputs"
    ):
        image_folder.Options(**keys, clean=clean)
