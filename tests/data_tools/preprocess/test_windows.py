"""Grey levels by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.readers.volume_samples import LevelAndWidth, Range, scale_for
from gmai_xtuner.core.imaging.windows import linear

VALUES = np.array([[-1000, -160, -159, 40, 240, 3000]], dtype=np.int16)


def levels(window, modality="CT", values=VALUES):
    return scale_for(window, values, modality=modality).apply(values).tolist()


def test_a_line_is_rounded_half_up_and_clipped():
    assert linear(np.array([[-1, 0, 1, 2, 3]]), 0, 2).tolist() == [[0, 0, 128, 255, 255]]
    assert linear(np.array([[5, 5]]), 5, 5).tolist() == [[0, 0]]


def test_soft_tissue_by_name_level_and_ends():
    # (x + 160) / 400 * 255: -159 -> 0.6375, 40 -> 127.5
    expected = [[0, 0, 1, 128, 255, 255]]
    assert levels("soft tissue") == expected
    assert levels(LevelAndWidth(level=40, width=400)) == expected
    assert levels(Range(low=-160, high=240)) == expected


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


def test_slice_and_volume_differ():
    volume = np.array([[[0, 10], [20, 100]]])
    plane = volume[:, 0]
    assert scale_for("slice", volume, modality=None).apply(plane).tolist() == [[0, 255]]
    assert scale_for("volume", volume, modality=None).apply(plane).tolist() == [[0, 26]]


def test_windows_that_make_no_sense():
    with pytest.raises(ValueError, match="greater than 0"):
        LevelAndWidth(level=0, width=0)
    with pytest.raises(ValueError, match=r"low|high"):
        Range(low=2, high=1)
