# SPDX-License-Identifier: Apache-2.0

"""Every example job runs, and its corpus holds what its data holds."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_tools import generate
from data_tools.items import FORMS
from data_tools.readers import READERS

JOBS = Path(__file__).resolve().parents[2] / "examples" / "jobs"


def load_make_data() -> Any:
    specification = importlib.util.spec_from_file_location("make_data", JOBS / "make_data.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    import sys

    sys.modules["make_data"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make_data.py`` writes."""
    folder = tmp_path_factory.mktemp("example_data")
    load_make_data().main([str(folder)])
    return folder


def run(job: Path, output: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the records of a job."""
    assert generate.main([str(job), "--output", str(output)]) == 0
    records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    return json.loads((output / "summary.json").read_text()), records


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_there_is_a_job_for_every_reader() -> None:
    shown = {path.stem for path in JOBS.glob("*.yaml")} - {"quickstart"}
    assert shown == set(READERS)
    for path in JOBS.glob("*.yaml"):
        sources = yaml.safe_load(path.read_text(encoding="utf-8"))["sources"]
        assert all(source["licence"] and source["dataset"] for source in sources), path.name
        if path.stem in READERS:
            assert {source["reader"] for source in sources} == {path.stem}


def run_example(name: str, example_data: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The records of an example job over the data in ``example_data``."""
    job = yaml.safe_load((JOBS / f"{name}.yaml").read_text(encoding="utf-8"))
    for source in job["sources"]:
        source["anonymous_names"] = False  # records are found by their files
        if not source["root"].startswith("package:"):
            source["root"] = str(example_data / name)
        if "table" in source:
            source["table"] = str(JOBS / source["table"])
    job["workers"] = 1
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    _, records = run(tmp_path / "job.yaml", tmp_path / "corpus")
    assert (tmp_path / "corpus" / "report.html").is_file()
    return records


def named(records: list[dict[str, Any]]) -> Counter[tuple[str, bool]]:
    """How often each label is there, with a box or without."""
    return Counter(
        (label["name"], bool(label.get("box"))) for record in records for label in record["labels"]
    )


@pytest.mark.parametrize("name", ["coco", "voc", "yolo", "masks", "labelme", "arrays"])
def test_six_formats_say_the_same(name: str, example_data: Path, tmp_path: Path) -> None:
    expected = {tile.name: sorted(tile.boxes()) for tile in load_make_data().tiles()}
    assert sum(map(bool, expected.values())) == 15  # one tile of sixteen has no stained region
    records = run_example(name, example_data, tmp_path)
    found = {
        Path(record["provenance"]["file"]).stem: sorted(tuple(box) for box in record["bbox"])
        for record in records
    }
    assert found == {tile: boxes for tile, boxes in expected.items() if boxes}


def test_a_slides_regions_are_those_of_its_mask(example_data: Path, tmp_path: Path) -> None:
    from scipy import ndimage

    data = load_make_data()
    mask = data.stain(data.section())
    records = run_example("slide", example_data, tmp_path)
    assert len(records) == 14  # two tiles of sixteen are glass
    for record in records:
        x, y = (record["provenance"]["part"][key] for key in ("x", "y"))
        numbers, count = ndimage.label(mask[y : y + 128, x : x + 128], np.ones((3, 3)))
        boxes = [
            [columns.start, rows.start, columns.stop, rows.stop]
            for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1)
            if (numbers == number).sum() >= 100 / 256**2 * 128**2
        ]
        assert sorted(record["bbox"]) == sorted(boxes)
        assert count >= len(boxes) > 0


@pytest.mark.parametrize(
    ("name", "cases"), [("volume", 1), ("decathlon", 2), ("nnunet", 2), ("dicom", 1)]
)
def test_a_volumes_boxes_are_those_of_its_label_map(
    name: str, cases: int, example_data: Path, tmp_path: Path
) -> None:
    records = run_example(name, example_data, tmp_path)
    records = [record for record in records if "slice" in record["provenance"]["part"]]
    assert len(records) == 6 * cases
    _, head = load_make_data().brain()
    import nibabel

    image = nibabel.Nifti1Image(head, load_make_data().brain()[0].affine)
    canonical = np.asarray(nibabel.as_closest_canonical(image).dataobj)
    for record in records:
        # As radiologists see it: the patient's right on the left, front on top.
        plane = canonical[::-1, ::-1, int(record["provenance"]["part"]["slice"])].T
        rows, columns = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
        whole = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert whole in record["bbox"] or len(record["bbox"]) > 1
        assert named([record])[("head", True)] == len(record["bbox"])


COUNTS: dict[str, tuple[int, dict[tuple[str, bool], int]]] = {
    "image_folder": (12, {("FHL2-positive tissue", False): 8, ("FHL2-negative tissue", False): 4}),
    # 30 frames in one second, one every fifth of it
    "video": (5, {("heart", False): 5}),
    "table": (
        6,
        {
            ("vertebra", True): 1,
            ("head", False): 2,
            ("kidney", True): 2,
            ("whole body", False): 1,
            ("lymph node", False): 1,
        },
    ),
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_other_examples(name: str, example_data: Path, tmp_path: Path) -> None:
    records = run_example(name, example_data, tmp_path)
    assert (len(records), dict(named(records))) == COUNTS[name]


def test_the_quickstart_makes_all_forms_in_both_languages(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    _, records = run(JOBS / "quickstart.yaml", corpus)
    # retina, microaneurysms; glands; cell; two head CT, spine CT, abdominal MR, bone scan, lymph node; and
    # every third of 24 slices
    assert len(records) == 10 + 8
    assert {record["modality"] for record in records} == {
        "Fundus photography", "Pathology", "Microscopy", "CT", "MR", "Scintigraphy", "Ultrasound",
    }  # fmt: skip
    boxes = Counter(
        label["name"] for record in records for label in record["labels"] if label.get("box")
    )
    assert boxes == {
        "optic disc": 1, "macula": 1, "colonic gland": 3, "cell": 1, "vertebra": 1, "kidney": 2,
    }  # fmt: skip
    made = [
        line
        for part in (corpus, corpus / "held_out")
        for name in ("caption", "instruct", "percept", "text_single", "text_multi")
        if (part / f"{name}.jsonl").is_file()
        for line in lines(part / f"{name}.jsonl")
    ]
    forms = Counter(form for form in FORMS for line in made if f"#{form}" in line["id"])
    assert set(forms) == set(FORMS)
    texts = " ".join(turn["value"] for line in made for turn in line["conversations"])
    assert "视盘" in texts or "肾脏" in texts or "结肠腺体" in texts
    assert (corpus / "report.html").stat().st_size > 10_000
    assert (corpus / "mixture.yaml").is_file()


def test_boxes_of_the_quickstart_lie_on_what_they_name() -> None:
    """Facts of the pictures, held against the boxes: bright disc, dark macula, stained glands."""
    import csv

    import skimage
    from PIL import Image
    from skimage.color import rgb2hed

    rows: dict[str, list[dict[str, str]]] = {}
    for table in ("skimage", "histology", "microscopy"):
        with (JOBS / "data" / f"{table}.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault(row["finding"], []).append(row)

    def part(row: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        with Image.open(Path(skimage.__file__).parent / "data" / row["file"]) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
        x1, y1, x2, y2 = (int(row[key]) for key in ("x1", "y1", "x2", "y2"))
        assert 0 <= x1 < x2 <= pixels.shape[1]
        assert 0 <= y1 < y2 <= pixels.shape[0]
        return pixels, pixels[y1:y2, x1:x2]

    whole, disc = part(rows["optic disc"][0])
    assert disc[:, :, 1].max() == whole[:, 100:, 1].max()
    whole, macula = part(rows["macula"][0])
    middle = macula[70:150, 70:150].mean()
    assert middle < macula.mean() < whole[whole.max(axis=2) > 40].mean()
    for row in rows["colonic gland"]:
        pixels, _ = part(row)
        brown = rgb2hed(pixels.astype(np.uint8))[:, :, 2]
        x1, y1, x2, y2 = (int(row[key]) for key in ("x1", "y1", "x2", "y2"))
        assert brown[y1:y2, x1:x2].mean() > brown.mean()
    whole, cell = part(rows["cell"][0])
    bright = np.argwhere(whole[:, :, 0] > 150)
    assert cell[:, :, 0].mean() > 2 * whole[:, :, 0].mean()
    x1, y1, x2, y2 = (int(rows["cell"][0][key]) for key in ("x1", "y1", "x2", "y2"))
    assert ((bright >= (y1, x1)) & (bright < (y2, x2))).all()
