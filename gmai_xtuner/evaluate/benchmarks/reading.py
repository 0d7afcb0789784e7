# SPDX-License-Identifier: Apache-2.0

"""What a benchmark's files give: questions, what could not be used, and hashes.

Nothing is repaired: what can't be read becomes a :class:`Problem` with a reason, what can't be a benchmark at
all a :class:`BenchmarkError`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.evaluate.protocols import Protocol
from gmai_xtuner.evaluate.questions import Question


class BenchmarkError(GMAIError):
    """A benchmark's file can't be read as a whole, or is another benchmark's."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that was read, with the hash of its bytes in hexadecimal, and its size in bytes."""

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
    """A benchmark that has been read; questions and problems stand in the order of the files.

    Args:
        variant: part or language, e.g. ``"en"`` of SLAKE, ``"test_clean"`` of PMC-VQA.
        source: every annotation file that was read; image files are not hashed.
        protocols: the ways to ask and score it.
    """

    name: str
    variant: str
    questions: tuple[Question, ...]
    source: tuple[SourceFile, ...]
    problems: tuple[Problem, ...] = ()
    protocols: tuple[Protocol, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name} ({self.variant})"

    def counted_problems(self) -> Mapping[str, int]:
        """Return reason -> number of problems, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    @property
    def known_as(self) -> str:
        """The names by which it may be known: its own, and those of its files."""
        return " ".join((self.name, self.variant, *self.hashes()))

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each annotation file by its name; files of one name (MMMU's) are numbered."""
        found: dict[str, str] = {}
        names: Counter[str] = Counter()
        for name, digest in sorted((one.path.name, one.sha256) for one in self.source):
            names[name] += 1
            found[f"{name} ({names[name]})" if names[name] > 1 else name] = digest
        return found


class UnreadableOptions(ValueError):
    """An option list that can't be parsed."""


def parse_list(value: object) -> tuple[str, ...]:
    """Return a list, or the text of one as Python writes it, as texts; an empty text is an empty list.

    Only literals are read, nothing is evaluated.

    Raises:
        UnreadableOptions: it is neither.
    """
    parsed = value
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UnreadableOptions(f"{short(value)} is no list ({error})") from error
    if not isinstance(parsed, list | tuple):
        raise UnreadableOptions(f"a list was expected, {short(value)} came")
    if not all(isinstance(item, str | int | float) for item in parsed):
        raise UnreadableOptions(f"a list of texts was expected, {short(value)} came")
    return tuple(str(item) for item in parsed)


def short(value: object) -> str:
    """Return what a message shows of a value."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
