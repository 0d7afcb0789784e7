"""VQA-RAD (Lau et al., Scientific Data 2018): questions of clinicians about 315 radiographs.

``VQA_RAD Dataset Public.json``: records with qid, phrase_type, image_name, image_organ, question,
question_type, answer, answer_type and others; images in ``VQA_RAD Image Folder``. The test part is what
``phrase_type`` begins with ``test_``: 300 ``test_freeform`` and 151 ``test_para``. Of its 451 questions 251
are answered by yes or no; ``answer_type`` calls 272 CLOSED.
"""

from __future__ import annotations

from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark
from gmai_xtuner.evaluate.benchmarks.reading import Collector, read_records, text_of
from gmai_xtuner.evaluate.benchmarks.table import find_file
from gmai_xtuner.evaluate.questions import Question


def read(path: Path, variant: str, *, require_images: bool) -> Benchmark:
    """The test part of the authors' JSON file."""
    records, source = read_records(path)
    collector = Collector("vqa_rad", variant, require_images=require_images)
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
