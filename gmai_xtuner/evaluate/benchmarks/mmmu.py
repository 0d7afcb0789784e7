"""MMMU Health & Medicine (Yue et al., CVPR 2024): five subjects, 30 questions each in the validation part.

As on the hub: a folder a subject with ``validation-*.parquet``, ``dev-*`` and ``test-*``: id, question,
options (a **stringified** list), answer (a letter, or the text of an open question; "?" in the test part),
question_type, subfield, topic_difficulty, img_type, image_1 to image_7. Texts and options name the images as
``<image 1>``. In the validation part five questions are open: two of
Basic_Medical_Science, three of Pharmacy.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark, SourceFile
from gmai_xtuner.evaluate.benchmarks.parquet import rows_of
from gmai_xtuner.evaluate.benchmarks.reading import (
    Collector,
    UnreadableOptions,
    hashed,
    mark_images,
    parse_list,
    text_of,
)
from gmai_xtuner.evaluate.benchmarks.stored_images import ParquetImage
from gmai_xtuner.evaluate.benchmarks.vlmevalkit import read_tables
from gmai_xtuner.evaluate.questions import Question

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
"""The five subjects, in the order of the paper's Table 5."""

IMAGE_COLUMNS = tuple(f"image_{number}" for number in range(1, 8))
OPEN = "open"
_MULTIPLE_CHOICE = "multiple-choice"


def subject_of(text: str) -> str | None:
    """The subject that an id or a path names; None if it is another."""
    return next((subject for subject in SUBJECTS if subject in text), None)


def read(paths: Sequence[Path], variant: str, *, require_images: bool) -> Benchmark:
    """The Parquet files of one part; questions of other subjects are passed over."""
    collector = Collector("mmmu_health", variant, require_images=require_images)
    sources: list[SourceFile] = []
    by_subject = dict.fromkeys(SUBJECTS, 0)
    for path in paths:
        sources.append(hashed(path))
        for number, (row, images) in enumerate(rows_of(path, IMAGE_COLUMNS), start=1):
            identifier = text_of(row, "id") or f"{path.parent.name}/{path.name}:{number}"
            subject = subject_of(identifier) or subject_of(path.parent.name)
            if subject is None or not _of_part(identifier, variant):
                continue
            by_subject[subject] += 1
            _add(row, images, identifier, subject, collector, answers_hidden=variant == "test")
    for subject, count in by_subject.items():
        if not count:
            collector.problem("missing_subject", subject, "no file has a question of it")
    return collector.benchmark(sources)


def read_tsv(paths: Sequence[Path], variant: str, *, require_images: bool) -> Benchmark:
    """The rows of the five subjects in VLMEvalKit's table, where ``split`` names the part."""
    return read_tables(
        paths,
        Collector("mmmu_health", variant, require_images=require_images),
        groups={"category": "subject", "split": "split"},
        keep=lambda values: (
            subject_of(values.get("category", "").replace(" ", "_")) is not None
            and values.get("split", variant) in (variant, "")
        ),
    )


def _of_part(identifier: str, variant: str) -> bool:
    """Ids begin with the part; one file may hold several."""
    match = re.match(r"(dev|validation|test)_", identifier)
    return match is None or match[1] == variant


def _add(
    row: Mapping[str, Any],
    images: Mapping[str, ParquetImage],
    identifier: str,
    subject: str,
    collector: Collector,
    *,
    answers_hidden: bool,
) -> None:
    kind = text_of(row, "question_type").strip() or _MULTIPLE_CHOICE
    try:
        raw_options = parse_list(row.get("options"))
    except UnreadableOptions as error:
        collector.problem("bad_options", identifier, str(error))
        return
    is_open = kind != _MULTIPLE_CHOICE
    if not is_open and not raw_options:
        collector.problem("bad_options", identifier, "a multiple-choice question without options")
        return
    if is_open:
        raw_options = ()
    numbered = {int(name.removeprefix("image_")): image for name, image in images.items()}
    try:
        (text, *options), sources = mark_images((text_of(row, "question"), *raw_options), numbered)
    except KeyError as error:
        collector.problem("missing_image", identifier, f"the text names image {error.args[0]}")
        return
    try:
        answers = () if answers_hidden else _answers(row.get("answer"))
    except UnreadableOptions as error:
        collector.problem("bad_answer", identifier, str(error))
        return
    letter = ""
    if not is_open and answers:
        letter = answers[0].strip()
        if letter not in string.ascii_uppercase[: len(options)]:
            collector.problem(
                "bad_answer",
                identifier,
                f"the letter of one of {len(options)} options was expected, {letter!r} came",
            )
            return
        answers = (options[string.ascii_uppercase.index(letter)],)
    collector.add(
        Question(
            id=identifier,
            text=text,
            images=sources,
            options=tuple(options),
            answer=answers[0] if answers else None,
            answers=answers[1:],
            groups={
                "subject": subject,
                "question_type": OPEN if is_open else _MULTIPLE_CHOICE,
                "subfield": text_of(row, "subfield"),
                "topic_difficulty": text_of(row, "topic_difficulty"),
            },
            gold_letter=letter,
        )
    )


def _answers(value: object) -> tuple[str, ...]:
    """The gold answer, or several where the field is a stringified list of them."""
    text = "" if value is None else str(value).strip()
    if text in ("", "?"):
        return ()
    return parse_list(text) if text.startswith("[") else (text,)
