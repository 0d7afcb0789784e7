# SPDX-License-Identifier: Apache-2.0

"""Small benchmarks in the files their authors ship."""

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


def _written(path: Path, content: bytes) -> Path:
    """Write a file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def image_file(path: Path, grey: int = 0) -> Path:
    """Write an image with its folders."""
    return _written(path, png(grey))


def json_file(path: Path, records: object) -> Path:
    """Write a JSON file with its folders."""
    return _written(path, json.dumps(records, ensure_ascii=False).encode())


def jsonl_file(path: Path, records: Sequence[object]) -> Path:
    """Write a file of JSON lines with its folders."""
    return _written(path, "".join(json.dumps(one) + "\n" for one in records).encode())


def csv_file(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], **dialect: Any
) -> Path:
    """Write a CSV file with its folders."""
    text = io.StringIO()
    csv.writer(text, **dialect).writerows([header, *rows])
    return _written(path, text.getvalue().encode())


def tsv_file(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write a table as pandas does: quoted where tab, quote or line end stands in it."""
    return csv_file(path, header, rows, delimiter="\t", lineterminator="\n")


def parquet_file(path: Path, rows: Sequence[dict[str, Any]], *, row_group_size: int = 2) -> Path:
    """Write a Parquet file as the hub does, several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    return path


RECORDS = json.loads((Path(__file__).parent / "records.json").read_text(encoding="utf-8"))
"""One record of each benchmark, as its authors ship it."""


def vqa_rad_record(qid: int, phrase_type: str = "test_freeform", **changes: Any) -> dict[str, Any]:
    return {**RECORDS["VQA-RAD"], "qid": qid, "phrase_type": phrase_type, **changes}


def slake_record(qid: int, lang: str = "en", **changes: Any) -> dict[str, Any]:
    return {**RECORDS["SLAKE"], "qid": qid, "q_lang": lang, **changes}


def omnimedvqa_record(question_id: str, **changes: Any) -> dict[str, Any]:
    return {**RECORDS["OmniMedVQA"], "question_id": question_id, **changes}


def medxpertqa_record(identifier: str, **changes: Any) -> dict[str, Any]:
    own = {"id": identifier, "images": [f"{identifier}-a.jpeg"]}
    return {**RECORDS["MedXpertQA"], **own, **changes}


def huatuo_record(**changes: Any) -> dict[str, Any]:
    return {**RECORDS["HuatuoGPT-Vision"], **changes}


GMAI_HEADER = tuple(RECORDS["GMAI-MMBench"])


def gmai_row(index: int, grey: int = 0, **changes: str) -> list[str]:
    """A row in the order of :data:`GMAI_HEADER`."""
    own = {"index": str(index), "image": base64_png(grey)}
    return list({**RECORDS["GMAI-MMBench"], **own, **changes}.values())


def gmai_test_part(folder: Path, part: int, *indices: int, **changes: str) -> Path:
    """Write a part of TEST, whose answers the authors keep."""
    answer = GMAI_HEADER.index("answer")
    header, *rows = (
        [*row[:answer], *row[answer + 1 :]]
        for row in (GMAI_HEADER, *(gmai_row(index, index, **changes) for index in indices))
    )
    return tsv_file(folder / f"GMAI_mm_bench_TEST_part_{part}.tsv", header, rows)


SUBJECTS = (
    *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
    *("Pharmacy", "Public_Health"),
)


def mmmu_row(part: str, subject: str, number: int, **changes: Any) -> dict[str, Any]:
    """A row of the hub's Parquet files."""
    images = {f"image_{place}": None for place in range(1, 8)}
    return {**RECORDS["MMMU"], **images, "id": f"{part}_{subject}_{number}", **changes}


def stored(grey: int) -> dict[str, Any]:
    """An image as the hub stores it."""
    return {"bytes": png(grey), "path": f"image_{grey}.png"}
