# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from skimage.draw import polygon2mask

from data_tools.readers import coco
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import boxes, incomplete, read_all, reasons, write_image

CATEGORIES = [{"id": 1, "name": "cell"}, {"id": 7, "name": "nucleus"}]
IMAGE = {"id": 3, "file_name": "a.png", "width": 40, "height": 30}


def write(root, *annotations: Any, images: Any = (IMAGE,), categories: Any = CATEGORIES) -> None:
    content = {"images": list(images), "annotations": annotations, "categories": categories}
    (root / "c.json").write_text(json.dumps(content))
    write_image(root / "a.png")


def entry(**keys: Any) -> dict[str, Any]:
    return {"id": 5, "image_id": 3, "category_id": 1, "bbox": [2, 3, 18, 22.5], "iscrowd": 0} | keys


def read(root, **keys: Any):
    return read_all(coco, root, annotations="c.json", **keys)


def test_boxes(tmp_path):
    images = [IMAGE | {"patient": 12}, {"id": "s", "file_name": "b.png"}]
    write(tmp_path, entry(), entry(category_id=7, bbox=[0, 0, 1, 1]), images=images)
    write_image(tmp_path / "b.png")
    samples, drops = read(tmp_path, group_key="patient")
    assert [boxes(sample) for sample in samples] == [
        [("cell", (2, 3, 20, 25.5)), ("nucleus", (0, 0, 1, 1))],
        [],
    ]
    assert [sample.group for sample in samples] == ["12", None]
    assert drops == []


@pytest.mark.parametrize("shape", [[], [[12, 10, 28, 10, 28, 18, 12, 18]]])
def test_a_rectangle_that_cvat_turned(tmp_path, shape):
    """16 x 8 around (20, 14), turned by 90 degrees: 8 x 16."""
    turned = {"bbox": [12, 10, 16, 8], "segmentation": shape, "attributes": {"rotation": 90.0}}
    write(tmp_path, entry(**turned))
    (sample,), _ = read(tmp_path)
    assert boxes(sample) == [("cell", pytest.approx((16, 6, 24, 22)))]
    (sample,), _ = read(tmp_path, regions="masks")
    rows, columns = np.nonzero(sample.annotations[0].mask)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (16, 6, 23, 21)
    write(tmp_path, entry(attributes={"rotation": "x"}))
    assert reasons(read(tmp_path)[1]) == {"box that can't be read": 1}


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (entry(image_id=4), "annotation of an image that isn't listed"),
        (entry(image_id=None), "annotation of an image that isn't listed"),
        (entry(image_id=[3]), "annotation of an image that isn't listed"),
        ("nonsense", "annotation of an image that isn't listed"),
        (entry(category_id=2), "unknown class id"),
        (entry(category_id={}), "unknown class id"),
        (entry(iscrowd=1), "crowd annotation"),
        (entry(bbox=[1, 2, 3]), "box that can't be read"),
        (entry(bbox=[1, 2, 3, "4"]), "box that can't be read"),
        (entry(bbox=[1, 2, 3, float("nan")]), "box that can't be read"),
        (entry(bbox=[1, 2, 3, 10**400]), "box that can't be read"),
        (entry(bbox=None), "box that can't be read"),
    ],
)
def test_a_bad_annotation_is_counted_and_the_others_stay(tmp_path, annotation, reason):
    write(tmp_path, annotation, entry())
    (sample,), drops = read(tmp_path)
    assert boxes(sample) == [("cell", (2, 3, 20, 25.5))]
    assert reasons(drops) == {reason: 1}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (IMAGE | {"file_name": "../a.png"}, "path outside the source"),
        (IMAGE | {"file_name": "b.png"}, "no such image file"),
        (IMAGE | {"file_name": None}, "image without a file name"),
        (IMAGE | {"width": 41}, "image of another size than its annotation says"),
        (IMAGE | {"id": None}, "image without an id of its own"),
        ("nonsense", "image without an id of its own"),
    ],
)
def test_a_bad_image_is_counted(tmp_path, image, reason):
    write(tmp_path, images=[image])
    samples, drops = read(tmp_path)
    assert (samples, reasons(drops)) == ([], {reason: 1})


@pytest.mark.parametrize(
    ("again", "reason"), [({}, "image without an id of its own"), ({"id": 4}, "image listed twice")]
)
def test_of_an_image_listed_twice_each_entry_has_what_the_other_lacks(tmp_path, again, reason):
    write(tmp_path, entry(), images=[IMAGE, IMAGE | again])
    samples, drops = read(tmp_path)
    assert (samples, reasons(drops)) == ([], {reason: 2})


@pytest.mark.parametrize(
    ("stray", "lost"),
    [({"image_id": None}, ("cell",)), ({"image_id": "3"}, ("cell",)), ({"image_id": 4}, ()),
     ({"image_id": None, "category_id": 9}, ("*",))],
)  # fmt: skip
def test_an_annotation_that_names_no_image_may_be_of_any(tmp_path, stray, lost):
    write(tmp_path, entry(), entry(**stray))
    assert incomplete(coco, tmp_path, annotations="c.json") == [lost]


def test_polygons_are_those_of_skimage_but_for_the_edge(tmp_path):
    shape = [5.5, 4.5, 30.5, 6.5, 20.5, 25.5]
    write(tmp_path, entry(segmentation=[shape]))
    (sample,), drops = read(tmp_path, regions="masks")
    expected = polygon2mask((30, 40), np.array(shape).reshape(-1, 2)[:, ::-1])
    mask = sample.annotations[0].mask
    assert mask.shape == (30, 40)
    assert drops == []
    assert expected.sum() > 200
    assert (mask ^ expected).sum() <= 25  # pixels that the edge runs through


def codes() -> dict[str, Any]:
    """A mask in COCO's two forms; the runs go down the columns."""
    from pycocotools import mask as library

    mask = np.zeros((30, 40), dtype=bool)
    mask[2:5, 1:3] = True
    plain = {"size": [30, 40], "counts": [30 + 2, 3, 27, 3, 30 * 40 - 30 - 2 - 33]}
    packed = library.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "mask": mask,
        "plain": plain,
        "packed": {"size": [30, 40], "counts": packed["counts"].decode()},
    }


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_run_length_codes(tmp_path, form):
    write(tmp_path, entry(segmentation=codes()[form]))
    (sample,), drops = read(tmp_path, regions="masks")
    assert drops == []
    np.testing.assert_array_equal(sample.annotations[0].mask, codes()["mask"])


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ([[1, 2, 3, 4]], "polygon that can't be read"),  # pycocotools takes it for a box
        ([[1, 2, 3, 4, 5, 6, 7]], "polygon that can't be read"),
        ([[1, 2, 3, 4, 5, "x"]], "polygon that can't be read"),
        ([], "polygon that can't be read"),
        ([[1, 1, 1e12, 1, 5, 5]], "polygon outside the image"),  # terabytes in pycocotools
        ([[1, 1, 1, -9, 5, 5]], "polygon outside the image"),
        ({"size": [40, 30], "counts": [1200]}, "mask of another size than its image"),
        ({"size": [30, 40], "counts": [1199]}, "run-length code of a wrong length"),
        ({"size": [30, 40], "counts": [-1, 1201]}, "run-length code of a wrong length"),
        ({"size": [30, 40], "counts": "0" * 9}, "run-length code of a wrong length"),
        ({"size": [30, 40], "counts": "ooooooooooooo"}, "run-length code of a wrong length"),
        ({"size": [30, 40], "counts": "ü"}, "run-length code that can't be read"),
        ({"size": [30, 40]}, "run-length code that can't be read"),
        (None, "mask of another size than its image"),
    ],
)
def test_hostile_shapes_are_counted(tmp_path, shape, reason):
    write(tmp_path, entry(segmentation=shape))
    (sample,), drops = read(tmp_path, regions="masks")
    assert (sample.annotations, reasons(drops)) == ((), {reason: 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "`images` is missing; there is list"),
        ('{"images": [], "annotations": []}', "`categories` is missing"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "without id or name"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, '
            '{"id": 1, "name": "b"}]}',
            "category id 1 is both 'a' and 'b'",
        ),
    ],
)
def test_a_file_that_is_no_coco_file(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        read(tmp_path)


def test_what_is_left_out_is_named(tmp_path):
    write(tmp_path, entry(), entry(id=6, category_id=7, iscrowd=1))
    _, drops = read(tmp_path)
    assert reasons(drops) == {"crowd annotation": 1}
    assert incomplete(coco, tmp_path, annotations="c.json") == [("nucleus",)]
