# SPDX-License-Identifier: Apache-2.0

"""Parquet files of the hub -> rows without images, and where the images stand."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.bounded import iterate_bounded, run_bounded
from gmai_xtuner.core.records import large_row_group
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    BenchmarkError,
    Collector,
    SourceFile,
    hashed,
    image_error,
    text_of,
)
from gmai_xtuner.evaluate.questions import ImageSource, Question

if TYPE_CHECKING:
    import pyarrow.parquet as pq

    from gmai_xtuner.evaluate.benchmarks.definition import Header


_MEMORY = 2**32
"""Bytes that a row group may take when it is read."""


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """An image in a column of a Parquet file: bytes, or the struct of bytes and path that the hub writes.

    Args:
        path: the file.
        column: its name.
        row_group: in which the row is.
        row: of the row group.
    """

    path: Path
    column: str
    row_group: int
    row: int

    @property
    def name(self) -> str:
        return f"{self.path.name}, row {self.row} of group {self.row_group}, column {self.column!r}"

    def read(self) -> bytes:
        import pyarrow as pa

        try:
            state = os.stat(self.path)
            column = _column(
                str(self.path), state.st_mtime_ns, state.st_size, self.row_group, self.column
            )
            value = column[self.row].as_py()
        except (OSError, IndexError, pa.ArrowException, Unusable) as error:
            raise image_error(self.name, f"can't be read ({error})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise image_error(self.name, "no image stands there", "missing_image")
        return data


@lru_cache(maxsize=2)  # questions are asked in their order, and a row group is read as a whole
def _column(path: str, changed: int, size: int, row_group: int, column: str) -> Any:
    """Read one column of one row group; time and size are there for the cache alone."""
    return run_bounded(_read_column, path, row_group, column, memory=_MEMORY, seconds=60)


def _read_column(path: str, row_group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if problem := large_row_group(file, [column]):
            raise Unusable(problem)
        return file.read_row_group(row_group, columns=[column], use_threads=False).column(0)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file.

    Raises:
        BenchmarkError: it is no readable Parquet file, or turns out not to be while it is read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise BenchmarkError(
            f"{str(path)!r} is no readable Parquet file ({error}). Fetch it again; a file of a few lines of "
            "text is a Git LFS pointer."
        ) from error


def column_names(path: Path) -> tuple[str, ...]:
    """Return the names of the columns."""
    with _opened(path) as file:
        return tuple(file.schema_arrow.names)


def column_texts(path: Path, column: str) -> list[str]:
    """Return one column as texts; none where the file has no such column."""
    if column not in column_names(path):
        return []
    rows = (row[column] for row, _ in rows_of(path, (), only=(column,)))
    return [str(value) for value in rows if value is not None]


def rows_of(
    path: Path, image_columns: Sequence[str], *, only: Sequence[str] | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, ParquetImage]]]:
    """Yield the values of the other columns, and column -> image where the row has one.

    Args:
        path: the file.
        image_columns: columns that hold images, where it has them.
        only: the other columns that are read; None reads all.

    Raises:
        BenchmarkError: it can't be read, or an image column is no image.
    """
    from pyarrow import types

    with _opened(path) as file:
        schema = file.schema_arrow
        texts = [name for name in only or schema.names if name not in image_columns]
        images = [name for name in image_columns if name in schema.names]
        for name in images:
            kind = schema.field(name).type
            if not (types.is_struct(kind) or types.is_binary(kind) or types.is_null(kind)):
                raise BenchmarkError(
                    f"{str(path)!r}: column {name!r} should hold images, it holds {kind}."
                )
    try:
        groups = iterate_bounded(_groups, path, texts, images, memory=_MEMORY, seconds=60)
        for group, (rows, present) in enumerate(groups):
            for number, row in enumerate(rows):
                has = (name for name, valid in zip(images, present, strict=True) if valid[number])
                yield row, {name: ParquetImage(path, name, group, number) for name in has}
    except Unusable as error:
        raise BenchmarkError(f"{str(path)!r} can't be read ({error}). Fetch it again.") from error


def _groups(
    path: Path, texts: Sequence[str], images: Sequence[str]
) -> Iterator[tuple[list[dict[str, Any]], list[list[bool]]]]:
    """Yield the rows of each row group, and which of them have an image; runs in a worker."""
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())  # which reserves no more than it needs
    with _opened(path) as file:
        if problem := large_row_group(file, [*texts, *images]):
            raise Unusable(problem)
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=list(texts), use_threads=False).to_pylist()
            # one image column at a time: together they may not fit
            read = (
                file.read_row_group(group, columns=[name], use_threads=False) for name in images
            )
            yield rows, [column[0].is_valid().to_pylist() for column in read]


# Files with image, question and answer, as PathVQA and VQA-RAD come from the hub


def is_pairs(header: Header) -> bool:
    """Tell whether a file has images, questions and answers without options."""
    return (
        header.suffix == ".parquet"
        and header.has("image", "question", "answer")
        and not {"options", "choices"} & set(header.fields)
    )


def part_of(path: Path) -> str:
    """Return which part of a data set a file's name says that it is; empty if it says nothing."""
    match = re.match(r"(dev|validation|val|test|train)\b", path.name)
    return match[1] if match else ""


def read_pairs(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read the files of one part."""
    sources: list[SourceFile] = []
    number = 0
    for path in paths:
        sources.append(hashed(path))
        for row, images in rows_of(path, ("image",)):
            add_pair(row, str(number), tuple(images.values()), collector)
            number += 1
    return collector.benchmark(sources)


def add_pair(
    record: Mapping[str, Any],
    identifier: str,
    images: tuple[ImageSource, ...],
    collector: Collector,
) -> None:
    """Add a question; yes and no are CLOSED, as users of PathVQA divide it."""
    answer = text_of(record, "answer").strip()
    if not answer:
        collector.problem("no_answer", identifier, "the gold answer is empty")
        return
    closed = answer.lower() in ("yes", "no")
    collector.add(
        Question(
            id=identifier,
            text=text_of(record, "question").strip(),
            images=images,
            answer=answer,
            groups={"answer_type": "CLOSED" if closed else "OPEN"},
        )
    )
