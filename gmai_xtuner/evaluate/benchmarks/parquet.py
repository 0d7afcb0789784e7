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
        except (OSError, IndexError, pa.ArrowException) as error:
            raise image_error(self.name, f"can't be read ({error})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise image_error(self.name, "no image stands there", "missing_image")
        return data


@lru_cache(maxsize=2)  # questions are asked in their order, and a row group is read as a whole
def _column(path: str, changed: int, size: int, row_group: int, column: str) -> Any:
    """Read one column of one row group; time and size are there for the cache alone."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(0)


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
    with _opened(path) as file:
        if column not in file.schema_arrow.names:
            return []
        values = file.read(columns=[column])[column].to_pylist()
    return [str(value) for value in values if value is not None]


def rows_of(
    path: Path, image_columns: Sequence[str]
) -> Iterator[tuple[dict[str, Any], dict[str, ParquetImage]]]:
    """Yield the values of the other columns, and column -> image where the row has one.

    Raises:
        BenchmarkError: it can't be read, or an image column is no image.
    """
    from pyarrow import types

    with _opened(path) as file:
        schema = file.schema_arrow
        texts = [name for name in schema.names if name not in image_columns]
        images = [name for name in image_columns if name in schema.names]
        for name in images:
            kind = schema.field(name).type
            if not (types.is_struct(kind) or types.is_binary(kind) or types.is_null(kind)):
                raise BenchmarkError(
                    f"{str(path)!r}: column {name!r} should hold images, it holds {kind}."
                )
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=texts).to_pylist()
            # one image column at a time: together they may not fit
            columns = (file.read_row_group(group, columns=[name])[name] for name in images)
            present = [column.is_valid().to_pylist() for column in columns]
            for number, row in enumerate(rows):
                has = (name for name, valid in zip(images, present, strict=True) if valid[number])
                yield row, {name: ParquetImage(path, name, group, number) for name in has}


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
