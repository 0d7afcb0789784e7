# SPDX-License-Identifier: Apache-2.0

"""Answers that another kit has stored: nothing is asked, they are scored like any model's."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.core.imaging.bounded import run_bounded
from gmai_xtuner.evaluate.answerers import hash_text
from gmai_xtuner.evaluate.benchmarks.rows import read_rows
from gmai_xtuner.evaluate.store import Given, Job

if TYPE_CHECKING:
    from gmai_xtuner.evaluate.answerers import ModelOptions

_LOG = logging.getLogger(__name__)
_IMAGE_OR_SPACE = re.compile(r"<image(?: ?\d+)?>|\s+")


@dataclass(frozen=True, slots=True)
class Kit:
    """Columns of a kit's files; ``doc.id`` is a value within another.

    Of ``ids`` the first that the file has counts. ``answer`` is as the model gave it, before any reading;
    ``question`` the question's words, if not called so.
    """

    name: str
    ids: tuple[str, ...]
    answer: str
    question: str = ""


KITS = (
    Kit(
        "lmms-eval",
        ("doc.id", "doc.question_id", "doc.qid", "doc.index", "doc_id"),
        "resps",
        "doc.question",
    ),
    Kit("VLMEvalKit", ("index",), "prediction"),
    Kit("MMMU", ("id",), "response"),
    Kit("LLaVA", ("question_id",), "text"),
)
"""VLMEvalKit's tables, samples of lmms-eval, ``output.json`` of MMMU, answers of LLaVA's scripts."""


class StoredAnswers:
    """Gives the answers of files, by the ids of the questions.

    An ``EvaluationError`` if a file can't be read, is no kit's, or answers a question twice in two ways.
    """

    repeats = True

    def __init__(self, options: ModelOptions) -> None:
        self.name = options.shown
        self._answers: dict[str, tuple[str, str, str]] = {}
        read = [self._read(Path(name), options.answer_columns) for name in options.answers]
        kits, digests = zip(*read, strict=True)
        self.model = hash_text(sorted(digests))
        self.generation: Mapping[str, Any] = {"answers_stored_by": ", ".join(sorted(set(kits)))}

    def check(self, asked: Collection[str]) -> None:
        """Hold the answers' ids against all that are asked, and tell of answers to no question.

        An ``EvaluationError`` where none fits, or where they count from 0 and the questions from 1: each
        answer would be the next question's.
        """
        others = [one for one in self._answers if one not in asked]
        if asked and len(others) == len(self._answers):
            raise EvaluationError(
                f"none of the stored answers has the id of a question: theirs is "
                f"{next(iter(others), 'none')!r}, asked is {next(iter(asked))!r}. Give the questions "
                "these ids (`id` in the column map), or name the column of the answers' own: --answer-columns"
            )
        if "0" in others and set(asked) == {str(number + 1) for number in range(len(asked))}:
            raise EvaluationError(
                "an answer has the id 0, and the questions count from 1: is each answer the next question's? "
                "Give both the same ids (`id` in the column map)"
            )
        if others:
            told = "%d of %d stored answers are to no question that is asked, such as %r"
            _LOG.warning(told, len(others), len(self._answers), others[0])

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        """Give them; an ``EvaluationError`` where one is to other words than the question's."""
        yield [self._given(job) for job in jobs[rank::world_size]]

    def _given(self, job: Job) -> Given:
        if job.id not in self._answers:
            return Given(job, None, problem="not_stored", detail="the files have no answer to it")
        answer, question, ended = self._answers[job.id]
        if _words(question) not in _words(job.prompt):
            raise EvaluationError(
                f"the stored answer to {job.id} is to another question: {question[:80]!r} there, "
                f"{job.prompt[:80]!r} in the benchmark. Are the files of the same version?"
            )
        return Given(job, answer, ended=ended)

    def _read(self, file: Path, columns: tuple[str, str] | None) -> tuple[str, str]:
        """Take a file's answers; return the name of its kit and the file's hash."""
        records: Sequence[Mapping[str, Any]]
        if file.suffix.lower() == ".xlsx":
            records, digest = run_bounded(_sheet, str(file))
        else:
            _, rows, source = read_rows(file)
            records, digest = [row.values for row in rows], source.sha256
        kit, id_column = _kit(file, records, columns)
        for number, record in enumerate(records, 1):
            place = f"{file}, record {number}"
            key, answer = _value(record, id_column), _value(record, kit.answer)
            # lmms-eval: a list for each request.
            while isinstance(answer, list) and len(answer) == 1:
                answer = answer[0]
            answer = "" if answer is None else answer
            if key is None or isinstance(answer, list | dict):
                lacks = f"no {id_column}" if key is None else f"several answers in {kit.answer}"
                raise EvaluationError(f"{place} has {lacks}")
            question = _value(record, kit.question) or record.get("question")
            ended = record.get("finish_reason") or "unknown"
            found = (str(answer), str(question or ""), str(ended))
            if self._answers.setdefault(str(key), found) != found:
                raise EvaluationError(f"{place}: {key} has been answered before, in another way")
        return kit.name, digest


def _kit(
    file: Path, records: Sequence[Mapping[str, Any]], columns: tuple[str, str] | None
) -> tuple[Kit, str]:
    """Return whose file it is, and its column of ids, by the first record that has both and an answer."""
    kits = KITS if columns is None else (Kit("other", (columns[0],), columns[1]),)
    for kit in kits:
        for record in records:
            for name in kit.ids if _value(record, kit.answer) is not None else ():
                if _value(record, name) is not None:
                    return kit, name
    known = "; ".join(f"{one.name}: {' or '.join(one.ids)}, {one.answer}" for one in kits)
    found = ", ".join(records[0]) if records else "of no record"
    remedy = "Name them: --answer-columns ID ANSWER" if columns is None else "Both must be there"
    raise EvaluationError(
        f"{file} has the columns {found}, and none of these pairs ({known}). {remedy}"
    )


def _value(record: Mapping[str, Any], column: str) -> Any:
    first, _, rest = column.partition(".")
    value = record.get(first) if column else None
    return _value(value, rest) if rest and isinstance(value, Mapping) else None if rest else value


def _words(text: str) -> str:
    return _IMAGE_OR_SPACE.sub("", text)


def _sheet(file: str) -> tuple[list[dict[str, Any]], str]:
    """Read the first sheet of an Excel file; in a process of its own, since it may unpack without end."""
    import openpyxl

    try:
        data = Path(file).read_bytes()
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True)
        head, *rows = book.worksheets[0].iter_rows(values_only=True)
    except Exception as error:  # whatever openpyxl makes of a damaged file
        why = f"{type(error).__name__}: {error}"
        raise EvaluationError(f"{file} can't be read as an Excel sheet ({why})") from error
    records = [dict(zip(map(str, head), row, strict=False)) for row in rows]
    return records, hashlib.sha256(data).hexdigest()
