"""OmniMedVQA (Hu et al., CVPR 2024): questions with options about images of 73 datasets.

``QA_information/Open-access/*.json`` (88,996 questions) and ``Restricted-access``: lists of records with
dataset, question_id, question_type, question, gt_answer (the option's **text**), image_path (relative to the
folder that holds ``QA_information``), option_A to option_D (C and D may be absent), modality_type. One record
of ``Chest CT Scan.json`` has ``modality`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark, BenchmarkError
from gmai_xtuner.evaluate.benchmarks.reading import (
    Collector,
    gold_option,
    read_records,
    text_of,
)
from gmai_xtuner.evaluate.questions import Question

FOLDERS: Mapping[str, str] = {
    "open-access": "Open-access",
    "restricted-access": "Restricted-access",
}
"""Variant -> its folder in ``QA_information``."""


def read(path: Path, variant: str, *, require_images: bool) -> Benchmark:
    """All files of the folder ``path``, which is ``QA_information/<variant>``, or one file of it."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise BenchmarkError(f"{str(path)!r} has no .json file. Fetch OmniMedVQA again.")
    root = (path if path.is_dir() else path.parent).parent.parent
    collector = Collector("omnimedvqa", variant, require_images=require_images)
    sources = []
    for file in files:
        records, source = read_records(file)
        sources.append(source)
        if records and "gt_answer" not in records[0]:
            raise BenchmarkError(
                f"{str(file)!r} is no file of OmniMedVQA: its records have "
                f"{', '.join(records[0])}, but no gt_answer. Move it away."
            )
        for number, record in enumerate(records, start=1):
            _add(record, f"{file.stem}:{number}", root, collector)
    return collector.benchmark(sources)


def _add(record: Mapping[str, Any], place: str, root: Path, collector: Collector) -> None:
    identifier = text_of(record, "question_id") or place
    lettered = {letter: text_of(record, f"option_{letter}").strip() for letter in "ABCD"}
    letters = "".join(letter for letter, text in lettered.items() if text)
    options = tuple(text for text in lettered.values() if text)
    answer = text_of(record, "gt_answer").strip()
    if not options or not answer:
        collector.problem(
            "bad_options" if not options else "no_answer",
            identifier,
            f"{place} has {len(options)} options and the gold answer {answer!r}",
        )
        return
    image = text_of(record, "image_path")
    collector.add(
        Question(
            id=identifier,
            text=text_of(record, "question").strip(),
            images=(root / image,) if image else (),
            options=options,
            answer=gold_option(options, answer),
            groups={
                "question_type": text_of(record, "question_type").strip(),
                "modality": (
                    text_of(record, "modality_type") or text_of(record, "modality")
                ).strip(),
                "dataset": text_of(record, "dataset").strip(),
            },
            letters="" if letters == "ABCD"[: len(letters)] else letters,
        )
    )
