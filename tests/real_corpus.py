# SPDX-License-Identifier: Apache-2.0

"""A mixture over all real images of ``../shared/data``, in every record form that the reader takes.

Images that training reads as they are (PNG, JPEG, TIFF, 8 and 16 bit) are used in place; DICOM frames and
NIfTI slices become PNG first, as the corpus tools do it. Answers are true: labels, counts and headers.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from csv import DictReader
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import yaml
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

Record = dict[str, Any]


def llava(name: str, images: str | list[str] | None, *turns: str, system: str = "") -> Record:
    roles = ("human", "gpt")
    messages = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    if system:
        messages.insert(0, {"from": "system", "value": system})
    record: Record = {"id": name, "conversations": messages}
    return record if images is None else {**record, "image": images}


def hannover(data: Path) -> Iterator[Record]:
    with (data / "hannover_cxr" / "data.csv").open(encoding="utf-8") as file:
        for row in DictReader(file):
            yield llava(
                row["image_id"],
                f"{row['image_id']}.png",
                "<image>\nIs this chest radiograph AP or PA?",
                f"It is {row['projection'].upper()}.",
                "Which modality was used?",
                {"CR": "Computed radiography.", "DX": "Digital radiography."}[row["modality"]],
                system="You are a radiologist.",
            )


def blood_cells(data: Path) -> Iterator[Record]:
    for path in sorted((data / "bccd_voc").rglob("*.xml")):
        root = ET.parse(path).getroot()
        names = Counter(node.findtext("name") for node in root.iter("object"))
        counted = ", ".join(f"{number} {name}" for name, number in sorted(names.items()))
        content = [
            {"type": "image_url", "image_url": {"url": f"{path.stem}.jpg"}},
            {"type": "text", "text": "数一数图中的血细胞。"},
        ]
        yield {
            "id": path.stem,
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": f"共有：{counted}。"},
            ],
        }


def membranes(data: Path) -> Iterator[Record]:
    root = data / "em_membrane_masks"
    for image in sorted((root / "image").glob("*.png")):
        yield llava(
            image.stem,
            [f"image/{image.name}", f"label/{image.name}"],
            "First image: <image>\nSecond image: <image>\nHow are they related?",
            "The second marks the inside of the cells of the first; membranes are black.",
        )


def plain_files(root: Path, answer: str) -> Iterator[Record]:
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in {".png", ".tif"}):
        name = path.relative_to(root).as_posix()
        yield llava(name, name, "<image>\nWhat is shown?", answer)


def demo_assets(data: Path) -> Iterator[Record]:
    folder = data / "gmai_vl_samples" / "demo" / "gmai_vl_demo" / "sample_assets"
    for name, prompt in json.loads((folder / "sample_prompts.json").read_text("utf-8")).items():
        yield llava(
            name, prompt["file"], f"<image>\n{prompt['question']}", f"The image is: {name}."
        )


def questions(data: Path) -> Iterator[Record]:
    listed = json.loads((data / "bench_slake_questions" / "test.json").read_text("utf-8"))
    for row in listed[:400]:
        yield llava(
            f"slake-{row['qid']}", None, f"{row['modality']}, {row['location']}: {row['question']}",
            str(row["answer"]),
        )  # fmt: skip


def dicom_frames(data: Path, out: Path) -> Iterator[Record]:
    for path in sorted((data / "dicom_samples").rglob("*")):
        if not path.is_file() or path.name in {"LICENSE", "README.txt"}:
            continue
        try:
            dataset = pydicom.dcmread(path)
            pixels = dataset.pixel_array
        except (pydicom.errors.InvalidDicomError, ValueError, AttributeError, RuntimeError):
            continue  # MR_truncated and no_meta are there to fail
        if dataset.get("SamplesPerPixel", 1) == 1:
            pixels = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset)
        frame = pixels[0] if dataset.get("NumberOfFrames", 1) > 1 else pixels
        frame = np.asarray(frame, dtype=np.float64)
        span = frame.max() - frame.min() or 1.0
        name = f"{path.relative_to(data).as_posix().replace('/', '_')}.png"
        Image.fromarray(((frame - frame.min()) / span * 255).astype(np.uint8)).save(out / name)
        modality = dataset.get("Modality", "unknown")
        yield llava(name, name, "<image>\nWhich modality?", f"{modality}.")


def spleen_slices(data: Path, out: Path) -> Iterator[Record]:
    volumes = sorted((data / "spleen_ct_nifti").rglob("*.nii.gz"), key=lambda p: len(p.parts))
    volume, labels = (nibabel.load(path).get_fdata() for path in volumes)
    for z in range(volume.shape[2]):
        grey = np.clip((volume[:, :, z] + 160) / 400, 0, 1) * 255
        Image.fromarray(grey.T.astype(np.uint8)).save(out / f"spleen_{z:03d}.png")
        seen = "The spleen is visible." if labels[:, :, z].any() else "No spleen is visible."
        yield llava(f"spleen-{z}", f"spleen_{z:03d}.png", "<image>\nIs the spleen visible?", seen)


def write_mixture(data: Path, out: Path) -> Path:
    """Write annotations and ``mixture.yaml`` into ``out``; ``data`` is only read."""
    (out / "frames").mkdir(parents=True)
    sets: dict[str, tuple[Iterator[Record], Path | None, str]] = {
        "hannover": (hannover(data), data / "hannover_cxr" / "png", "json"),
        "bccd": (blood_cells(data), data / "bccd_voc" / "BCCD" / "JPEGImages", "jsonl"),
        "membranes": (membranes(data), data / "em_membrane_masks", "parquet"),
        "pixel-formats": (
            plain_files(data / "sem_pixel_formats", "An electron micrograph of nerve fibres."),
            data / "sem_pixel_formats",
            "jsonl",
        ),
        "axons": (
            plain_files(data / "sem_axon_bids", "Axons and myelin."),
            data / "sem_axon_bids",
            "jsonl",
        ),
        "demo-assets": (
            demo_assets(data),
            data / "gmai_vl_samples" / "demo" / "gmai_vl_demo" / "sample_assets",
            "json",
        ),
        "dicom": (dicom_frames(data, out / "frames"), out / "frames", "jsonl"),
        "spleen": (spleen_slices(data, out / "frames"), out / "frames", "jsonl"),
        "slake-text": (questions(data), None, "jsonl"),
    }
    for candidate in (data / "bccd_voc").rglob("JPEGImages"):
        sets["bccd"] = (sets["bccd"][0], candidate, "jsonl")
    datasets: dict[str, Any] = {
        "authors-example": {
            "annotations": str(data / "gmai_vl_samples" / "examples" / "example_data.json"),
            "image_root": str(data / "gmai_vl_samples" / "examples"),
            "category": "Medical Captioning",
            "quality": "high",
            "ratio": 2.5,
        }
    }
    for name, (records, root, form) in sets.items():
        rows = list(records)
        assert rows, f"no record of {name}: does the folder still look as it did?"
        path = out / f"{name}.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif form == "json":
            path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8")
        text = root is None
        datasets[name] = {
            "annotations": path.name,
            **({} if text else {"image_root": str(root)}),
            "category": "Medical Text" if text else "Medical Instruction",
            "quality": "high",
            # As in Table 7, text alone belongs to stage 3.
            "ratio": {"stage1": 0.0, "stage2": 0.0, "stage3": 1.0} if text else 1.0,
        }
    mixture = out / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"datasets": datasets}, sort_keys=False), encoding="utf-8")
    return mixture
