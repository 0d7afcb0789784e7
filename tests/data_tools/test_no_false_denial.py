# SPDX-License-Identifier: Apache-2.0

"""Whatever is damaged, no text denies, counts or offers as wrong what the undamaged set has in the image.

Random sets, random damage, and the questions that are then asked. ``GMAI_DAMAGED_SETS=20000 pytest`` on this
file tries as many sets of each kind.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
from PIL import Image

from data_tools import forms, readers, taxonomy
from data_tools.forms import MakeOptions
from data_tools.items import SourceContext, Task
from data_tools.standardise import read_unit
from tests import medical_files

TAXONOMY = taxonomy.load()
LABELS = ("cyst", "polyp", "ulcer")
THEMES: tuple[dict[str, str], ...] = (
    {},
    {"cyst": "adenomatous polyp"},
    {"polyp": "kidney", "cyst": "left kidney"},
    {"ulcer": "Cyst"},
)
"""Names that stand for the set's labels: kinds, parts and other spellings of each other."""
KINDS = {
    "polyp": {"adenomatous polyp"},
    "kidney": {"left kidney"},
    "Cyst": {"cyst"},
    "cyst": {"Cyst"},
}
CHINESE = {
    "cyst": "囊肿", "polyp": "息肉", "ulcer": "溃疡", "adenomatous polyp": "腺瘤性息肉",
    "kidney": "肾脏", "left kidney": "左肾",
}  # fmt: skip
SIDE = 24
MAKE = MakeOptions(
    caption=0, region_caption=0, instruction=0, dialogue=2, perception=9, text_single=0, text_multi=0,
    chinese=0.3, dialogue_turns=(9, 9),
)  # fmt: skip
Truth = dict[str, Counter[str]]
"""Image -> label -> number of its regions."""


def draw_set(
    rng: random.Random, root: Path
) -> tuple[Truth, dict[str, list[tuple[str, list[int]]]]]:
    """Write up to four images and return what is in each: at most four objects that don't touch."""
    truth: Truth = {}
    objects: dict[str, list[tuple[str, list[int]]]] = {}
    for number in range(rng.randint(1, 4)):
        name = f"i{number}.png"
        (root / "images").mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / name)
        corners = rng.sample([(1, 1), (13, 1), (1, 13), (13, 13)], rng.randint(1, 4))
        objects[name] = [
            (rng.choice(LABELS), [x, y, x + rng.randint(1, 9), y + rng.randint(1, 9)])
            for x, y in corners
        ]
        truth[name] = Counter(label for label, _ in objects[name])
    return truth, objects


def table_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    truth, objects = draw_set(rng, root)
    rows = [
        [f"images/{n}", label, *map(str, box)] for n, of in objects.items() for label, box in of
    ]
    for _ in range(rng.randint(0, 3)):
        row = rng.choice(rows)
        match rng.randint(0, 3):
            case 0:
                row[rng.randrange(len(row))] = ""
            case 1:
                row[rng.randrange(len(row))] += ", giant"
            case 2 if len(row) == 6:
                row[rng.randrange(2, 6)] = rng.choice(["x", "-7", "900", "nan"])
            case _:
                row.pop()
    lines = ["file,label,x1,y1,x2,y2", *map(",".join, rows)]
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    box = {key: key for key in ("x1", "y1", "x2", "y2")}
    keys = {"table": "t.csv", "image": "file", "label": "label", "box": box}
    return truth, keys | {"negatives": True}


def coco_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    truth, objects = draw_set(rng, root)
    names = list(objects)
    entries = [
        {"id": 1, "image_id": names.index(name), "category_id": LABELS.index(label),
         "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for name, of in objects.items() for label, (x1, y1, x2, y2) in of
    ]  # fmt: skip
    images: list[Any] = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    for _ in range(rng.randint(0, 3)):
        entry = rng.choice(entries)
        if not isinstance(entry["image_id"], int):
            continue
        damage = [{"bbox": None}, {"bbox": [0, 0, 99, 9]}, {"bbox": [0, 0, 0, 4]}, {"category_id": 9},
                  {"iscrowd": 1}, {"image_id": None}, {"image_id": str(entry["image_id"])}]  # fmt: skip
        entry.update(rng.choice(damage))
        if rng.random() < 0.2:
            images.append(rng.choice(images) | rng.choice([{}, {"id": 99}]))
    content = {
        "images": images,
        "annotations": entries,
        "categories": [{"id": n, "name": label} for n, label in enumerate(LABELS)],
    }
    (root / "c.json").write_text(json.dumps(content))
    return truth, {"annotations": "c.json", "images": "images", "negatives": True}


def yolo_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    truth, objects = draw_set(rng, root)
    (root / "labels").mkdir()
    for name, of in objects.items():
        lines = []
        for label, (x1, y1, x2, y2) in of:
            numbers = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            lines.append([str(LABELS.index(label)), *(f"{value / SIDE:.6f}" for value in numbers)])
        if rng.random() < 0.5:
            line = rng.choice(lines)
            line[rng.randrange(5)] = rng.choice(["x", "7", "-1", "", "1 1"])
        if rng.random() < 0.9:
            (root / "labels" / f"{name[:-4]}.txt").write_text("\n".join(map(" ".join, lines)))
    return truth, {"names": LABELS, "negatives": True}


def mask_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    """A file for each label; some are missing, damaged, of another size, or hold a speck."""
    truth, objects = draw_set(rng, root)
    (root / "masks").mkdir()
    for name, of in objects.items():
        for label in LABELS:
            mask = np.zeros((SIDE, SIDE), np.uint8)
            for other, (x1, y1, x2, y2) in of:
                mask[y1:y2, x1:x2] = 255 if other == label else mask[y1:y2, x1:x2]
            path = root / "masks" / f"{name[:-4]}_{label}.png"
            damage = rng.random()
            if damage < 0.2 or (damage < 0.3 and not mask.any()):
                continue
            Image.fromarray(mask if damage < 0.9 else mask[:-1]).save(path)
            if damage > 0.97:
                path.write_bytes(path.read_bytes()[:60])
    keys = {"images": "images/{case}.png", "masks": "masks/{case}_{label}.png"}
    return truth, keys | {"clean": {"min_area_pixels": rng.choice([0, 12])}}


def volume_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    """Label maps of two cases, in which some labels are left out, too small, or on another grid."""
    truth: Truth = {}
    for case in ("a", "b"):
        labels = np.zeros((SIDE, SIDE, 4), np.uint8)
        for x, y in ((1, 1), (13, 1), (1, 13)):
            first = rng.randint(0, 2)
            width, height, last = rng.randint(2, 9), rng.randint(2, 9), rng.randint(first + 1, 4)
            labels[x : x + width, y : y + height, first:last] = rng.randint(1, 3)
        for index in range(4):
            found = {LABELS[value - 1] for value in np.unique(labels[..., index]) if value}
            truth[f"{case}#{index}"] = Counter(found)
        if rng.random() < 0.5:
            labels[labels == rng.randint(1, 3)] = 0  # nobody has annotated it in this case
        noise = np.random.default_rng(ord(case)).normal(size=labels.shape).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), root / f"{case}.nii")
        affine = np.diag([1, 1, 2.0, 1]) if rng.random() < 0.1 else np.eye(4)
        nibabel.save(nibabel.Nifti1Image(labels, affine), root / f"{case}_seg.nii")
    codes = {str(number): label for number, label in enumerate(LABELS, 1)}
    rules = {"min_voxels": rng.choice([0, 30]), "min_area_pixels": rng.choice([0, 12])}
    keys = {"images": "{case}.nii", "masks": "{case}_seg.nii", "labels": codes, "clean": rules}
    return truth, keys | {"slices": {"axes": ["z"], "keep": "all"}, "modality": "MR"}


def labelme_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    """Shapes of which some are no regions, or lie outside; a region of two shapes is one by its group."""
    truth, objects = draw_set(rng, root)
    for name, of in objects.items():
        shapes: list[dict[str, Any]] = []
        for group, (label, (x1, y1, x2, y2)) in enumerate(of):
            parts = [[x1, y1, x2, y2]]
            if rng.random() < 0.3 and x2 - x1 > 3:
                parts = [[x1, y1, x1 + 1, y2], [x2 - 1, y1, x2, y2]]
            for a, b, c, d in parts:
                shape = {"label": label, "points": [[a, b], [c, d]], "shape_type": "rectangle"}
                shapes.append({**shape, "group_id": group if len(parts) > 1 else None})
        for _ in range(rng.randint(0, 2)):
            outside: dict[str, Any] = {"points": [[0, 0], [99, 99]]}
            damage = [{"shape_type": "point"}, outside, {"label": ""}, {"points": None}]
            rng.choice(shapes).update(rng.choice(damage))
        content = {"shapes": shapes, "imagePath": f"images/{name}", "flags": {}}
        (root / f"{name[:-4]}.json").write_text(json.dumps(content))
    return truth, {"regions": "boxes", "negatives": True}


def voc_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    """Objects without a name, with swapped corners, difficult ones that are left out, parts of objects."""
    truth, objects = draw_set(rng, root)
    (root / "xml").mkdir()
    for name, of in objects.items():
        text = ""
        for label, box in of:
            said, difficult, part = label, 0, ""
            match rng.randint(0, 9):
                case 0:
                    said = ""
                case 1:
                    box = [box[2], box[1], box[0], box[3]]
                case 2:
                    difficult = 1
                case 3:
                    said, part = LABELS[0], f"<part><name>{label}</name></part>"
            sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            corners = "".join(f"<{key}>{value}</{key}>" for key, value in sides)
            if part:  # the part is what is drawn; its object isn't there
                truth[name][LABELS[0]] += 1
            text += f"<object><name>{said}</name><difficult>{difficult}</difficult>{part}"
            text += f"<bndbox>{corners}</bndbox></object>"
        xml = f"<annotation><filename>{name}</filename>{text}</annotation>"
        (root / "xml" / f"{name[:-4]}.xml").write_text(xml)
    return truth, {"annotations": "xml", "images": "images", "difficult": False, "negatives": True}


def dicom_set(rng: random.Random, root: Path) -> tuple[Truth, dict[str, Any]]:
    """Series of two cases; label maps are cut out, shifted, missing, or lack a label."""
    truth: Truth = {}
    for case in ("a", "b"):
        (root / case).mkdir()
        labels = np.zeros((SIDE, SIDE, 4), np.uint8)
        for x, y in ((1, 1), (13, 1), (1, 13)):
            first = rng.randint(0, 2)
            labels[x : x + 8, y : y + 8, first : rng.randint(first + 1, 4)] = rng.randint(1, 3)
        for index in range(4):
            noise = np.random.default_rng(index).integers(-900, 900, (SIDE, SIDE)).astype(np.int16)
            data = medical_files.dicom(noise, series=f"1.{ord(case)}", position=(0, 0, index))
            medical_files.save(data, root / case / f"{index}.dcm")
            found = {LABELS[value - 1] for value in np.unique(labels[..., index]) if value}
            truth[f"{case}#{index}"] = Counter(found)
        if rng.random() < 0.3:
            labels[labels == rng.randint(1, 3)] = 0
        first = rng.choice([0, 0, 0, 1, 2])
        origin = [0, 0, first + rng.choice([0, 0, 0, 0.5])]
        header = {"space": "left-posterior-superior", "space directions": np.eye(3)}
        if rng.random() < 0.9:
            nrrd.write(
                str(root / case / "m.nrrd"), labels[..., first:], header | {"space origin": origin}
            )
    codes = {str(number): label for number, label in enumerate(LABELS, 1)}
    keys = {"masks": "{case}/m.nrrd", "labels": codes, "slices": {"axes": ["z"], "keep": "all"}}
    return truth, keys


SETS = {"labelme": labelme_set, "voc": voc_set, "dicom": dicom_set, "table": table_set}
SETS |= {"coco": coco_set, "yolo": yolo_set, "masks": mask_set, "volume": volume_set}
SLICED = ("volume", "dicom")  # whose objects a slice cuts


def key_of(record: Any) -> str:
    part = record.provenance.part
    name = Path(record.provenance.file)
    case = name.parent.name or name.stem  # of a series its folder
    return f"{case}#{part['slice']}" if part else name.name


def named_in(text: str, names: Iterable[str]) -> set[str]:
    """Labels that a text names, in either language; "polyp" isn't named by "adenomatous polyp"."""
    found = set()
    said = [(word, name) for name in names for word in (name, CHINESE.get(name)) if word]
    for word, name in sorted(said, key=lambda pair: -len(pair[0])):
        if word in text:
            found.add(name)
            text = text.replace(word, "")
    return found


def check_questions(reader: str, seed: int) -> Counter[str]:
    """Read one damaged set, ask everything that can be asked, and hold it against the undamaged one."""
    asked: Counter[str] = Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        truth, keys = SETS[reader](rng, root)
        theme = dict(zip(LABELS, LABELS, strict=True)) | rng.choice(THEMES)
        names = tuple(sorted(theme.values()))
        codes = keys.get("labels", {label: label for label in LABELS})
        keys["labels"] = {code: theme[label] for code, label in codes.items()}
        base = {"name": "s", "licence": "x", "reader": reader, "root": root, "department": "None"}
        base["anonymous_names"] = False
        defaults = {"modality": "CT", "clean": "none"}
        module = readers.load(reader)
        options = module.Options.model_validate(base | defaults | keys)
        said = names if options.negatives else ()
        context = SourceContext("s", "S", names, chinese=CHINESE, known=said, by_image=not said)
        for unit in module.units(options):
            for record in read_unit(options, unit, folder=root / "out", taxonomy=TAXONOMY).records:
                own = {theme[label]: count for label, count in truth[key_of(record)].items()}
                counts = {n: sum(own.get(k, 0) for k in {n, *KINDS.get(n, ())}) for n in names}
                inside = +Counter(counts)
                for item in forms.plan(record, context, MAKE, seed=seed):
                    made = forms.write(Task(item, record, context), TAXONOMY)
                    question, answer = made[0].text, made[1].text
                    named = named_in(question, names)
                    asked[item.kind] += 1
                    if item.kind == "yes_no" and answer in ("No", "否"):
                        assert not named & set(inside), (record, question)
                    elif item.kind == "multiple_choice":
                        lines = [line for line in question.splitlines() if line[1:3] == ". "]
                        wrong = "|".join(line[3:] for line in lines if line[0] != answer)
                        assert not named_in(wrong, names) & set(inside), (record, question)
                    elif item.kind in ("counting", "detection") and reader not in SLICED:
                        count = answer.count("[") if item.kind == "detection" else int(answer)
                        assert [inside[label] for label in named] == [count], (record, made)
    return asked


@pytest.mark.parametrize("reader", SETS)
def test_no_question_says_what_the_undamaged_set_denies(reader):
    asked: Counter[str] = Counter()
    for seed in range(int(os.environ.get("GMAI_DAMAGED_SETS", "60"))):
        asked += check_questions(reader, seed)
    assert {"counting", "yes_no"} <= asked.keys()  # the interesting questions were asked
