# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.readers import labelme
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import boxes, incomplete, read_all, reasons, write_image

SQUARE = {"label": "cyst", "shape_type": "polygon", "points": [[2, 3], [12, 3], [12, 9], [2, 9]]}


def write(root, *shapes, path="../img/a.png", **keys):
    write_image(root / "img/a.png")
    (root / "json").mkdir(exist_ok=True)
    content = {"shapes": list(shapes), "imagePath": path, "imageWidth": 40, "imageHeight": 30}
    (root / "json/a.json").write_text(json.dumps(content | {"imageData": None} | keys))


def png(pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def edges(mask):
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("path", ["../img/a.png", "..\\img\\a.png"])
def test_shapes(tmp_path, path):
    part = np.full((4, 6), 255, dtype=np.uint8)
    write(
        tmp_path,
        SQUARE,
        {"label": "box", "shape_type": "rectangle", "points": [[12, 9], [2, 3]]},
        {"label": "disc", "shape_type": "circle", "points": [[20, 15], [20, 20]]},
        {"label": "part", "shape_type": "mask", "points": [[5, 6], [10, 9]], "mask": png(part)},
        path=path,
        flags={"blurred": True, "normal": False},
    )
    (sample,), drops = read_all(labelme, tmp_path)
    whole, cyst, box, disc, painted = sample.annotations
    assert (sample.source_file, drops) == ("img/a.png", [])
    assert (whole.label, whole.box, whole.mask) == ("blurred", None, None)
    assert edges(cyst.mask) == (2, 3, 12, 9)
    assert box.box == (2, 3, 12, 9)
    assert edges(disc.mask) == (15, 10, 25, 20)
    assert (edges(painted.mask), painted.mask.sum()) == ((5, 6, 11, 10), 24)
    (sample,), _ = read_all(labelme, tmp_path, regions="boxes")
    assert boxes(sample)[1] == ("cyst", (2, 3, 12, 9))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (SQUARE | {"shape_type": "point", "points": [[1, 1]]}, "shape that is no region"),
        (SQUARE | {"shape_type": "linestrip"}, "shape that is no region"),
        (SQUARE | {"points": [[1, 2], [3, 4]]}, "polygon that can't be read"),
        (SQUARE | {"points": [[1, "x"]]}, "polygon that can't be read"),
        (SQUARE | {"points": [[90, 1], [95, 1], [95, 9]]}, "polygon outside the image"),
        (SQUARE | {"shape_type": "mask", "points": [[1, 1], [9, 9]]}, "mask that can't be read"),
    ],
)
def test_a_shape_that_is_left_out_is_counted(tmp_path, shape, reason):
    write(tmp_path, shape, SQUARE | {"label": "other"})
    (sample,), drops = read_all(labelme, tmp_path)
    assert [annotation.label for annotation in sample.annotations] == ["other"]
    assert reasons(drops) == {reason: 1}
    assert incomplete(labelme, tmp_path) == [("cyst",)]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"path": "../../secret.png"}, "path outside the source"),
        ({"path": "/etc/a.png"}, "path outside the source"),
        ({"path": "b.png"}, "no such image file"),
        ({"imageWidth": 41}, "image of another size than its annotation says"),
        ({"shapes": None}, "JSON without `shapes` and `imagePath`"),
    ],
)
def test_a_file_that_is_left_out(tmp_path, keys, reason):
    write(tmp_path, SQUARE, **keys)
    samples, drops = read_all(labelme, tmp_path)
    assert (samples, reasons(drops)) == ([], {reason: 1})


def test_no_json_at_all(tmp_path):
    with pytest.raises(SourceError, match=r"no \.json file"):
        read_all(labelme, tmp_path)
