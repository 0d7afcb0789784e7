# SPDX-License-Identifier: Apache-2.0

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

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.parquet import ParquetImage, column_texts, part_of, rows_of
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    Collector,
    UnreadableOptions,
    hashed,
    mark_images,
    parse_list,
    text_of,
)
from gmai_xtuner.evaluate.benchmarks.table import read_tables
from gmai_xtuner.evaluate.protocols import (
    CHOICE_ALSO,
    MICRO,
    VERSION,
    Average,
    Protocol,
    Questions,
)
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
    """Return the subject that an id or a path names; None if it is another."""
    return next((subject for subject in SUBJECTS if subject in text), None)


def read(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read the Parquet files of one part; questions of other subjects are passed over."""
    variant = collector.variant
    sources = []
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


def _read_table(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read the rows of the five subjects in VLMEvalKit's table, where ``split`` names the part."""
    return read_tables(
        paths,
        collector,
        groups={"category": "subject", "split": "split"},
        keep=lambda values: (
            subject_of(values.get("category", "").replace(" ", "_")) is not None
            and values.get("split", "") in (collector.variant, "")
        ),
    )


def _of_part(identifier: str, variant: str) -> bool:
    """Tell the part by the id, which begins with it; one file may hold several."""
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
    """Return the gold answer, or several where the field is a stringified list of them."""
    text = "" if value is None else str(value).strip()
    if text in ("", "?"):
        return ()
    return parse_list(text) if text.startswith("[") else (text,)


def _recognise(header: Header) -> Found | None:
    if header.suffix != ".parquet" or not header.has("options", "question", "answer", "image_1"):
        return None
    if subject_of(header.path.parent.name) is None and not any(
        map(subject_of, column_texts(header.path, "id"))
    ):
        return None
    part = part_of(header.path)
    return Found((part,) if part in ("dev", "validation", "test") else (), "parquet")


def _protocol(
    variant: str, name: str, expected: int | None, description: str, questions: Questions = "all"
) -> Protocol:
    has_open = questions == "all"
    return Protocol(
        name=name,
        version=VERSION,
        benchmark="mmmu_health",
        variant=variant,
        description=description,
        expected=expected,
        scorer="closed_or_mmmu" if has_open else "choice",
        also=("closed_or_exact", "mmmu") if has_open else (*CHOICE_ALSO, "mmmu"),
        averages=(MICRO, Average("macro", "subject")),
        table=("subject", "topic_difficulty"),
        questions=questions,
    )


MMMU_HEALTH = Definition(
    name="mmmu_health",
    variants=("validation", "dev", "test"),
    files="'<subject>/validation-*.parquet' of five subjects",
    forms={"parquet": Form(read, levels=2), "table": Form(_read_table, parts=True)},
    recognise=_recognise,
    table_names={r"mmmu": ("validation", "dev")},
    protocols=(
        _protocol(
            "validation",
            "closed-145",
            145,
            "multiple-choice questions alone, as HuatuoGPT-Vision counts them (28, 30, 30, 27, 30)",
            "options",
        ),
        _protocol("validation", "full-150", 150, "all questions, as the paper counts them"),
        _protocol("dev", "dev-25", 25, "the five worked examples of each subject"),
        _protocol("test", "test", None, "the test part, whose answers the authors keep"),
    ),
)
