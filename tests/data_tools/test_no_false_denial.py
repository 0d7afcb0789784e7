# SPDX-License-Identifier: Apache-2.0

"""Whatever is damaged, no text denies, counts or offers as wrong what the undamaged set has in the image.

Random sets, random damage, and the questions that are then asked. ``GMAI_DAMAGED_SETS=20000 pytest -m slow``
on this file tries as many sets of each kind; the fast run tries few.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import forms, readers, taxonomy
from data_tools.forms import MakeOptions
from data_tools.items import SourceContext, Task
from data_tools.standardise import read_unit

TAXONOMY = taxonomy.load()
LABELS = ("cyst", "polyp", "ulcer")
SIDE = 24
MAKE = MakeOptions(
    caption=0, region_caption=0, instruction=0, dialogue=2, perception=9, text_single=0, text_multi=0,
    chinese=0, dialogue_turns=(9, 9),
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
        entry = rng.choice(
            [entry for entry in entries if isinstance(entry["image_id"], int)] or [{}]
        )
        if not entry:
            break
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
            box = np.s_[
                x : x + rng.randint(2, 9),
                y : y + rng.randint(2, 9),
                first : rng.randint(first + 1, 4),
            ]
            labels[box] = rng.randint(1, 3)
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


SETS = {
    "table": table_set,
    "coco": coco_set,
    "yolo": yolo_set,
    "masks": mask_set,
    "volume": volume_set,
}


def key_of(record: Any) -> str:
    part = record.provenance.part
    name = Path(record.provenance.file)
    return f"{name.stem}#{part['slice']}" if part else name.name


def check_questions(reader: str, seed: int) -> Counter[str]:
    """Read one damaged set, ask everything that can be asked, and hold it against the undamaged one."""
    asked: Counter[str] = Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        truth, keys = SETS[reader](rng, root)
        base = {"name": "s", "licence": "x", "reader": reader, "root": root, "department": "None"}
        base["anonymous_names"] = False
        defaults = {"modality": "CT", "clean": "none"}
        module = readers.load(reader)
        options = module.Options.model_validate(base | defaults | keys)
        said = LABELS if options.negatives else ()
        context = SourceContext("s", "S", LABELS, known=said, by_image=not said)
        for unit in module.units(options):
            for record in read_unit(options, unit, folder=root / "out", taxonomy=TAXONOMY).records:
                inside = truth[key_of(record)]
                for item in forms.plan(record, context, MAKE, seed=seed):
                    made = forms.write(Task(item, record, context), TAXONOMY)
                    question, answer = made[0].text, made[1].text
                    named = {label for label in LABELS if label in question}
                    asked[item.kind] += 1
                    if item.kind == "yes_no" and answer.startswith("No"):
                        assert not named & set(inside), (record, question)
                    elif item.kind == "multiple_choice":
                        wrong = [line for line in question.splitlines() if line[1:3] == ". "]
                        wrong = [line[3:] for line in wrong if line[0] != answer]
                        assert not set(wrong) & set(inside), (record, question)
                    elif item.kind == "counting" and reader != "volume":
                        assert [inside[label] for label in named] == [int(answer)], (record, made)
                    elif item.kind == "detection" and reader != "volume":
                        assert [inside[label] for label in named] == [answer.count("[")], (
                            record,
                            made,
                        )
    return asked


@pytest.mark.parametrize("reader", SETS)
def test_no_question_says_what_the_undamaged_set_denies(reader):
    asked: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def sets(seed):
        asked.update(check_questions(reader, seed))

    sets()
    assert {"counting", "yes_no"} <= asked.keys()  # the interesting questions were asked


@pytest.mark.slow
@pytest.mark.parametrize("reader", SETS)
def test_no_question_says_it_of_thousands_of_sets(reader):
    for seed in range(int(os.environ.get("GMAI_DAMAGED_SETS", "1000"))):
        check_questions(reader, seed)
