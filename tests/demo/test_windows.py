"""Windows: by hand, and as highdicom applies them."""

from __future__ import annotations

import numpy as np
import pytest
from highdicom.pixels import apply_voi_window

from gmai_xtuner.core.imaging.windows import PRESETS, WINDOWS, Window, foreground_window, scale_for


def test_a_window_by_hand():
    values = np.array([-200, -160, 40, 140, 240, 500])
    # 40/400 shows -160 to 240; 140 is three quarters: 191.25
    assert Window(40, 400).apply(values).tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(40, 400), (-600.5, 1500), (3, 2), (0, 1)])
def test_the_functions_of_the_standard_are_highdicoms(function, center, width):
    values = np.arange(-2000, 2000, dtype=np.int16)
    theirs = apply_voi_window(
        values.astype(np.float64), center, width, function, output_range=(0.0, 255.0)
    )
    ours = Window(center, width, function).apply(values)
    difference = np.abs(ours - np.floor(theirs + 0.5))
    # halves are rounded by the last bit of differently ordered sums
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("name", ["soft_tissue", "lung", "brain", "bone"])
def test_presets_are_those_of_the_corpus_builder(name):
    values = np.arange(-2000, 2000, dtype=np.int16)
    low, high = WINDOWS[name.replace("_", " ")]
    window = PRESETS[name]
    assert (window.center - window.width / 2, window.center + window.width / 2) == (low, high)
    scale = scale_for(name.replace("_", " "), values, modality="CT")
    assert np.array_equal(window.apply(values), scale.apply(values))


def test_the_default_is_that_of_the_corpus_builder():
    values = np.random.default_rng(0).gamma(2, 100, (20, 30, 5)).astype(np.float32)
    values[:4] = 0
    scale = scale_for("percentile", values, modality="MR")
    window = foreground_window(values)
    # centre and width hold the two ends but for the rounding of the last bit
    difference = window.apply(values).astype(int) - scale.apply(values)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3


def test_a_mask_is_black_and_white():
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[1, 1] = 1
    assert np.unique(foreground_window(mask).apply(mask)).tolist() == [0, 255]
    flat = np.full((4, 4), 7.0)
    assert foreground_window(flat).apply(flat).shape == (4, 4)


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [(0, 0, "LINEAR_EXACT"), (0, 0.5, "LINEAR"), (float("nan"), 5, "LINEAR"), (0, -1, "SIGMOID")],
)
def test_impossible_windows_are_refused(center, width, function):
    with pytest.raises(ValueError, match="a window needs"):
        Window(center, width, function)
