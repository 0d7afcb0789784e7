# SPDX-License-Identifier: Apache-2.0

"""Boxes of answers: what is read, in which unit, what is drawn and what is said of the rest."""

import numpy as np
import pytest
from PIL import Image

from data_tools.forms.coordinates import write_box
from gmai_xtuner.demo.boxes import MAX_BOXES, Box, draw_boxes, read_boxes
from tests.tables import tables

TABLES = tables(__file__)


def corners(text, width=200, height=100, unit=None):
    return [box.corners for box in read_boxes(text, width=width, height=height, unit=unit).drawn]


@pytest.mark.parametrize("text", TABLES["forms_of_one_box"])
def test_forms_of_one_box(text):
    found = read_boxes(text, width=200, height=100)
    assert [box.corners for box in found.drawn] == [(20, 20, 100, 100)]
    assert found.unit == "thousandths"
    assert found.drawn[0].text in text


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("[0.1, 0.2, 0.5, 1.0]", "fractions", (20, 20, 100, 100)),
        ("[0, 0, 1, 1]", "fractions", (0, 0, 200, 100)),
        ("[0, 0, 1000, 1000]", "thousandths", (0, 0, 200, 100)),
        ("[20.5, 20, 100, 99]", "pixels", (20.5, 20, 100, 99)),
    ],
)
def test_units_are_found_out(text, unit, expected):
    found = read_boxes(text, width=200, height=100)
    assert found.unit == unit
    assert found.drawn[0].corners == pytest.approx(expected)


def test_all_boxes_of_an_answer_have_one_unit():
    found = read_boxes("[10, 10, 50, 50] and [1200, 10, 1900, 500]", width=2000, height=1000)
    assert found.unit == "pixels"
    assert [box.corners for box in found.drawn] == [(10, 10, 50, 50), (1200, 10, 1900, 500)]


def test_numbers_beyond_the_image_are_no_pixels():
    found = read_boxes("[900, 500, 1200, 700]", width=200, height=100)
    assert found.unit == "thousandths"
    assert found.drawn == (Box((180, 50, 200, 70), "[900, 500, 1200, 700]", True),)


def test_the_unit_can_be_chosen():
    assert corners("[10, 10, 50, 50]", unit="pixels") == [(10, 10, 50, 50)]
    assert corners("[10, 10, 50, 50]") == [(2, 1, 10, 5)]


def test_boxes_of_the_corpus_come_back():
    draw = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(value) for value in draw.integers(20, 3000, 2))
        x1, x2 = sorted(int(v) for v in draw.choice(width + 1, 2, replace=False))
        y1, y2 = sorted(int(v) for v in draw.choice(height + 1, 2, replace=False))
        text = write_box((x1, y1, x2, y2), width=width, height=height)
        found = read_boxes(
            f"The lesion lies at {text}.", width=width, height=height, unit="thousandths"
        )
        back = found.drawn[0].corners
        # rounded outwards to a thousandth of the side
        assert back[0] <= x1 <= back[0] + width / 1000
        assert back[1] <= y1 <= back[1] + height / 1000
        assert x2 - 1e-9 <= back[2] <= x2 + width / 1000
        assert y2 - 1e-9 <= back[3] <= y2 + height / 1000


def test_impossible_boxes_are_named_and_not_drawn():
    found = read_boxes(
        "[500, 100, 100, 900] [100, 100, 100, 900] [100, 100, 600, 900] [1200, 0, 1300, 900]",
        width=200,
        height=100,
        unit="thousandths",
    )
    assert [box.text for box in found.drawn] == ["[100, 100, 600, 900]"]
    assert [(bad.text, bad.reason) for bad in found.ignored] == [
        ("[500, 100, 100, 900]", "box_order"),
        ("[100, 100, 100, 900]", "box_order"),
        ("[1200, 0, 1300, 900]", "box_outside"),
    ]


def test_a_box_that_leaves_the_image_is_clipped_and_says_so():
    found = read_boxes("[-5, 10, 50, 300]", width=200, height=100, unit="pixels")
    assert found.drawn == (Box((0, 10, 50, 100), "[-5, 10, 50, 300]", True),)
    assert not read_boxes("[5, 10, 50, 100]", width=200, height=100, unit="pixels").drawn[0].clipped


def test_a_stammering_model_is_cut_short():
    found = read_boxes("[1, 2, 3, 4] " * (MAX_BOXES + 3), width=200, height=100)
    assert len(found.drawn) == MAX_BOXES
    assert [bad.reason for bad in found.ignored] == ["box_too_many"] * 3


@pytest.mark.parametrize(
    "text", ["no box", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "1, 2, 3, 4", "[a, b, c, d]", "", "(1, 2)"]
)
def test_no_box(text):
    assert read_boxes(text, width=200, height=100).unit is None


def test_a_hostile_answer_is_read_in_no_time():
    read_boxes("[" * 50_000 + "1," * 50_000 + " " * 50_000, width=200, height=100)


def test_the_line_lies_on_the_boxs_edge_and_the_image_stays():
    image = Image.new("RGB", (600, 300))
    drawn = draw_boxes(image, [Box((100, 120, 400, 250), "", False)])
    pixels = np.asarray(drawn)
    assert np.asarray(image).max() == 0
    yellow = (pixels == (255, 212, 0)).all(axis=2)
    below_tag = yellow[121:]  # the number's tag lies above the box
    rows, columns = np.nonzero(below_tag)
    assert (columns.min(), columns.max(), rows.max() + 121) == (100, 399, 249)
    assert not yellow[140:230, 120:380].any()


def test_small_images_are_enlarged_by_a_whole_factor():
    drawn = draw_boxes(Image.new("RGB", (100, 60)), [Box((0, 0, 100, 60), "", False)])
    assert drawn.size == (500, 300)
    assert draw_boxes(Image.new("RGB", (700, 20)), []).size == (700, 20)
