# SPDX-License-Identifier: Apache-2.0

"""An image inside another file is read as one that lies in a file of its own."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.evaluate.questions import open_image

RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
DEEP = (np.arange(120, dtype=np.uint16).reshape(12, 10) * 500).astype(np.uint16)


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.gif", "deep.png", "turned.jpg"]
)
def test_bytes_give_the_image_of_the_file(tmp_path, name):
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6
    Image.fromarray(DEEP if name == "deep.png" else RGB).save(tmp_path / name, exif=exif)
    expected = np.asarray(open_rgb(tmp_path / name))
    assert expected.shape[:2] == ((10, 12) if name == "turned.jpg" else (12, 10))
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        assert (np.asarray(open_image(source, "x")) == expected).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged_image"),
        (b"GIF?", "unsupported_image"),
        (b"\x89PNG\r\n\x1a\n", "damaged_image"),
    ],
)
def test_errors_name_the_image_not_its_bytes(content, reason):
    with pytest.raises(ImageError) as caught:
        open_image(content, "image 2 of question q7")
    assert caught.value.reason == reason
    assert "image 'image 2 of question q7'" in str(caught.value)
