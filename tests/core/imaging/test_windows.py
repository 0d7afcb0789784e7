# SPDX-License-Identifier: Apache-2.0

"""Grey levels by hand, and windows as highdicom applies them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from highdicom.pixels import apply_voi_window

from gmai_xtuner.core.imaging.windows import PRESETS, Window, foreground_window, linear, scale_for

VALUES = np.array([[-1000, -160, -159, 40, 240, 3000]], dtype=np.int16)


def levels(window, modality="CT", values=VALUES):
    return scale_for(window, values, modality=modality).apply(values).tolist()


def test_a_line_is_rounded_half_up_and_clipped():
    assert linear(np.array([[-1, 0, 1, 2, 3]]), 0, 2).tolist() == [[0, 0, 128, 255, 255]]
    assert linear(np.array([[5, 5]]), 5, 5).tolist() == [[0, 0]]


def test_soft_tissue_by_name_level_and_ends():
    # (x + 160) / 400 * 255: -159 -> 0.6375, 40 -> 127.5
    expected = [[0, 0, 1, 128, 255, 255]]
    for window in ("soft tissue", Window(40, 400), (-160, 240)):
        assert levels(window) == expected
    assert PRESETS["soft_tissue"].apply(VALUES).tolist() == expected
    assert scale_for(Window(40, 400), VALUES, modality=None).text == "window W 400 L 40"


def test_auto_is_soft_tissue_for_ct_alone():
    assert levels("auto", "CT") == levels("soft tissue")
    assert levels("auto", "computed tomography") == levels("soft tissue")
    assert levels("auto", "MR") == levels("percentile", "MR")


def test_percentiles_look_at_the_foreground():
    values = np.concatenate([np.zeros(5000), np.arange(1, 1001)]).reshape(100, 60)
    scale = scale_for("percentile", values, modality="MR")
    # the 0.5th and 99.5th of 1..1000, linear between ranks
    assert "5.995 to 995.005" in scale.text
    assert scale.apply(np.array([[0, 5.995, 995.005, 1000]])).tolist() == [[0, 0, 255, 255]]
    window = foreground_window(values)
    assert (window.center, window.width) == pytest.approx((500.5, 989.01))


def test_slice_and_volume_differ():
    volume = np.array([[[0, 10], [20, 100]]])
    plane = volume[:, 0]
    assert scale_for("slice", volume, modality=None).apply(plane).tolist() == [[0, 255]]
    assert scale_for("volume", volume, modality=None).apply(plane).tolist() == [[0, 26]]


def test_a_mask_is_black_and_white():
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[1, 1] = 1
    assert np.unique(foreground_window(mask).apply(mask)).tolist() == [0, 255]
    flat = np.full((4, 4), 7.0)
    assert foreground_window(flat).apply(flat).shape == (4, 4)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(40, 400), (-600.5, 1500), (3, 2)])
def test_the_functions_of_the_standard_are_highdicoms(function, center, width):
    values = np.arange(-2000, 2000, dtype=np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        theirs = apply_voi_window(
            values.astype(np.float64), center, width, function, output_range=(0.0, 255.0)
        )
    ours = Window(center, width, function).apply(values)
    difference = np.abs(ours - np.floor(theirs + 0.5))
    # halves are rounded by the last bit of differently ordered sums
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_width_of_one_is_a_threshold():
    """Where highdicom divides by 0; PS3.3 C.11.2.1.2.1: above the centre less one half is white."""
    assert Window(3, 1, "LINEAR").apply(np.array([2, 2.5, 2.6, 3])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [
        (0, 0, "LINEAR_EXACT"),
        (0, 0.5, "LINEAR"),
        (float("nan"), 5, "LINEAR"),
        (0, -1, "SIGMOID"),
        (0, 5, "CUBIC"),
    ],
)
def test_impossible_windows_are_refused(center, width, function):
    with pytest.raises(ValueError, match=r"a window needs|unknown"):
        Window(center, width, function)
