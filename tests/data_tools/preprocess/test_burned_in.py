# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_tools.preprocess.burned_in import BURNED_IN, NOTE, find_text, without_edges
from data_tools.records import Annotation
from tests.data_tools.test_standardise import read, sample  # noqa: F401

SIDE = 300


def image(text: str, place: tuple[int, int], *, height: int = 16) -> np.ndarray:
    ground = np.random.default_rng(0).integers(40, 70, (SIDE, SIDE)).astype(np.uint8)
    made = Image.fromarray(ground)
    ImageDraw.Draw(made).text(place, text, fill=255, font=ImageFont.load_default(height))
    return np.asarray(made)


def test_text_is_found_where_it_is():
    assert not find_text(image("", (0, 0)))
    ((x1, y1, x2, y2),) = find_text(image("Kreisspital 12.03.1956", (20, 8)))
    assert 10 < x1 < 25
    assert y1 < 16 < y2 < 40
    assert 150 < x2 < 230
    # The detector would shrink an image of this size, and lose the letters.
    large = np.full((2600, 2600), 50, np.uint8)
    large[1250:1550, 2200:2500] = image("Kreisspital", (20, 150), height=12)
    assert len(find_text(large)) >= 1


@pytest.mark.parametrize(
    ("boxes", "rest"),
    [
        ([], (0, 0, 100, 80)),
        ([(5, 2, 60, 10)], (0, 10, 100, 80)),
        ([(5, 2, 60, 10), (10, 72, 30, 78)], (0, 10, 100, 72)),
        ([(85, 2, 98, 60)], (0, 0, 85, 80)),
        ([(40, 30, 60, 45)], None),
    ],
)
def test_edges_are_cut_off_as_narrow_as_can_be(boxes, rest):
    assert without_edges(boxes, 100, 80) == rest


def test_what_becomes_of_an_image_with_text(read):  # noqa: F811
    pixels = image("Kreisspital 12.03.1956", (20, 8))
    box = Annotation("cat", (50, 60, 90, 100))
    at_edge = Annotation("dog", (0, 0, 60, 20))

    def made(mode: str, shown: np.ndarray = pixels) -> object:
        return read(sample(box, at_edge, image=shown), text_in_pixels=mode)

    (kept,) = made("keep").records
    assert NOTE not in kept.provenance.preprocessing
    (flagged,) = made("flag").records
    assert flagged.provenance.preprocessing[NOTE] == "found in 1 places"
    (drop,) = made("drop").drops
    assert drop.reason == BURNED_IN
    (cut,) = made("crop").records
    top = SIDE - cut.height
    assert 20 < top < 45
    assert [(label.name, label.box) for label in cut.labels] == [
        ("cat", (50, 60 - top, 90, 100 - top))
    ]
    assert cut.incomplete == ("dog",)
    (drop,) = made("crop", image("Kreisspital", (90, 140))).drops
    assert drop.reason == BURNED_IN
