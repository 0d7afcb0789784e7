# SPDX-License-Identifier: Apache-2.0

"""Small benchmarks in the files their authors ship."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gmai_xtuner.evaluate.benchmarks import built_in, choose_protocol
from gmai_xtuner.evaluate.protocols import Protocol


def find_protocol(
    name: str, protocol: str | None = None, *, variant: str | None = None
) -> Protocol:
    """Return a protocol of a built-in benchmark; by default the first of its first variant."""
    found = built_in()[name]
    first = found.variants[0] if protocol is None else None
    return choose_protocol(found.asked(), protocol, variant=variant or first)


def png(grey: int) -> bytes:
    """A small image, each shade another file."""
    buffer = io.BytesIO()
    Image.new("L", (4, 3), grey).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(grey: int) -> str:
    """The same as text, longer than an index."""
    return base64.b64encode(png(grey)).decode()


def image_file(path: Path, grey: int = 0) -> Path:
    """Write an image with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grey))
    return path


def json_file(path: Path, records: object) -> Path:
    """Write a JSON file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def jsonl_file(path: Path, records: Sequence[object]) -> Path:
    """Write a file of JSON lines with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def csv_file(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write a CSV file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def tsv_file(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write a table as pandas does: quoted where tab, quote or line end stands in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([header, *rows])
    return path


def parquet_file(path: Path, rows: Sequence[dict[str, Any]], *, row_group_size: int = 2) -> Path:
    """Write a Parquet file as the hub does, several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    return path


def vqa_rad_record(qid: int, phrase_type: str = "test_freeform", **changes: Any) -> dict[str, Any]:
    return {
        "qid": qid,
        "phrase_type": phrase_type,
        "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=48e1dd0e",
        "image_name": "synpic54610.jpg",
        "image_organ": "HEAD",
        "evaluation": "not evaluated",
        "question": "Are regions of the brain infarcted?",
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": "Yes",
        "answer_type": "CLOSED",
        **changes,
    }


def slake_record(qid: int, lang: str = "en", **changes: Any) -> dict[str, Any]:
    return {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "What modality is used to take this image?",
        "answer": "MRI",
        "q_lang": lang,
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Modality",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
        **changes,
    }


def omnimedvqa_record(question_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": "ACRIMA",
        "question_id": question_id,
        "question_type": "Modality Recognition",
        "question": "What imaging technique was employed?",
        "gt_answer": "Fundus imaging",
        "image_path": "Images/ACRIMA/Im553_g_ACRIMA.png",
        "option_A": "PET scan",
        "option_B": "CT scan",
        "option_C": "Blood test",
        "option_D": "Fundus imaging",
        "modality_type": "Fundus Photography",
        **changes,
    }


def medxpertqa_record(identifier: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": identifier,
        "question": "What is it?\nAnswer Choices: (A) option A (B) option B",
        "options": {letter: f"option {letter}" for letter in "ABCDE"},
        "label": "B",
        "images": [f"{identifier}-a.jpeg"],
        "medical_task": "Diagnosis",
        "body_system": "Skeletal",
        "question_type": "Reasoning",
        **changes,
    }


def huatuo_record(**changes: Any) -> dict[str, Any]:
    return {
        "question": "Is there a fracture?",
        "options": ["yes", "no"],
        "answer": "no",
        "image": ["images/synpic1.jpg"],
        "dataset": "VQA-RAD_test",
        "subset": "",
        "question_type": "closed",
        **changes,
    }


GMAI_HEADER = (
    *("index", "image", "question", "A", "B", "C", "D", "E", "answer", "category"),
    *("clinical VQA task", "department", "perceptual granularity", "modality"),
)


def gmai_row(index: int, grey: int = 0, **changes: str) -> list[str]:
    """A row in the order of :data:`GMAI_HEADER`."""
    values = {
        "index": str(index),
        "image": base64_png(grey),
        "question": "Which disease does this image show?",
        "A": "MR",
        "B": "MR angiography",
        "C": "None",
        "D": "NA",
        "E": "",
        "answer": "B",
        "category": "MR angiography",
        "clinical VQA task": "Disease Diagnosis",
        "department": "Ophthalmology",
        "perceptual granularity": "Image level",
        "modality": "Fundus photography",
        **changes,
    }
    return [values[name] for name in GMAI_HEADER]


def gmai_test_part(folder: Path, part: int, *indices: int, **changes: str) -> Path:
    """Write a part of TEST, whose answers the authors keep."""
    answer = GMAI_HEADER.index("answer")
    header, *rows = (
        [*row[:answer], *row[answer + 1 :]]
        for row in (GMAI_HEADER, *(gmai_row(index, index, **changes) for index in indices))
    )
    return tsv_file(folder / f"GMAI_mm_bench_TEST_part_{part}.tsv", header, rows)


SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)


def mmmu_row(part: str, subject: str, number: int, **changes: Any) -> dict[str, Any]:
    """A row of the hub's Parquet files."""
    return {
        "id": f"{part}_{subject}_{number}",
        "question": "<image 1> What is shown?",
        "options": "['Liver', 'Lung', \"Crohn's disease\", 'None']",
        "explanation": "",
        **{f"image_{place}": None for place in range(1, 8)},
        "img_type": "['Pathological Images']",
        "answer": "C",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Pathology",
        **changes,
    }


def stored(grey: int) -> dict[str, Any]:
    """An image as the hub stores it."""
    return {"bytes": png(grey), "path": f"image_{grey}.png"}
