"""The evaluation collection of HuatuoGPT-Vision (Chen et al., EMNLP 2024): closed questions of six sets.

``medical_multimodel_evaluation_data.json`` (so spelt) and ``images``: a list of question, options (a list or
the text of one), answer (the option's **text**, or "?" where no answer is right), image (a list of paths),
dataset, subset, question_type. Ids are the positions from 1, as in the authors' ``eval.py``.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark
from gmai_xtuner.evaluate.benchmarks.reading import (
    Collector,
    UnreadableOptions,
    mark_images,
    parse_list,
    read_records,
    text_of,
)
from gmai_xtuner.evaluate.questions import ImageSource, Question

COUNTS: Mapping[str, int] = {
    "VQA-RAD_test": 251,
    "SLAKE_test": 416,
    "PathVQA_test": 3362,
    "PMC-VQA_test": 2000,
    "OmniMedVQA": 11124,
    "MMMU_Medical_Validation": 145,
}
"""Field ``dataset`` -> number of questions."""


def read(path: Path, variant: str, *, require_images: bool) -> Benchmark:
    """The whole collection (``variant`` all), or one of its datasets."""
    records, source = read_records(path)
    collector = Collector("huatuo", variant, require_images=require_images)
    for number, record in enumerate(records, start=1):
        if variant in ("all", text_of(record, "dataset")):
            _add(record, str(number), path.parent, collector)
    return collector.benchmark([source])


def _add(record: Mapping[str, Any], identifier: str, folder: Path, collector: Collector) -> None:
    try:
        raw_options = parse_list(record.get("options"))
    except UnreadableOptions as error:
        collector.problem("bad_options", identifier, str(error))
        return
    if not raw_options or text_of(record, "question_type") == "open":
        # eval.py of the authors passes these over
        collector.problem(
            "no_options", identifier, "an open question, which the collection's authors skip"
        )
        return
    names = record.get("image") or []
    if isinstance(names, str):
        names = [names]
    images: dict[int, ImageSource] = {
        number: folder / str(name) for number, name in enumerate(names, start=1)
    }
    try:
        (text, *options), sources = mark_images((text_of(record, "question"), *raw_options), images)
    except KeyError as error:
        collector.problem("missing_image", identifier, f"the text names image {error.args[0]}")
        return
    raw_answer = text_of(record, "answer")
    # of options that read the same the first is right, as in the authors' scorer
    place = raw_options.index(raw_answer) if raw_answer in raw_options else None
    collector.add(
        Question(
            id=identifier,
            text=text,
            images=sources,
            options=tuple(options),
            answer=raw_answer if place is None else options[place],
            groups={
                "dataset": text_of(record, "dataset"),
                "subset": text_of(record, "subset"),
                "question_type": text_of(record, "question_type"),
            },
            gold_letter="" if place is None else string.ascii_uppercase[place],
        )
    )
