"""Answers to a benchmark whose authors keep the gold answers, as the file that they score.

That of GMAI-MMBench TEST is the prediction file of VLMEvalKit, whose ``GMAIMMBenchDataset.evaluate``
the authors contributed (open-compass/VLMEvalKit, pull request 498): the benchmark's columns without the
image, and ``prediction``. It is read from ``.xlsx``, ``.tsv`` and ``.csv``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from gmai_xtuner.engine.on_disk import replace_text
from gmai_xtuner.evaluation.results import Scored

NAME = "submission"


def write_submission(folder: Path, scored: Sequence[Scored]) -> Path:
    """Write ``submission.tsv``, and ``submission.xlsx`` where openpyxl is installed.

    ``prediction`` is the option's letter where the scorer has understood the answer, and the answer as it
    came where it has not: nothing is guessed.

    Returns:
        the TSV file.
    """
    rows = _rows(scored)
    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows(rows)
    file = folder / f"{NAME}.tsv"
    replace_text(file, out.getvalue())
    _write_workbook(folder / f"{NAME}.xlsx", rows)
    return file


def _rows(scored: Sequence[Scored]) -> list[list[str]]:
    letters = sorted({letter for one in scored for letter in one.question.lettered()})
    groups = list(dict.fromkeys(key for one in scored for key in one.question.groups))
    head = ["index", "question", *letters, *groups, "prediction"]
    return [
        head,
        *(
            [
                one.question.id,
                one.question.text,
                *(one.question.lettered().get(letter, "") for letter in letters),
                *(one.question.groups.get(key, "") for key in groups),
                one.answer.answer if one.score.parsed is None else one.score.parsed,
            ]
            for one in scored
        ),
    ]


def _write_workbook(file: Path, rows: Sequence[Sequence[str]]) -> None:
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        return
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in rows:
        # A sheet can't hold control characters; an answer may.
        sheet.append([ILLEGAL_CHARACTERS_RE.sub(" ", cell) for cell in row])
    aside = file.with_name(f".{file.name}")
    book.save(aside)
    aside.replace(file)
