# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
from PIL import Image

from data_tools.output import card
from data_tools.output.card import draw

BLUE = np.array([0x00, 0x72, 0xB2])


def bars(path) -> np.ndarray:
    """Lengths of the blue bars in pixels, from above."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    length = (np.abs(pixels - BLUE).sum(axis=2) < 12).sum(axis=1)
    edges = np.flatnonzero(np.diff((length > 0).astype(int)))
    return np.array(
        [length[a + 1 : b + 1].max() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    )


@pytest.mark.parametrize("count", [1, 2, 38])
def test_a_bar_for_each_name_as_long_as_its_count(tmp_path, count):
    counts = {f"A modality with a long name, number {n}": 1_000 - 20 * n for n in range(count)}
    draw(tmp_path / "a.png", counts, title="Modality")
    found = bars(tmp_path / "a.png")
    expected = np.array(list(counts.values())) / 1_000
    assert len(found) == count
    assert found / found[0] == pytest.approx(expected, abs=0.02)


def test_the_same_counts_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, {"CT": 3, "MR": 1}, title="Modality")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_hostile_name_is_drawn_as_text_and_nothing_is_printed(tmp_path, caplog):
    counts = {r"$\frac{$": 2, "a\x00b\nc": 1, "x" * 500: 1, "眼底": 1, "\U00012000": 1}
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path / "a.png", counts, title="Modality")
    assert not caplog.records
    assert len(bars(tmp_path / "a.png")) == 5
    assert Image.open(tmp_path / "a.png").width == 1_080


def test_only_what_has_a_record_is_drawn(tmp_path):
    records = {
        "modality": {"CT": 2},
        "source_task": {},
        "department": {"None": 2},
        "clinical_task": {},
    }
    assert card.write_figures(tmp_path, records) == [
        "figures/modality.png",
        "figures/department.png",
    ]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "department.png",
        "modality.png",
    ]
