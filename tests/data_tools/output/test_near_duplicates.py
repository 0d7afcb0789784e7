# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.output.near_duplicates import hashes, perceptual_hash
from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.hamming import close_pairs


def picture(seed: int, side: int = 160) -> Image.Image:
    """Soft blobs, as much alike as medical pictures of different kinds are."""
    low = np.random.default_rng(seed).integers(0, 255, (9, 9), dtype=np.uint8)
    return Image.fromarray(low).resize((side, side), Image.Resampling.BICUBIC)


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_a_picture_that_was_saved_again_or_made_smaller_is_close(tmp_path):
    for seed in range(8):
        picture(seed).save(tmp_path / "a.png")
        picture(seed).save(tmp_path / "b.jpg", quality=60)
        picture(seed).resize((97, 97)).save(tmp_path / "c.png")
        picture(seed).convert("RGB").save(tmp_path / "d.png")
        first, *others = (perceptual_hash(path) for path in sorted(tmp_path.iterdir()))
        assert max(bits(first, other) for other in others) <= 2


def test_different_pictures_are_far_apart(tmp_path):
    values = []
    for seed in range(12):
        picture(seed).save(tmp_path / f"{seed}.png")
        values.append(perceptual_hash(tmp_path / f"{seed}.png"))
    apart = [bits(a, b) for n, a in enumerate(values) for b in values[:n]]
    assert min(apart) > 8


def test_a_picture_without_anything_in_it_has_the_hash_zero(tmp_path):
    for level in (0, 37, 128, 255):
        Image.new("L", (50, 40), level).save(tmp_path / "grey.png")
        assert perceptual_hash(tmp_path / "grey.png") == 0


def test_a_picture_that_cannot_be_read_stops_with_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(CorpusError, match=r"a\.png: a stored image can't be read"):
        hashes([tmp_path / "a.png"], threads=1)


def test_hashes_keep_the_order_of_the_paths(tmp_path):
    paths = []
    for seed in range(5):
        paths.append(tmp_path / f"{seed}.png")
        picture(seed).save(paths[-1])
    expected = [perceptual_hash(path) for path in paths]
    assert hashes(iter(paths), threads=3).tolist() == expected
    assert hashes([], threads=1).tolist() == []


def test_x_rays_of_real_patients(shared_data: Path):
    """40 chest X-rays of one hospital: at the largest distance allowed, few are linked."""
    paths = sorted((shared_data / "hannover_cxr").rglob("*.png"))
    found = list(close_pairs(hashes(paths, threads=2), distance=4))
    assert len(paths) == 40
    assert len(found) <= 1
