# SPDX-License-Identifier: Apache-2.0

"""VQA-RAD (Lau et al., Scientific Data 2018): questions of clinicians about 315 radiographs.

``VQA_RAD Dataset Public.json``: records with qid, phrase_type, image_name, image_organ, question,
question_type, answer, answer_type and others; images in ``VQA_RAD Image Folder``. The test part is what
``phrase_type`` begins with ``test_``: 300 ``test_freeform`` and 151 ``test_para``. Of its 451 questions 251
are answered by yes or no; ``answer_type`` calls 272 CLOSED.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.parquet import is_pairs, part_of, read_pairs
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    Collector,
    find_file,
    read_records,
    text_of,
)
from gmai_xtuner.evaluate.benchmarks.table import read_tables
from gmai_xtuner.evaluate.protocols import vqa_protocols
from gmai_xtuner.evaluate.questions import Question


def read(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read the test part of the authors' JSON file."""
    (path,) = paths
    records, source = read_records(path)
    folders = tuple(
        path.parent / name
        for name in ("VQA_RAD Image Folder", "VQA_RAD_Image_Folder", "images", "Images", ".")
    )
    for number, record in enumerate(records, start=1):
        phrase_type = text_of(record, "phrase_type").strip()
        if not phrase_type.startswith("test_"):
            continue
        image = text_of(record, "image_name").strip()
        answer = text_of(record, "answer").strip()
        identifier = text_of(record, "qid") or f"record {number}"
        if not answer:
            collector.problem("no_answer", identifier, "the gold answer is empty")
            continue
        collector.add(
            Question(
                id=identifier,
                text=text_of(record, "question").strip(),
                images=(find_file(image, folders),) if image else (),
                answer=answer,
                groups={
                    # "CLOSED " with a space occurs
                    "answer_type": text_of(record, "answer_type").strip().upper(),
                    "phrase_type": phrase_type,
                    "question_type": text_of(record, "question_type").strip(),
                    "image_organ": text_of(record, "image_organ").strip(),
                },
            )
        )
    return collector.benchmark([source])


def _recognise(header: Header) -> Found | None:
    if header.suffix == ".json" and header.has("phrase_type", "image_name", "answer"):
        return Found(("test",), "json")
    if not is_pairs(header) or re.search(r"path[-_ ]?vqa", str(header.path), re.IGNORECASE):
        return None
    if re.search(r"vqa[-_ ]?rad", str(header.path), re.IGNORECASE):
        return Found(("test",) if part_of(header.path) == "test" else (), "pairs")
    return Found((), "pairs", needs="file")


VQA_RAD = Definition(
    name="vqa_rad",
    variants=("test",),
    files="'VQA_RAD Dataset Public.json' and 'VQA_RAD Image Folder'",
    forms={
        "json": Form(read),
        "pairs": Form(read_pairs, levels=1),
        "table": Form(read_tables, parts=True),
    },
    recognise=_recognise,
    table_names={r"vqa[-_ ]?rad": ("test",)},
    protocols=vqa_protocols(
        "vqa_rad",
        "test",
        ("answer_type", "phrase_type", "question_type", "image_organ"),
        {
            "yes_no": ("closed-251", 251),
            "closed": ("closed-272", 272),
            "open": ("open-179", 179),
            "all": ("full-451", 451),
        },
    ),
)
