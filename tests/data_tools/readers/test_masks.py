# SPDX-License-Identifier: Apache-2.0

import json

import numpy as np
import pytest
from PIL import Image

from data_tools.readers import masks
from tests.data_tools.readers.sets import read_all, reasons, write_image, write_mask

PAIR = {"images": "i/{n}.png", "masks": "m/{n}.png"}


def square(value: int = 255, *, background: int = 0) -> np.ndarray:
    values = np.full((30, 40), background)
    values[3:25, 2:20] = value
    return values


def write(root, values, name="a", **keys):
    write_image(root / f"i/{name}.png")
    write_mask(root / f"m/{name}.png", values, **keys)


def masks_of(sample):
    return {
        annotation.label: (int(annotation.mask.sum()), annotation.mask.shape)
        for annotation in sample.annotations
    }


@pytest.mark.parametrize("palette", [False, True])
def test_indexed(tmp_path, palette):
    values = square(3)
    values[0, :5] = 7
    values[29, :] = 255
    write(tmp_path, values, palette=palette)
    keys = {"kind": "indexed", "background": (0, 255)}
    (sample,), _ = read_all(masks, tmp_path, **PAIR, **keys)
    assert masks_of(sample) == {"3": (396, (30, 40)), "7": (5, (30, 40))}


def test_colours(tmp_path):
    values = np.zeros((30, 40, 3))
    values[3:25, 2:20] = (255, 0, 16)
    write(tmp_path, values)
    keys = {"kind": "colours", "colours": {"#000000": None, "#ff0010": "gland"}}
    (sample,), _ = read_all(masks, tmp_path, **PAIR, **keys)
    assert masks_of(sample) == {"gland": (396, (30, 40))}
    values[0, 0] = 255
    write(tmp_path, values)
    samples, drops = read_all(masks, tmp_path, **PAIR, **keys)
    assert (samples, reasons(drops)) == ([], {"mask with an unknown colour": 1})
    assert "#ffffff" in drops[0].detail


def test_the_map_of_sa_med2d(tmp_path):
    """Names as in its demo data; ``SAMed2Dv1.json`` and ``SAMed2D_v1_class_mapping_id.json``."""
    stem = "ct_00--AbdomenCT1K--Case_00011--x_0040"
    write_image(tmp_path / f"images/{stem}.png")
    found = [f"masks/{stem}--0003_000.png", f"masks/{stem}--0001_001.png"]
    for name in found:
        write_mask(tmp_path / name, square())
    (tmp_path / "map.json").write_text(json.dumps({f"images/{stem}.png": found}))
    (tmp_path / "classes.json").write_text(
        json.dumps({"AbdomenCT1K": {"liver": "1", "spleen": "3"}, "Other": {"heart": "1"}})
    )
    keys = {
        "map": "map.json",
        "classes": "classes.json",
        "masks": "masks/{modality}--{dataset}--{group}--{slice}--{label}_{instance}.png",
    }
    (sample,), drops = read_all(masks, tmp_path, **keys)
    assert masks_of(sample) == {"spleen": (396, (30, 40)), "liver": (396, (30, 40))}
    assert (sample.group, drops) == ("Case_00011", [])
    (tmp_path / "classes.json").write_text(json.dumps({"AbdomenCT1K": {"liver": "1"}}))
    masks._classes.cache_clear()
    samples, drops = read_all(masks, tmp_path, **keys)
    assert (samples, reasons(drops)) == ([], {"unknown class id": 1})


def test_bad_masks_drop_their_pictures_and_the_others_are_read(tmp_path):
    write(tmp_path, square())
    write(tmp_path, square()[:29], "size")
    write(tmp_path, square(9) + square(80, background=1), "several")
    write(tmp_path, square(background=1), "without 0")
    write(tmp_path, np.full((30, 40, 3), (1, 2, 3)), "colours")
    write(tmp_path, square() * 0, "empty")
    write(tmp_path, square(), "cut")
    path = tmp_path / "m/cut.png"
    path.write_bytes(path.read_bytes()[:-30])
    write(tmp_path, square(), "text")
    (tmp_path / "m/text.png").write_text("no picture")
    write_image(tmp_path / "i/alone.png")
    samples, drops = read_all(masks, tmp_path, **PAIR, label="cell")
    assert [(sample.source_file, len(sample.annotations)) for sample in samples] == [
        ("i/a.png", 1),
        ("i/empty.png", 0),
    ]
    assert {drop.where.rsplit("/")[-1]: drop.reason for drop in drops} == {
        "size.png": "mask of another size than its image",
        "several.png": "binary mask with several values",
        "without 0.png": "binary mask with several values",
        "colours.png": "mask in colours where grey levels are expected",
        "empty.png": "empty mask",
        "cut.png": "mask that can't be read",
        "text.png": "image can't be read",
        "alone.png": "image without a mask",
    }


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("fault", ["alpha", "palette", "turned", "white is 0", "signed"])
def test_a_mask_that_can_be_read_in_two_ways_drops_its_picture(tmp_path, fault, suffix):
    values = np.asarray(square(), dtype=np.uint8)
    write_image(tmp_path / "i/a.png")
    image, keys = Image.fromarray(values), {}
    if fault == "alpha":
        image = Image.merge("RGBA", [image.point(lambda _: 255)] * 3 + [image])
    elif fault == "palette":
        image = Image.fromarray((values == 0).astype(np.uint8))
        image.putpalette([255, 255, 255, 0, 0, 0])
    elif fault == "turned":
        exif = Image.Exif()
        exif[274] = 3
        keys = {"exif": exif} if suffix == ".png" else {"tiffinfo": {274: 3}}
    else:
        suffix, keys = ".tif", {"tiffinfo": {339: 2} if fault == "signed" else {262: 0}}
    (tmp_path / "m").mkdir()
    image.save(tmp_path / f"m/a{suffix}", **keys)
    pair = {"images": "i/{n}.png", "masks": f"m/{{n}}{suffix}", "label": "cell"}
    samples, drops = read_all(masks, tmp_path, **pair)
    assert (samples, reasons(drops)) == ([], {"mask that can be read in two ways": 1})
