"""A picture inside another file is read as one that lies in a file of its own."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.images import decode_rgb, open_rgb
from gmai_xtuner.evaluate.questions import open_image

RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.gif"])
def test_bytes_give_the_picture_of_the_file(tmp_path, name):
    Image.fromarray(RGB).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    expected = np.asarray(open_rgb(tmp_path / name))
    assert (np.asarray(decode_rgb(content, "x")) == expected).all()
    assert (np.asarray(open_image(content, "x")) == expected).all()
    assert (np.asarray(open_image(tmp_path / name, "x")) == expected).all()


def test_16_bits_and_a_rotation_too(tmp_path):
    deep = (np.arange(120, dtype=np.uint16).reshape(12, 10) * 500).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.jpg", exif=exif)
    for name in ("deep.png", "turned.jpg"):
        found = decode_rgb((tmp_path / name).read_bytes(), "x")
        assert (np.asarray(found) == np.asarray(open_rgb(tmp_path / name))).all()
    assert found.size == (12, 10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged_image"),
        (b"GIF?", "unsupported_image"),
        (b"\x89PNG\r\n\x1a\n", "damaged_image"),
    ],
)
def test_errors_name_the_picture_not_its_bytes(content, reason):
    with pytest.raises(ImageError) as caught:
        decode_rgb(content, "image 2 of question q7")
    assert caught.value.reason == reason
    assert "image 'image 2 of question q7'" in str(caught.value)


def test_the_limit_on_pixels_holds(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="12 = 120 pixels, the limit is 100"):
        decode_rgb((tmp_path / "a.png").read_bytes(), "x", max_pixels=100)
