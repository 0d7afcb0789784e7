"""Parquet files of the hub -> rows without images, and where the images stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.benchmark import BenchmarkError
from gmai_xtuner.evaluate.benchmarks.stored_images import ParquetImage


def column_names(path: Path) -> tuple[str, ...]:
    """Names of the columns.

    Raises:
        BenchmarkError: it is no readable Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return tuple(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def column_texts(path: Path, column: str) -> list[str]:
    """One column as texts; none where the file has no such column.

    Raises:
        BenchmarkError: it is no readable Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if column not in column_names(path):
        return []
    try:
        values = pq.read_table(path, columns=[column]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    return [str(value) for value in values if value is not None]


def rows_of(
    path: Path, image_columns: Sequence[str]
) -> Iterator[tuple[dict[str, Any], dict[str, ParquetImage]]]:
    """(values of the other columns, column -> image where the row has one), row by row.

    Raises:
        BenchmarkError: it can't be read, or an image column is no image.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            texts = [name for name in names if name not in image_columns]
            images = [name for name in image_columns if name in names]
            for name in images:
                kind = file.schema_arrow.field(name).type
                if not (
                    pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_null(kind)
                ):
                    raise BenchmarkError(
                        f"{str(path)!r}: column {name!r} should hold images, it holds {kind}."
                    )
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=texts).to_pylist()
                present = {
                    name: file.read_row_group(group, columns=[name])
                    .column(0)
                    .is_valid()
                    .to_pylist()
                    for name in images
                }
                for number, row in enumerate(rows):
                    yield (
                        row,
                        {
                            name: ParquetImage(path, name, group, number)
                            for name in images
                            if present[name][number]
                        },
                    )
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> BenchmarkError:
    return BenchmarkError(
        f"{str(path)!r} is no readable Parquet file ({error}). Fetch it again; a file of a few lines of text "
        "is a Git LFS pointer."
    )
