# SPDX-License-Identifier: Apache-2.0

"""OmniMedVQA (Hu et al., CVPR 2024): questions with options about images of 73 datasets.

``QA_information/Open-access/*.json`` (88,996 questions) and ``Restricted-access``: lists of records with
dataset, question_id, question_type, question, gt_answer (the option's **text**), image_path (relative to the
folder that holds ``QA_information``), option_A to option_D (C and D may be absent), modality_type. One record
of ``Chest CT Scan.json`` has ``modality`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    BenchmarkError,
    Collector,
    gold_option,
    read_records,
    text_of,
)
from gmai_xtuner.evaluate.benchmarks.table import read_tables
from gmai_xtuner.evaluate.protocols import choice_protocol
from gmai_xtuner.evaluate.questions import Question

FOLDERS: Mapping[str, str] = {
    "open-access": "Open-access",
    "restricted-access": "Restricted-access",
}
"""Variant -> its folder in ``QA_information``."""


def read(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read files of ``QA_information/<variant>``."""
    sources = []
    for file in paths:
        root = file.parent.parent.parent
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


def _recognise(header: Header) -> Found | None:
    if header.suffix != ".json" or not header.has("gt_answer", "image_path", "option_A"):
        return None
    parent = header.path.parent.name
    variant = next((name for name, folder in FOLDERS.items() if folder == parent), "open-access")
    return Found((variant,), "json")


def _locate(folder: Path, variant: str) -> Sequence[Path] | None:
    """Return all files of a variant, also those that are something else: :func:`read` refuses them."""
    for root in (folder, folder / "OmniMedVQA"):
        questions = root / "QA_information" / FOLDERS[variant]
        if questions.is_dir():
            if files := sorted(questions.glob("*.json")):
                return files
            raise BenchmarkError(f"{str(questions)!r} has no .json file. Fetch OmniMedVQA again.")
    return None


_MACRO = ("question_type", "modality")
_TABLE = (*_MACRO, "dataset")

OMNIMEDVQA = Definition(
    name="omnimedvqa",
    variants=tuple(FOLDERS),
    files="'QA_information/Open-access/*.json' and 'Images'",
    forms={"json": Form(read, levels=3, images_up=2), "table": Form(read_tables, parts=True)},
    recognise=_recognise,
    locate=_locate,
    table_names={r"omni[-_ ]?med": ("open-access",)},
    protocols=(
        choice_protocol(
            "omnimedvqa",
            "open-access",
            "open-88996",
            88996,
            "all open-access questions; mean over questions (micro) and over the five types (macro)",
            macro=_MACRO,
            table=_TABLE,
        ),
        choice_protocol(
            "omnimedvqa",
            "restricted-access",
            "restricted",
            None,
            "the questions whose images each dataset's owner must permit",
            macro=_MACRO,
            table=_TABLE,
        ),
    ),
)
