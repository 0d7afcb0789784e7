# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from data_tools.readers import masks
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import options, read_all, reasons, write_image, write_mask

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


@pytest.mark.parametrize(("foreground", "area"), [(None, 396), (255, 396), (0, 804), (">127", 396)])
def test_binary(tmp_path, foreground, area):
    write(tmp_path, square())
    (sample,), drops = read_all(masks, tmp_path, **PAIR, label="cell", foreground=foreground)
    assert masks_of(sample) == {"cell": (area, (30, 40))}
    assert (sample.source_file, drops) == ("i/a.png", [])


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


@pytest.mark.parametrize(
    "template", ["m/{n}_{label}.png", "m/{label}/{n}.png", "{label}/m/{n}_{instance}.png"]
)
def test_a_file_for_each_class(tmp_path, template):
    write_image(tmp_path / "i/a.png")
    write_image(tmp_path / "i/ab.png")
    for case in ("a", "ab"):
        for label in ("liver", "spleen"):
            name = template.format(n=case, label=label, instance=1)
            write_mask(tmp_path / name, square() if label == "liver" else square(background=255))
    samples, drops = read_all(masks, tmp_path, images="i/{n}.png", masks=template, foreground=255)
    assert [masks_of(sample) for sample in samples] == [
        {"liver": (396, (30, 40)), "spleen": (1200, (30, 40))}
    ] * 2
    assert drops == []


def test_masks_beside_their_pictures_are_no_pictures(tmp_path):
    write_image(tmp_path / "a.png")
    write_mask(tmp_path / "a_mask.png", square())
    (sample,), drops = read_all(
        masks, tmp_path, images="{n}.png", masks="{n}_mask.png", label="lesion"
    )
    assert (sample.source_file, masks_of(sample), drops) == (
        "a.png",
        {"lesion": (396, (30, 40))},
        [],
    )


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


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"i/a.png": ["../m/a.png"]}, "path outside the source"),
        ({"../i/a.png": ["m/a.png"]}, "path outside the source"),
        ({"i/b.png": ["m/a.png"]}, "no such image file"),
        ({"i/a.png": ["m/b.png"]}, "no such mask file"),
        ({"i/a.png": []}, "image without a mask"),
        ({"i/a.png": [3]}, "masks that are no list of paths"),
        ({"i/a.png": {"a": 1}}, "masks that are no list of paths"),
    ],
)
def test_a_bad_entry_of_the_map_is_counted(tmp_path, entries, reason):
    write(tmp_path, square())
    (tmp_path / "map.json").write_text(json.dumps(entries))
    samples, drops = read_all(masks, tmp_path, map="map.json", label="cell")
    assert (samples, reasons(drops)) == ([], {reason: 1})


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


@pytest.mark.parametrize(
    "keys",
    [
        PAIR,
        {"images": "i/{n}.png", "label": "a"},
        {**PAIR, "label": "a", "map": "m.json"},
        {**PAIR, "masks": "../m/{n}.png", "label": "a"},
        {**PAIR, "label": "a", "foreground": "x"},
        {**PAIR, "kind": "indexed", "label": "a"},
        {**PAIR, "kind": "colours"},
        {**PAIR, "kind": "colours", "colours": {"red": "a"}},
    ],
)
def test_keys_that_make_no_sense_together(tmp_path, keys):
    with pytest.raises(ValidationError):
        options(masks, tmp_path, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"images": "i/{n}.jpg", "masks": "m/{n}.png"}, r"fits `images: i/\{n\}.jpg`"),
        ({"images": "j/{n}.png", "masks": "m/{n}.png"}, "names the folder 'j'"),
        ({"map": "no.json"}, "names the file 'no.json'"),
        ({"map": "list.json"}, "is no map from pictures|is no JSON"),
        ({"map": "broken.json"}, "broken.json is no JSON"),
        ({**PAIR, "classes": "list.json"}, "is no map {class: id}"),
    ],
)
def test_a_set_that_is_wrong_as_a_whole(tmp_path, keys, message):
    write(tmp_path, square())
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text('{"i/a.png": ["m/a.png"], "i')
    with pytest.raises(SourceError, match=message):
        read_all(masks, tmp_path, **keys, label="cell")
