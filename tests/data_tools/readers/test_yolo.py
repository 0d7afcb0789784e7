# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from data_tools.readers import yolo
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import boxes, incomplete, read_all, reasons, write_image

NAMES = ("red cell", "platelet")


def write(root, name="a", text="1 0.275 0.466667 0.45 0.733333\n", folder="train"):
    write_image(root / f"images/{folder}/{name}.png")
    (root / f"labels/{folder}").mkdir(parents=True, exist_ok=True)
    (root / f"labels/{folder}/{name}.txt").write_text(text)


def test_fractions_become_pixels(tmp_path):
    write(tmp_path)
    (sample,), drops = read_all(yolo, tmp_path, names=NAMES)
    ((label, box),) = boxes(sample)
    assert (label, box) == ("platelet", pytest.approx((2, 3, 20, 25), abs=1e-3))
    assert (sample.source_file, drops) == ("images/train/a.png", [])


@pytest.mark.parametrize(
    "text",
    [
        "names: [red cell, platelet]",
        "names: {1: platelet, 0: red cell}",
        "path: x\nnames:\n  - red cell\n  - platelet",
        "date: 2024-01-01\nid: " + "1" * 4_000 + "\nnames: [red cell, platelet]",
    ],
)
def test_names_of_a_yaml(tmp_path, text):
    write(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    (sample,), _ = read_all(yolo, tmp_path, names="data.yaml")
    assert sample.annotations[0].label == "platelet"


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("data.yaml", "names: [no, yes]", ["no", "yes"]),
        ("data.yaml", "names: {0: 1, 1: 2026-01-02}", ["1", "2026-01-02"]),
        ("classes.txt", "lesion\n\nnodule\n\n", ["lesion", "nodule"]),
    ],
)
def test_names_are_texts_and_keep_their_numbers(tmp_path, file, text, names):
    write(tmp_path, text="".join(f"{n} 0.5 0.5 0.{n + 2} 0.4\n" for n in range(3)))
    (tmp_path / file).write_text(text)
    (sample,), _ = read_all(yolo, tmp_path, names=file)
    assert [label for label, _ in boxes(sample)] == names


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
for before, name in zip("abcdefg", "bcdefgh", strict=True):
    BOMB += f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "names: *h", "more than 1000000 values"),
        ("names: " + "[" * 5000, "nested too deep|not valid YAML"),
        ("names: [a, [b]]", "has no `names`"),
        ("names: {0: a, 2: b}", "has no `names`"),
        ("names: !!python/object/apply:os.getcwd []", "no `names`|not valid YAML"),
    ],
)
def test_names_that_are_hostile_or_no_names(tmp_path, text, message):
    write(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_all(yolo, tmp_path, names="data.yaml")


def test_names_of_a_text_and_other_layouts(tmp_path):
    write(tmp_path, folder="val")
    write(tmp_path, folder="train")
    (tmp_path / "classes.txt").write_text("red cell\nplatelet\n")
    samples, _ = read_all(yolo, tmp_path, names="classes.txt", folders=("images/val",))
    assert [sample.source_file for sample in samples] == ["images/val/a.png"]
    flat = tmp_path / "flat"
    write_image(flat / "b.png")
    (flat / "b.txt").write_text("0 0.5 0.5 0.5 0.5")
    (sample,), _ = read_all(yolo, flat, names=NAMES, images="")
    assert boxes(sample) == [("red cell", (10, 7.5, 30, 22.5))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 1.2 0.5", "fraction below 0 or above 1"),
        ("0 0.5 -0.5 0.2 0.5", "fraction below 0 or above 1"),
        ("0 320 240 20 20", "fraction below 0 or above 1"),
        ("2 0.5 0.5 0.2 0.5", "unknown class id"),
        ("1" * 5000 + " 0.5 0.5 0.2 0.5", "unknown class id"),
        ("-1 0.5 0.5 0.2 0.5", "unknown class id"),
        ("cell 0.5 0.5 0.2 0.5", "unknown class id"),
        ("0 0.5 0.5 0.2", "line of another format"),
        ("0 0.5 0.5 0.2 0.2 0.9", "line of another format"),
        ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5", "line of another format"),
        ("0 0.5 0.5 nan 0.5", "box that can't be read"),
        ("0 0.5 0.5 x 0.5", "box that can't be read"),
        ("1 0.25 0.5 0.5 0.5", "duplicate row"),
    ],
)
def test_a_bad_line_is_counted_and_the_others_stay(tmp_path, line, reason):
    write(tmp_path, text=f"1 0.25 0.5 0.5 0.5\n\n{line}\n")
    (sample,), drops = read_all(yolo, tmp_path, names=NAMES)
    assert boxes(sample) == [("platelet", (0, 7.5, 20, 22.5))]
    assert reasons(drops) == {reason: 1}
    assert drops[0].where == "images/train/a.png line 3"
    lost = {"duplicate row": (), "unknown class id": ("platelet", "red cell")}
    told = (
        line[0] in "01" and reason != "line of another format"
    )  # then the class may be another value
    all_or_one = ("red cell",) if told else ("platelet", "red cell")
    assert incomplete(yolo, tmp_path, names=NAMES) == [lost.get(reason, all_or_one)]


def test_polygons_and_oriented_boxes(tmp_path):
    corners = "0 0.25 0.2 0.5 0.2 0.5 0.8 0.25 0.8"
    write(tmp_path, text=corners)
    (sample,), _ = read_all(yolo, tmp_path, names=NAMES, format="polygons")
    mask = sample.annotations[0].mask
    assert mask[6:24, 10:20].all()
    assert mask.sum() == 18 * 10
    (sample,), _ = read_all(yolo, tmp_path, names=NAMES, format="oriented")
    assert boxes(sample) == [("red cell", (10, 6, 20, 24))]


def test_files_without_their_other_half(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b")
    write(tmp_path, "empty", text="")
    write(tmp_path, "bytes")
    (tmp_path / "labels/train/bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "labels/train/a.txt").unlink()
    (tmp_path / "images/train/b.png").unlink()
    samples, drops = read_all(yolo, tmp_path, names=NAMES)
    assert [(sample.source_file, boxes(sample)) for sample in samples] == [
        ("images/train/empty.png", [])
    ]
    assert reasons(drops) == {
        "no such annotation file": 1,
        "label file without an image": 1,
        "label file that can't be read": 1,
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"names": "data.yaml"}, "names the file 'data.yaml'"),
        ({"names": "bad.yaml"}, "has no `names`"),
        ({"names": "broken.yaml"}, "not valid YAML"),
        ({"names": NAMES, "folders": ("images/tset",)}, "names the folder 'images/tset'"),
        ({"names": NAMES, "images": "pictures"}, "no picture in a folder 'pictures'"),
    ],
)
def test_a_set_that_is_wrong_as_a_whole(tmp_path, keys, message):
    write(tmp_path)
    (tmp_path / "bad.yaml").write_text("names: {0: a, 2: b}")
    (tmp_path / "broken.yaml").write_text("names: [")
    with pytest.raises(SourceError, match=message):
        read_all(yolo, tmp_path, **keys)
