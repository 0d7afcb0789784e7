# SPDX-License-Identifier: Apache-2.0

"""The answers to GMAI-MMBench TEST as its authors evaluate them.

That is the Excel file that VLMEvalKit leaves: the table's own columns without the image, and ``prediction``,
the model's words. It goes to them by mail with the names of model and team and a link to the paper (README of
github.com/uni-medical/GMAI-MMBench, commit df685478).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from gmai_xtuner.core.files import staged
from gmai_xtuner.evaluate.benchmarks.rows import lowered, read_rows
from gmai_xtuner.evaluate.questions import Benchmark, BenchmarkError

TEST_PARTS = 11
IMAGE = "image"
PREDICTION = "prediction"
_CELL_LIMIT = 32_767
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_UNSAFE_NAME = re.compile(r"[^\w.-]+")


def write_submission(
    folder: Path, model: str, *, benchmark: Benchmark, answers: Mapping[str, str]
) -> Path:
    """Write ``<model>_GMAI-MMBench_TEST.xlsx`` into a folder, which is made.

    The files of ``benchmark``, the variant test, are read once more; ``answers``: id of a question -> the
    model's words. A ``BenchmarkError`` if it is another benchmark, a part of TEST or an answer is missing, an
    answer can't stand in an Excel cell, or the files have changed.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    _check(benchmark, answers)
    workbook = Workbook(write_only=True)
    sheet = workbook.create_sheet("Sheet1")
    for row in _submitted(benchmark, answers):
        cells = [WriteOnlyCell(sheet, value=value) for value in row]
        for cell in cells:
            cell.data_type = "s"  # "=A" is an answer, no formula
        sheet.append(cells)
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
        columns, rows, now = read_rows(source.path, base64_images=IMAGE)
        if now.sha256 != source.sha256:
            raise BenchmarkError(
                f"{str(source.path)!r} has changed since it was read. Load it and answer it again."
            )
        kept = [lowered(name) for name in columns if lowered(name) not in (IMAGE, PREDICTION)]
        if not header:
            header = kept
            yield [*header, PREDICTION]
        elif set(kept) != set(header):
            raise BenchmarkError(
                f"{str(source.path)!r} has the columns {', '.join(kept)}, the first part {', '.join(header)}."
            )
        for row in rows:
            by_name = {lowered(name): value for name, value in row.values.items()}
            values = [*(by_name[name] for name in header), answers[next(ids)]]
            yield [_cell(value, by_name["index"]) for value in values]


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
    """Return a text that Excel can hold, unchanged; raises ``BenchmarkError`` where it can't."""
    if found := _UNWRITABLE.search(value):
        told = f"the control character {found[0]!r} can't stand in an Excel file"
        raise BenchmarkError(f"index {index}: {told}.")
    if len(value) > _CELL_LIMIT:
        told = f"{len(value)} signs, an Excel cell holds {_CELL_LIMIT}"
        raise BenchmarkError(f"index {index}: {told}.")
    return value
