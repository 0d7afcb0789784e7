# SPDX-License-Identifier: Apache-2.0

"""The definition of a benchmark: its variants, the files it comes in, and the protocols that ask it.

A new benchmark is one file with a :class:`Definition`, registered in this package's ``DEFINITIONS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gmai_xtuner.evaluate.benchmarks.reading import Benchmark, Collector
from gmai_xtuner.evaluate.protocols import Protocol


@dataclass(frozen=True, slots=True)
class Header:
    """What a file shows without being read whole.

    Args:
        path: a .json, .csv, .tsv, .parquet or .pkl file.
        fields: its columns, or the fields of its first record.
    """

    path: Path
    fields: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    def has(self, *names: str) -> bool:
        return set(names) <= set(self.fields)


@dataclass(frozen=True, slots=True)
class Found:
    """A file that belongs to a benchmark, or may.

    Args:
        variants: that the file is; empty where it does not say.
        form: key of :attr:`Definition.forms`.
        parts: further variants that can be read from it.
        needs: what the user must name for the file to be taken: ``benchmark`` and ``file`` are for files that
            do not say what they are.
    """

    variants: tuple[str, ...]
    form: str
    parts: tuple[str, ...] = ()
    needs: Literal["nothing", "benchmark", "file"] = "nothing"


@dataclass(frozen=True, slots=True)
class Form:
    """One kind of files that a benchmark comes in.

    Args:
        read: gives the questions of the files to the collector; says what is wrong by ``BenchmarkError``.
        levels: how many folders up one copy of the benchmark reaches: 0 for a file, 1 for the files of a
            folder, 2 for folders beside each other.
        parts: a copy may be a table in numbered parts (``..._part_2.tsv``).
        images_up: how many folders above the file's own its images may lie; none may lie further out.
    """

    read: Callable[[Sequence[Path], Collector], Benchmark]
    levels: int = 0
    parts: bool = False
    images_up: int = 0


@dataclass(frozen=True)
class Definition:
    """A benchmark.

    Args:
        name: as the command takes it.
        variants: parts or languages; the first is the default.
        files: what the authors ship, for messages; it may be a table of VLMEvalKit instead.
        forms: name of a form -> how it is read; with ``table`` for a table of VLMEvalKit.
        recognise: whether a file is the benchmark's, by its fields.
        protocols: ways to ask and score it; the first of each variant is its default.
        table_names: patterns of the names of VLMEvalKit's tables, which say no more of themselves, and the
            variants that such a table is; the first that fits counts.
        locate: the files of a variant in a folder where they have a fixed place; None where they are not.
    """

    name: str
    variants: tuple[str, ...]
    files: str
    forms: Mapping[str, Form]
    recognise: Callable[[Header], Found | None]
    protocols: tuple[Protocol, ...]
    table_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    locate: Callable[[Path, str], Sequence[Path] | None] = lambda folder, variant: None
