"""Images that stand inside a benchmark's own file: base64 in a table, or bytes in a Parquet column."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import ImageError

_FETCH_AGAIN = "Load the benchmark again; if that does not help, fetch its file again."


@dataclass(frozen=True, slots=True)
class Base64Image:
    """An image as base64 text in a file.

    Args:
        path: the file.
        offset: of the first character, in bytes.
        length: of the text, in bytes.
        file_size: of the file when it was indexed, in bytes; another size now means another file.
    """

    path: Path
    offset: int
    length: int
    file_size: int

    @property
    def name(self) -> str:
        return f"{self.path.name}, byte {self.offset}"

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self.offset)
                text = file.read(self.length)
        except OSError as error:
            raise _image_error(self.name, f"{str(self.path)!r} can't be read ({error})") from error
        if size != self.file_size:
            raise _image_error(
                self.name,
                f"{str(self.path)!r} had {self.file_size} bytes when it was read, it has {size} now",
            )
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise _image_error(self.name, f"not base64 ({error})", "bad_image") from error


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
            stamp = os.stat(self.path)
            column = _column(
                str(self.path), stamp.st_mtime_ns, stamp.st_size, self.row_group, self.column
            )
            value = column[self.row].as_py()
        except (OSError, IndexError, pa.ArrowException) as error:
            raise _image_error(self.name, f"can't be read ({error})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise _image_error(self.name, "no image stands there", "missing_image")
        return data


@lru_cache(maxsize=2)  # questions are asked in their order, and a row group is read as a whole
def _column(path: str, changed: int, size: int, row_group: int, column: str) -> Any:
    """One column of one row group; time and size are there for the cache alone."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(0)


def _image_error(name: str, problem: str, reason: str = "missing_image") -> ImageError:
    return ImageError(f"image {name}: {problem}", remedy=_FETCH_AGAIN, reason=reason)
