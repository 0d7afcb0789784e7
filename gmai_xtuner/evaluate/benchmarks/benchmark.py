"""What a reader gives: questions, the files they came from, and what could not be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.evaluate.questions import Question


class BenchmarkError(GMAIError):
    """A benchmark's file can't be read as a whole, or is another benchmark's."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that was read.

    Args:
        path: where it lies.
        sha256: of its bytes, in hexadecimal.
        size: bytes.
    """

    path: Path
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A question that can't be asked, or not as its authors meant it.

    Args:
        reason: short stable key under which problems are counted, e.g. ``"missing_image"``.
        record: id of the question, or its line or position in the file.
        detail: what was expected and what came, e.g. the name of the missing image.
        left_out: the question is not among ``Benchmark.questions``.
    """

    reason: str
    record: str
    detail: str
    left_out: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that has been read.

    Args:
        name: one of ``NAMES``.
        variant: part or language, e.g. ``"en"`` of SLAKE, ``"test_clean"`` of PMC-VQA.
        questions: in the order of the file.
        source: every annotation file that was read; image files are not hashed.
        problems: what could not be used, in the order of the file.
    """

    name: str
    variant: str
    questions: tuple[Question, ...]
    source: tuple[SourceFile, ...]
    problems: tuple[Problem, ...] = ()

    def counted_problems(self) -> Mapping[str, int]:
        """Reason -> number of problems, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())
