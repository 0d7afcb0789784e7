# SPDX-License-Identifier: Apache-2.0

"""PMC-VQA (Zhang et al., 2023): questions with four options about figures of PubMed Central.

``test_clean.csv`` (2,000 questions checked by people): Figure_path, Question, Answer, Choice A to D,
Answer_label, the choices written " A:Liver". ``test_2.csv`` differs: index, Figure_path, Caption, Question,
Choice A to D, Answer (the letter), split. Both name the columns, and may write a space before the names.
Images lie in ``images`` (``figures`` for test_2) beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    BenchmarkError,
    Collector,
    find_file,
    read_csv,
)
from gmai_xtuner.evaluate.benchmarks.table import read_tables
from gmai_xtuner.evaluate.protocols import choice_protocol
from gmai_xtuner.evaluate.questions import Question

_LETTERS = "ABCD"


def read(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read one of the two files; the variant says which."""
    (path,) = paths
    rows, source = read_csv(path)
    if not rows:
        raise BenchmarkError(f"{str(path)!r} has no row. Fetch it again.")
    variant = collector.variant
    folders = tuple(
        path.parent / name for name in ("images", "figures", "images_2", "images/images", ".")
    )
    for number, row in enumerate(rows):
        identifier = row.get("index", "").strip() or str(number)
        options = tuple(_without_letter(row[f"Choice {letter}"], letter) for letter in _LETTERS)
        label = row["Answer_label" if variant == "test_clean" else "Answer"].strip().rstrip(":.")
        if not all(options):
            collector.problem("bad_options", identifier, f"an empty choice: {options}")
            continue
        if label not in tuple(_LETTERS):
            collector.problem(
                "bad_answer", identifier, f"a letter from A to D was expected, {label!r} came"
            )
            continue
        gold = options[_LETTERS.index(label)]
        if variant == "test_clean" and _without_letter(row["Answer"], label) != gold:
            collector.problem(
                "answer_disagrees",
                identifier,
                f"Answer_label {label} is {gold!r}, Answer is {row['Answer']!r}; the label counts",
                left_out=False,
            )
        figure = row["Figure_path"].strip()
        collector.add(
            Question(
                id=identifier,
                text=row["Question"].strip(),
                images=(find_file(figure, folders),) if figure else (),
                options=options,
                answer=gold,
            )
        )
    return collector.benchmark([source])


def _without_letter(text: str, letter: str) -> str:
    return re.sub(rf"^\s*{letter}\s*:", "", text).strip()


def _recognise(header: Header) -> Found | None:
    choices = (f"Choice {letter}" for letter in _LETTERS)
    if header.suffix != ".csv" or not header.has("Figure_path", "Question", "Answer", *choices):
        return None
    return Found(("test_clean" if header.has("Answer_label") else "test_2",), "csv")


PMC_VQA = Definition(
    name="pmc_vqa",
    variants=("test_clean", "test_2"),
    files="'test_clean.csv' or 'test_2.csv' and 'images'",
    forms={"csv": Form(read), "table": Form(read_tables, parts=True)},
    recognise=_recognise,
    table_names={r"pmc[-_ ]?vqa.*test_2": ("test_2",), r"pmc[-_ ]?vqa": ("test_clean",)},
    protocols=(
        choice_protocol(
            "pmc_vqa", "test_clean", "clean-2000", 2000, "the 2,000 questions checked by people"
        ),
        choice_protocol(
            "pmc_vqa", "test_2", "test_2", None, "the second, larger test file, not checked by hand"
        ),
    ),
)
