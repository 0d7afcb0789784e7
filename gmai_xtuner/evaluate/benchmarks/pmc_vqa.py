"""PMC-VQA (Zhang et al., 2023): questions with four options about figures of PubMed Central.

``test_clean.csv`` (2,000 questions checked by people): Figure_path, Question, Answer, Choice A to D,
Answer_label, the choices written " A:Liver". ``test_2.csv`` differs: index, Figure_path, Caption, Question,
Choice A to D, Answer (the letter), split. Both name the columns, and may write a space before the names.
Images lie in ``images`` (``figures`` for test_2) beside the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark, BenchmarkError
from gmai_xtuner.evaluate.benchmarks.reading import Collector, read_csv
from gmai_xtuner.evaluate.benchmarks.table import find_file
from gmai_xtuner.evaluate.questions import Question

_LETTERS = "ABCD"


def variant_of(columns: set[str]) -> str | None:
    """Which of the two files has these columns; None if neither."""
    if not {"Figure_path", "Question", "Answer", *(f"Choice {x}" for x in _LETTERS)} <= columns:
        return None
    return "test_clean" if "Answer_label" in columns else "test_2"


def read(path: Path, variant: str, *, require_images: bool) -> Benchmark:
    """One of the two files; ``variant`` says which."""
    rows, source = read_csv(path)
    if not rows:
        raise BenchmarkError(f"{str(path)!r} has no row. Fetch it again.")
    if (found := variant_of(set(rows[0]))) != variant:
        raise BenchmarkError(
            f"{str(path)!r} has the columns of {found or 'another file'}, those of {variant} were expected."
        )
    collector = Collector("pmc_vqa", variant, require_images=require_images)
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
