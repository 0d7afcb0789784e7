# SPDX-License-Identifier: Apache-2.0

"""What the preflight has found: what makes the run fail, what is worth a second look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gmai_xtuner.core.errors import GMAIError

FAIL, WARN, NOTE = "fail", "warn", "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know.

    Args:
        level: ``fail`` (the run would stop), ``warn`` (it would run, perhaps not as meant) or ``note``.
        about: the part of the run, e.g. ``data``.
        text: what was expected, what is there, and what to do.
    """

    level: str
    about: str
    text: str


@dataclass(slots=True)
class Findings:
    """Findings in the order in which they were made; none is made twice."""

    found: list[Finding] = field(default_factory=list)

    def _add(self, level: str, about: str, text: str) -> None:
        finding = Finding(level, about, text)
        if finding not in self.found:
            self.found.append(finding)

    def fail(self, about: str, text: str) -> None:
        self._add(FAIL, about, text)

    def warn(self, about: str, text: str) -> None:
        self._add(WARN, about, text)

    def note(self, about: str, text: str) -> None:
        self._add(NOTE, about, text)

    def of(self, level: str) -> list[Finding]:
        return [finding for finding in self.found if finding.level == level]

    @property
    def would_fail(self) -> bool:
        return bool(self.of(FAIL))

    @contextmanager
    def catch(self, about: str) -> Iterator[None]:
        """Turn the project's own errors, by which a run would stop, into findings and go on."""
        try:
            yield
        except GMAIError as error:
            self.fail(about, str(error))
