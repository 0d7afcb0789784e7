# SPDX-License-Identifier: Apache-2.0

"""Jobs over published sets, each counted here by other means; skipped where the sample data is not at hand.

Boxes are held against scipy's components, files against the sets' own lists.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy import ndimage

from data_tools import readers, taxonomy
from data_tools.records import Record
from data_tools.standardise import read_unit

CUT = 100 / 256**2  # of the picture's area, SA-Med2D-20M


def read(root: Path, folder: Path, reader: str, **keys: Any) -> tuple[list[Record], Counter[str]]:
    """Records of a source, and how often each reason left something out."""
    base = {"name": reader, "reader": reader, "root": root, "licence": "MIT", "department": "None"}
    base["anonymous_names"] = False
    module = readers.load(reader)
    options = module.Options.model_validate(base | keys)
    terms = taxonomy.load()
    records: list[Record] = []
    reasons: Counter[str] = Counter()
    for unit in module.units(options):
        result = read_unit(options, unit, folder=folder, taxonomy=terms)
        records += result.records
        reasons.update(drop.reason for drop in result.drops)
    return records, reasons


def boxes_of(mask: np.ndarray, *, cut: float = CUT) -> list[tuple[int, int, int, int]]:
    """Boxes of the 8-connected components that are large enough, sorted."""
    numbers, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(numbers.ravel(), minlength=count + 1)
    found = ndimage.find_objects(numbers)
    return sorted(
        (x.start, y.start, x.stop, y.stop)
        for number, (y, x) in enumerate(found, 1)
        if areas[number] >= cut * mask.size
    )


def boxes_in(record: Record, name: str) -> list[tuple[int, int, int, int]]:
    return sorted(label.box for label in record.labels if label.name == name and label.box)


def test_bccd_blood_cells(shared_data: Path, tmp_path: Path) -> None:
    names = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}
    records, reasons = read(
        shared_data / "bccd_voc", tmp_path, "voc", modality="Microscopy", labels=names, clean="none"
    )
    assert len(records) == 25
    expected: Counter[str] = Counter()
    wrong = 0
    for path in (shared_data / "bccd_voc").rglob("*.xml"):
        for found in ElementTree.parse(path).getroot().iter("object"):
            box = [
                int(found.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
            ]
            whole = 0 <= box[0] < box[2] <= 640 and 0 <= box[1] < box[3] <= 480
            wrong += not whole
            expected[names[found.findtext("name", "")]] += whole
    assert Counter(label.name for record in records for label in record.labels) == expected
    assert sum(expected.values()) + wrong == 323 + 31 + 22  # SOURCES.md
    assert wrong == reasons["box of no size"] + reasons["box outside the image"]
    assert reasons["box of no size"] == 2


def test_hannover_chest_radiographs(shared_data: Path, tmp_path: Path) -> None:
    records, reasons = read(
        shared_data / "hannover_cxr",
        tmp_path,
        "table",
        table="data.csv",
        image="png/{image_id}.png",
        label="projection",
        labels={"ap": "anteroposterior projection", "pa": "posteroanterior projection"},
        group_column="patient_id",
        modality_column="modality",
    )
    assert not reasons
    assert len(records) == 40
    assert {record.modality for record in records} == {"X-ray"}
    assert Counter(name for record in records for name in record.names) == {
        "anteroposterior projection": 20,
        "posteroanterior projection": 20,
    }
    with (shared_data / "hannover_cxr/data.csv").open(encoding="utf-8") as file:
        patient = {row["image_id"]: row["patient_id"] for row in csv.DictReader(file)}
    assert len(set(patient.values())) == 26
    for record in records:
        assert record.provenance.group.endswith(patient[Path(record.provenance.file).stem])


def test_membranes_of_electron_microscopy(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "em_membrane_masks"
    records, _ = read(
        root,
        tmp_path,
        "masks",
        images="image/{case}.png",
        masks="label/{case}.png",
        label="cell interior",
        foreground=255,
        modality="Electron microscopy",
    )
    assert len(records) == 10
    for record in records:
        with Image.open(root / "label" / Path(record.provenance.file).name) as picture:
            mask = np.asarray(picture) == 255
        assert boxes_in(record, "cell interior") == boxes_of(mask)
        assert len(boxes_of(mask)) > 5


def test_axons_and_myelin_are_two_masks_of_a_picture(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "sem_axon_bids"
    records, _ = read(
        root,
        tmp_path,
        "masks",
        images="{folder:path}/{case}_SEM.png",
        masks="derivatives/labels/{folder:path}/{case}_SEM_seg-{label}-manual.png",
        foreground=">127",  # some of the published masks are not quite binary: 0, 130, 233, 255
        modality="Electron microscopy",
        clean="none",
    )
    assert len(records) == 5
    assert len({record.image for record in records}) == 4  # run-1 and run-2 are the same bytes
    for record in records:
        for name in ("axon", "myelin"):
            file = record.provenance.file.replace(".png", f"_seg-{name}-manual.png")
            with Image.open(root / "derivatives/labels" / file) as picture:
                mask = np.asarray(picture) > 127
            assert boxes_in(record, name) == boxes_of(mask, cut=0)


def test_every_pixel_format_is_stored(shared_data: Path, tmp_path: Path) -> None:
    records, reasons = read(
        shared_data / "sem_pixel_formats",
        tmp_path,
        "image_folder",
        modality="Electron microscopy",
    )
    assert len(records) == 14
    assert {Path(record.image).suffix for record in records} == {".png"}
    for record in records:
        with Image.open(tmp_path / record.image) as picture:
            assert picture.mode in ("L", "RGB")
            assert picture.size == (record.width, record.height)
            assert picture.size in {(256, 256), (278, 266)}
    assert all("image" not in reason or "no" in reason for reason in reasons)
