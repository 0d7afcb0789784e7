# SPDX-License-Identifier: Apache-2.0

"""What the readers of label files make of a set: the tables of ``cases/``, one for each reader.

A case says what is written beside what its reader's writer below writes anyway (``given``), the reader's
options, and what comes of it: ``samples`` as labels by source file (``last``: of the last one), each with its
box, or of its mask the slices of rows and columns that are filled, the edges, or the area; ``drops`` by
reason (a reason alone: once), ``where`` the first of them is, the labels that each sample lacks (``lost``),
the samples' ``groups``; or the words of an ``error``. ``cases`` share what stands beside them.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError
from skimage.draw import polygon2mask

from data_tools import readers
from data_tools.readers import coco as coco_reader
from gmai_xtuner.core.errors import SourceError
from tests.data_tools.readers.sets import options, read_units, reasons, write_image, write_mask

FOLDER = Path(__file__).with_name("cases")
OBJECT = """<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>
<ymin>3</ymin><xmax>20</xmax><ymax>25</ymax></bndbox>{more}</object>"""
TURNED = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes>"
SQUARE = {"label": "cyst", "shape_type": "polygon", "points": [[2, 3], [12, 3], [12, 9], [2, 9]]}


WORDS = {"HUGE": "1" * 4_000, "DEEP": "[" * 5_000, "BOMB": "a: &a [x, x, x, x, x, x, x, x, x, x]"}
"""Words of the cases -> what stands there."""
for before, name in zip("abcdefg", "bcdefgh", strict=True):
    WORDS["BOMB"] += f"\n{name}: &{name} [{', '.join(['*' + before] * 10)}]"


def text_of(text: str) -> str:
    for word, meant in WORDS.items():
        text = text.replace(word, meant)
    return text


def write(path: Path, text: str, *, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff\xfe\xfa" if text == "BYTES" else text_of(text).encode(encoding))


def coco(root: Path, given: dict[str, Any]) -> dict[str, Any]:
    image = {"id": 3, "file_name": "a.png", "width": 40, "height": 30}
    entry = {"id": 5, "image_id": 3, "category_id": 1, "bbox": [2, 3, 18, 22.5], "iscrowd": 0}
    content = {
        name: [{**whole, **one} if isinstance(one, dict) else one for one in given.get(name, few)]
        for name, whole, few in (("images", image, [{}]), ("annotations", entry, []))
    }
    content["categories"] = given.get(
        "categories", [{"id": 1, "name": "cell"}, {"id": 7, "name": "nucleus"}]
    )
    for name in given.get("files", ["a.png"]):
        write_image(root / name)
    text = given.get("text") or json.dumps(content).replace('"HUGE"', "1" + "0" * 400)
    write(root / "c.json", text)
    return {"annotations": "c.json"}


def voc(root: Path, given: dict[str, Any]) -> dict[str, Any]:
    for name, keys in given.items():
        if name in ("files", "images"):
            continue
        more = TURNED.format(keys["rotation"]) if "rotation" in keys else ""
        known = {"label": "cell", "difficult": 0, "x1": 2, "more": more}
        objects = keys.get("objects") or OBJECT.format(**known | keys)
        size = f"<size><width>{keys.get('width', 40)}</width><height>30</height></size>"
        named = f"<filename>{keys.get('filename', f'{name}.png')}</filename>"
        text = keys.get("whole", f"<annotation>{named}{size}{objects}</annotation>")
        write(root / "Annotations" / f"{name}.xml", text)
        write_image(root / "JPEGImages" / f"{name}.png")
    return {}


def yolo(root: Path, given: dict[str, Any]) -> dict[str, Any]:
    plain = given.keys() - {"files", "images"}
    lines = {"a": "1 0.275 0.466667 0.45 0.733333\n"} if not plain and "images" not in given else {}
    for name, text in (lines | {name: given[name] for name in plain}).items():
        write(root / "labels/train" / f"{name}.txt", text)
        write_image(root / "images/train" / f"{name}.png")
    return {"names": ["red cell", "platelet"]}


def labelme(root: Path, given: dict[str, Any]) -> dict[str, Any]:
    write_image(root / "img/a.png")
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), 255, np.uint8)).save(buffer, "PNG")
    shapes = given.get("shapes", [{}])
    content = {
        "imagePath": "../img/a.png",
        "imageWidth": 40,
        "imageHeight": 30,
        "imageData": None,
        **given,
    }
    content["shapes"] = None if shapes is None else [SQUARE | shape for shape in shapes]
    text = json.dumps(content).replace(
        '"PNG"', json.dumps(base64.b64encode(buffer.getvalue()).decode())
    )
    if "text" not in given:
        write(root / "json/a.json", text)
    return {}


def masks(root: Path, given: dict[str, Any]) -> dict[str, Any]:
    write_image(root / "i/a.png") if "images" not in given else None
    for name, keys in given.get("masks", {"m/a.png": {}}).items():
        value, background = keys.get("square", (255, 0))
        values = np.full((30, 40), background)
        values[3:25, 2:20] = value
        write_mask(root / name, values)
    if "map" in given or "text" in given:
        write(root / "map.json", given.get("text") or json.dumps(given["map"]))
    return {}


def table(root: Path, given: dict[str, Any]) -> dict[str, Any]:
    for name in ("a.png", "b.png"):
        write_image(root / name)
    write(root / given.get("name", "t.csv"), given["text"], encoding=given.get("encoding", "utf-8"))
    box = {"x1": "x1", "y1": "y1", "x2": "x2", "y2": "y2"}
    return {"table": "t.csv", "image": "f", "label": "l", "box": box}


WRITERS = {writer.__name__: writer for writer in (coco, voc, yolo, labelme, masks, table)}


def cases() -> Iterator[Any]:
    for file in sorted(FOLDER.glob("*.yaml")):
        for group in yaml.safe_load(file.read_text(encoding="utf-8")):
            for number, case in enumerate(group.get("cases", [{}])):
                name = f"{file.stem}: {group['test']} {number}"
                yield pytest.param(file.stem, group | case, id=name)


@pytest.mark.parametrize(("name", "case"), cases())
def test_what_a_reader_makes_of_a_set(name, case, tmp_path):
    root, given = tmp_path / "set", case.get("given", {})
    root.mkdir()
    known = WRITERS[name](root, given) if name in WRITERS else {}
    for image in given.get("images", ()) if name != "coco" else ():
        write_image(root / image)
    for file, text in given.get("files", {}).items() if name != "coco" else ():
        write(root / file, text)
    for link, target in given.get("links", {}).items():
        if not (root / target).exists():
            write_image(root / target)
        (root / link).symlink_to((root / target).resolve())
    reader = readers.load(name)
    keys = known | case.get("options", {})
    if "error" in case:
        with pytest.raises((SourceError, ValidationError), match=case["error"]):
            read_units(reader, options(reader, root, **keys))
        return
    samples, drops, lacking = read_units(reader, options(reader, root, **keys))
    if "samples" in case:
        found = {sample.source_file: sample for sample in samples}
        assert list(found) == list(case["samples"])
        for file, labels in case["samples"].items():
            check_labels(found[file], labels)
    if "last" in case:
        assert samples[-1].source_file == case["last"][0]
        check_labels(samples[-1], case["last"][1])
    expected = case.get("drops", {})
    if not expected and "samples" not in case:  # a case of what is lost, by whatever reason
        expected = reasons(drops)
    assert reasons(drops) == (expected if isinstance(expected, dict) else {expected: 1})
    if "where" in case:
        assert case["where"] in drops[0].where
    if "lost" in case:
        assert [list(labels) for labels in lacking] == case["lost"]
    if "groups" in case:
        assert [sample.group for sample in samples] == case["groups"]


def check_labels(sample: Any, expected: list[list[Any]]) -> None:
    assert [annotation.label for annotation in sample.annotations] == [
        label for label, _ in expected
    ]
    for annotation, (_, region) in zip(sample.annotations, expected, strict=True):
        if isinstance(region, str) and region.startswith("edges"):
            rows, columns = np.nonzero(annotation.mask)
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert found == tuple(map(int, region.split()[1:]))
        elif isinstance(region, str):
            rows, columns = (slice(*map(int, part.split(":"))) for part in region.split(","))
            mask = np.zeros((30, 40), bool)
            mask[rows, columns] = True
            assert np.array_equal(annotation.mask, mask)
        elif isinstance(region, int):
            assert annotation.mask.sum() == region
        else:
            assert annotation.mask is None
            assert annotation.box == (region and pytest.approx(tuple(region), abs=1e-3))


def test_polygons_are_those_of_skimage_but_for_the_edge(tmp_path):
    shape = [5.5, 4.5, 30.5, 6.5, 20.5, 25.5]
    keys = coco(tmp_path, {"annotations": [{"segmentation": [shape]}]})
    samples, _, _ = read_units(coco_reader, options(coco_reader, tmp_path, regions="masks", **keys))
    expected = polygon2mask((30, 40), np.array(shape).reshape(-1, 2)[:, ::-1])
    mask = samples[0].annotations[0].mask
    assert expected.sum() > 200
    assert (mask ^ expected).sum() <= 25  # pixels that the edge runs through
