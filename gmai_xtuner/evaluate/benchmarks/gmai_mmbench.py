# SPDX-License-Identifier: Apache-2.0

"""GMAI-MMBench (Ye et al., NeurIPS 2024): 18 clinical tasks, 18 departments, 4 granularities, 38 modalities.

``GMAI_mm_bench_VAL.tsv`` (4,550 questions) and ``GMAI_mm_bench_TEST_part_1.tsv`` to ``_11`` (21,281): index,
image (base64), question, A to E, answer (VAL only), category, ``clinical VQA task``, department,
``perceptual granularity``, modality. ``category`` is the gold option's text and is never read: for TEST the
authors keep the answers.

They evaluate the Excel file that VLMEvalKit leaves: the table's own columns without the image, and
``prediction``, the model's words. It goes to them by mail with the model's name, the team's and a link to the
paper (README of github.com/uni-medical/GMAI-MMBench, commit df685478).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gmai_xtuner.core.files import staged
from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.reading import Benchmark, BenchmarkError, Collector
from gmai_xtuner.evaluate.benchmarks.table import IMAGE, read_table, read_tables
from gmai_xtuner.evaluate.protocols import Protocol, choice_protocol

TASK = "clinical VQA task"
TEST_PARTS = 11
_GROUPS: Mapping[str, str] = {
    "clinical vqa task": TASK,
    "department": "department",
    "perceptual granularity": "perceptual granularity",
    "modality": "modality",
}
"""Column, in lower case -> the authors' name of it."""

PREDICTION = "prediction"
_CELL_LIMIT = 32_767
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_UNSAFE_NAME = re.compile(r"[^\w.-]+")
_PART = re.compile(r"TEST_part_(\d+)\.tsv$", re.IGNORECASE)


def part_of(path: Path) -> int | None:
    """Return the number of a part of the test set; None for another file."""
    match = _PART.search(path.name)
    return int(match[1]) if match else None


def read(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read VAL, or the parts of TEST; a part that is not there is noted."""
    is_test = collector.variant == "test"
    parts = {part_of(path) for path in paths}
    if is_test and parts != {None}:
        for part in range(1, TEST_PARTS + 1):
            if part not in parts:
                collector.problem("missing_part", f"part {part}", "a file of TEST is not there")
    return read_tables(paths, collector, groups=_GROUPS, answers_hidden=is_test)


def write_submission(
    folder: Path, model: str, *, benchmark: Benchmark, answers: Mapping[str, str]
) -> Path:
    """Write ``<model>_GMAI-MMBench_TEST.xlsx``.

    Args:
        folder: takes the file; it is made.
        model: its name, as it is to stand on the leaderboard; other signs than letters, digits, dots and
            hyphens become a hyphen in the file's name.
        benchmark: what :func:`load_benchmark` gave for the variant test; its files are read once more.
        answers: id of a question -> the model's words.

    Raises:
        BenchmarkError: it is another benchmark, a part of TEST or an answer is missing, an answer can't stand
            in an Excel cell, or the files have changed.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
    except ImportError as error:
        raise BenchmarkError(
            "an Excel file is written by openpyxl, which is not installed: pip install openpyxl."
        ) from error
    _check(benchmark, answers)
    workbook = Workbook(write_only=True)
    sheet = workbook.create_sheet("Sheet1")
    for row in _submitted(benchmark, answers):
        cells = [WriteOnlyCell(sheet, value=value) for value in row]
        for cell in cells:
            cell.data_type = "s"  # "=A" is an answer, no formula
        sheet.append(cells)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_UNSAFE_NAME.sub('-', model).strip('-')}_GMAI-MMBench_TEST.xlsx"
    with staged(target) as partial:
        workbook.save(partial)
    return target


def _submitted(benchmark: Benchmark, answers: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the header and the rows of the sheet, of all parts."""
    ids = iter(question.id for question in benchmark.questions)
    header: list[str] = []
    for source in benchmark.source:
        columns, rows, now = read_table(source.path)
        if now.sha256 != source.sha256:
            raise BenchmarkError(
                f"{str(source.path)!r} has changed since it was read. Load it and answer it again."
            )
        kept = [name for name in columns if name not in (IMAGE, PREDICTION)]
        if not header:
            header = kept
            yield [*header, PREDICTION]
        elif set(kept) != set(header):
            raise BenchmarkError(
                f"{str(source.path)!r} has the columns {', '.join(kept)}, the first part {', '.join(header)}."
            )
        for row in rows:
            values = [*(row.values[name] for name in header), answers[next(ids)]]
            yield [_cell(value, row.values["index"]) for value in values]


def _check(benchmark: Benchmark, answers: Mapping[str, str]) -> None:
    if (benchmark.name, benchmark.variant) != ("gmai_mmbench", "test"):
        raise BenchmarkError(
            f"only GMAI-MMBench TEST is submitted, this is {benchmark.name} {benchmark.variant}."
        )
    left_out = [problem for problem in benchmark.problems if problem.left_out]
    if left_out:
        counts = ", ".join(f"{n} {reason}" for reason, n in benchmark.counted_problems().items())
        raise BenchmarkError(
            f"the submission needs every question of the {TEST_PARTS} parts, some can't be asked ({counts}); "
            f"the first: {left_out[0].record}, {left_out[0].detail}."
        )
    missing = [question.id for question in benchmark.questions if question.id not in answers]
    if missing:
        raise BenchmarkError(
            f"{len(missing)} of {len(benchmark.questions)} questions have no answer, the first is "
            f"{missing[0]}. Go on with the run until all are answered."
        )


def _cell(value: str, index: str) -> str:
    """Return a text that Excel can hold, unchanged.

    Raises:
        BenchmarkError: it can't.
    """
    if len(value) > _CELL_LIMIT:
        raise BenchmarkError(
            f"index {index}: {len(value)} signs, an Excel cell holds {_CELL_LIMIT}. Answer with fewer tokens."
        )
    if found := _UNWRITABLE.search(value):
        raise BenchmarkError(
            f"index {index}: the control character {found[0]!r} can't stand in an Excel file."
        )
    return value


def _recognise(header: Header) -> Found | None:
    if header.suffix != ".tsv" or not header.has("clinical vqa task"):
        return None
    is_test = not header.has("answer") or part_of(header.path) is not None
    return Found(("test",) if is_test else ("val",), "tsv")


def _protocols(variant: str, expected: int) -> tuple[Protocol, Protocol]:
    name = f"{variant}-{expected}"
    hidden = "; the authors keep the answers" if variant == "test" else ""
    table = (TASK, "department", "perceptual granularity", "modality")
    return (
        choice_protocol(
            "gmai_mmbench",
            variant,
            name,
            expected,
            f"all questions, asked as LLaVA is; the published overall is the mean over questions{hidden}",
            macro=(TASK,),
            table=table,
        ),
        choice_protocol(
            "gmai_mmbench",
            variant,
            f"{name}-vlmevalkit",
            expected,
            f"the same in the default words of VLMEvalKit, by which the authors evaluate{hidden}",
            macro=(TASK,),
            table=table,
            words="vlmevalkit",
        ),
    )


GMAI_MMBENCH = Definition(
    name="gmai_mmbench",
    variants=("val", "test"),
    files="'GMAI_mm_bench_VAL.tsv' or 'GMAI_mm_bench_TEST_part_*.tsv'",
    forms={"tsv": Form(read, parts=True), "table": Form(read_tables, parts=True)},
    recognise=_recognise,
    protocols=(*_protocols("val", 4550), *_protocols("test", 21281)),
)
