# SPDX-License-Identifier: Apache-2.0

"""Conversations that a mixture leaves out by name, by its ``exclude`` lists; docs/data.md explains them.

A list is written by hand or by ``data_tools/overlap.py``. Rows are left out when a plan draws its samples, so
another list makes nothing be tokenised again, and the draw of all other conversations stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gmai_xtuner.core.errors import MixtureError
from gmai_xtuner.core.mixture import DatasetEntry

_ALL = "*"


@dataclass(frozen=True, slots=True)
class Named:
    """One line of a list: ``kind`` (``"id"`` or ``"image"``), ``value``, ``dataset`` (None for all)."""

    kind: str
    value: str
    dataset: str | None

    def __str__(self) -> str:
        return f"{self.kind}: {self.value}" + (f" ({self.dataset})" if self.dataset else "")


@dataclass(frozen=True)
class Exclusion:
    """The ``ids`` of conversations, and the ``images`` below the image root, that one dataset leaves out."""

    ids: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.ids or self.images)

    def __contains__(self, line: Named) -> bool:
        return line.value in (self.ids if line.kind == "id" else self.images)

    @cached_property
    def digest(self) -> str:
        """Changes with what is left out, not with how it was written down."""
        return _digest([sorted(self.ids), sorted(self.images)])


@dataclass(frozen=True)
class Exclusions:
    """The names that the datasets of a stage leave out, in their order. Made by :func:`read_exclusions`.

    ``lines``: line -> positions of the datasets that it concerns; none if the mixture lacks its dataset.
    """

    datasets: tuple[Exclusion, ...]
    lines: dict[Named, set[int]]

    def __bool__(self) -> bool:
        return bool(self.lines)

    @property
    def digest(self) -> str:
        """Changes with what is left out, not with how it was written down."""
        strangers = sorted(str(line) for line, positions in self.lines.items() if not positions)
        return _digest([[part.digest for part in self.datasets], strangers])

    def unknown(self, found: Sequence[Exclusion]) -> list[str]:
        """Return the lines that name no conversation, for people, sorted; of several datasets none has it.

        ``found`` are the names of each dataset's exclusion that it has.
        """
        return sorted(
            str(line)
            for line, positions in self.lines.items()
            if not any(line in found[position] for position in positions)
            if line.dataset is None or replace(line, dataset=None) not in self.lines
        )


def _digest(content: list) -> str:
    text = json.dumps(content)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_exclusions(entries: Sequence[DatasetEntry], *, known: Collection[str]) -> Exclusions:
    """Read the lists of a stage's datasets; a MixtureError with file and line.

    ``known`` are the names of all datasets of the mixture, also of those that the stage leaves out.
    """
    given: defaultdict[Path, list[int]] = defaultdict(list)
    for position, entry in enumerate(entries):
        for path in entry.exclude:
            given[path].append(position)
    lines: defaultdict[Named, set[int]] = defaultdict(set)
    for path, positions in given.items():
        for line in read_list(path):
            concerned = [n for n in positions if line.dataset in (None, entries[n].name)]
            if line.dataset is None and len(concerned) == 1:
                line = replace(line, dataset=entries[concerned[0]].name)
            if concerned or line.dataset not in known:
                lines[line].update(concerned)
    datasets = []
    for position in range(len(entries)):
        own = [line for line, positions in lines.items() if position in positions]
        ids, images = ({one.value for one in own if one.kind == kind} for kind in ("id", "image"))
        datasets.append(Exclusion(frozenset(ids), frozenset(images)))
    return Exclusions(tuple(datasets), dict(lines))


def read_list(path: Path) -> list[Named]:
    """Return the lines of one list, or raise a MixtureError with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MixtureError(
            f"the exclude list {path} can't be read ({error.strerror}). Correct `exclude` in the mixture "
            "file; data_tools/overlap.py writes such a list."
        ) from error
    except UnicodeDecodeError as error:
        raise MixtureError(
            f"the exclude list {path} is not UTF-8 ({error}). Save it as UTF-8."
        ) from error
    found: list[Named] = []
    dataset: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        value = value.strip()
        where = f"{path}, line {number}"
        if not colon or key not in ("dataset", "id", "image") or not value:
            raise MixtureError(
                f"{where}: expected 'id: ...', 'image: ...' or 'dataset: ...', got {line[:80]!r}. Each name "
                "that is left out stands on a line of its own, behind what it is."
            )
        if value.startswith('"'):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise MixtureError(
                    f"{where}: {value[:80]!r} begins with a quotation mark but is no JSON text ({error}). "
                    'Write " as \\" and put one at the end.'
                ) from error
        if key == "dataset":
            dataset = None if value == _ALL else value
        else:
            value = posixpath.normpath(value) if key == "image" else value
            found.append(Named(key, value, dataset))
    return found
