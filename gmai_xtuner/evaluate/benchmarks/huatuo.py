# SPDX-License-Identifier: Apache-2.0

"""The evaluation collection of HuatuoGPT-Vision (Chen et al., EMNLP 2024): closed questions of six sets.

``medical_multimodel_evaluation_data.json`` (so spelt) and ``images``: a list of question, options (a list or
the text of one), answer (the option's **text**, or "?" where no answer is right), image (a list of paths),
dataset, subset, question_type. Ids are the positions from 1, as in the authors' ``eval.py``.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    Collector,
    UnreadableOptions,
    mark_images,
    parse_list,
    read_records,
    text_of,
)
from gmai_xtuner.evaluate.benchmarks.table import read_tables
from gmai_xtuner.evaluate.protocols import choice_protocol
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


def read(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read the whole collection (variant ``all``), or one of its datasets."""
    (path,) = paths
    records, source = read_records(path)
    for number, record in enumerate(records, start=1):
        if collector.variant in ("all", text_of(record, "dataset")):
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
    if not isinstance(names, list):
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


def _read_table(paths: Sequence[Path], collector: Collector) -> Benchmark:
    def keep(row: Mapping[str, str]) -> bool:
        return collector.variant in ("all", row.get("dataset", row.get("category")))

    return read_tables(paths, collector, keep=keep)


def _recognise(header: Header) -> Found | None:
    if header.suffix == ".json" and header.has("options", "dataset", "image", "answer", "question"):
        return Found(("all",), "json", parts=tuple(COUNTS))
    return None


_HOW = "as HuatuoGPT-Vision's eval.py asks: letters, greedy"
_TOTAL = sum(COUNTS.values())

HUATUO = Definition(
    name="huatuo",
    variants=("all", *COUNTS),
    files="'medical_multimodel_evaluation_data.json' and 'images'",
    forms={"json": Form(read), "table": Form(_read_table, parts=True)},
    recognise=_recognise,
    protocols=(
        choice_protocol(
            "huatuo",
            "all",
            f"collection-{_TOTAL}",
            _TOTAL,
            f"the whole collection, {_HOW}",
            macro=("dataset",),
            table=("dataset", "subset"),
        ),
        *(
            choice_protocol(
                "huatuo",
                dataset,
                f"{dataset}-{count}",
                count,
                f"its part {dataset}, {_HOW}",
                table=("subset",),
            )
            for dataset, count in COUNTS.items()
        ),
    ),
)
