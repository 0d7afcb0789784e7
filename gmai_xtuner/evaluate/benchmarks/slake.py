"""SLAKE (Liu et al., ISBI 2021): radiology questions in English and Chinese.

``test.json``: records with img_id, img_name, question, answer, q_lang, location, modality, answer_type,
base_type, triple, qid, content_type; images ``imgs/<img_name>``. English: 1,061 questions, 645 OPEN and 416
CLOSED, 355 of these answered by yes or no. Chinese: 1,033.
"""

from __future__ import annotations

from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark
from gmai_xtuner.evaluate.benchmarks.reading import Collector, read_records, text_of
from gmai_xtuner.evaluate.questions import Question

_GROUPS = ("answer_type", "content_type", "base_type", "modality", "location")


def read(path: Path, variant: str, *, require_images: bool) -> Benchmark:
    """The questions in the language ``variant`` (en or zh) of the authors' JSON file."""
    records, source = read_records(path)
    collector = Collector("slake", variant, require_images=require_images)
    for number, record in enumerate(records, start=1):
        if text_of(record, "q_lang") != variant:
            continue
        identifier = text_of(record, "qid") or f"record {number}"
        image = text_of(record, "img_name")
        answer = text_of(record, "answer").strip()
        if not answer:
            collector.problem("no_answer", identifier, "the gold answer is empty")
            continue
        collector.add(
            Question(
                id=identifier,
                text=text_of(record, "question").strip(),
                images=(path.parent / "imgs" / image,) if image else (),
                answer=answer,
                groups={name: text_of(record, name).strip() for name in _GROUPS},
            )
        )
    return collector.benchmark([source])
