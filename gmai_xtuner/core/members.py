# SPDX-License-Identifier: Apache-2.0

"""What lies in containers of images: a function a suffix that lists it, and what reads a row or an array.

A member is a name and ``(kind, offset, packed, size, check)``: where its bytes begin, how many they are
packed and unpacked (0: not known before), and a number that changes with its content. Images in Parquet and
Arrow files are a column as `datasets` writes it, a struct of ``bytes`` and ``path``.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.bounded import run_bounded

STORED, DEFLATED, PLAIN, FOLDER, UNREADABLE, ROW = range(6)
"""Kinds of members: of a zip file as it is or packed, bytes as they lie, a loose file, packed in another way,
a row of a Parquet file."""

Member = tuple[str, tuple[int, ...]]
_MAX_VALUES = 2**24
MAX_COLUMN = 2**31
"""Bytes of a column in a row group: two kilobytes can hold a thousand million equal values."""
ERRORS = (
    *(zipfile.BadZipFile, tarfile.TarError, struct.error, OSError, ValueError),
    *(RuntimeError, OverflowError, EOFError, LookupError, TypeError),
)
"""What the libraries raise on damaged files."""


def _zip_members(path: str) -> Iterator[Member]:
    methods = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = UNREADABLE if info.flag_bits & 1 else methods.get(info.compress_type, UNREADABLE)
            place = (kind, info.header_offset, info.compress_size, info.file_size, info.CRC)
            if not info.is_dir():
                yield info.filename, place


def _tar_members(path: str) -> Iterator[Member]:
    with tarfile.open(path, "r:") as archive, open(path, "rb") as file:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if info.isreg() and not info.issparse():
                check = zlib.crc32(f"{info.mtime}/{info.chksum}".encode())
                yield info.name, (PLAIN, info.offset_data, info.size, info.size, check)
            elif not info.isdir():
                yield info.name, (UNREADABLE, 0, 0, 0, 0)
        file.seek(archive.offset)
        if len(end := file.read(512)) < 512 or any(end):
            raise ValueError(f"it is cut off or damaged at byte {archive.offset}")
        while block := file.read(2**20):
            if any(block):
                raise ValueError("it goes on behind its end, as two tar files that were joined")


def large_row_group(file: Any, columns: Sequence[str]) -> str:
    """Say which row group of a Parquet file claims more than is read at once, or nothing."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        for at in range(group.num_columns):
            column = group.column(at)
            if column.path_in_schema.split(".")[0] in columns and (
                column.num_values > _MAX_VALUES or column.total_uncompressed_size > MAX_COLUMN
            ):
                size = f"{column.num_values} values, {column.total_uncompressed_size} bytes"
                return f"has {size}, in one row group of {column.path_in_schema!r}"
    return ""


def image_columns(schema: Any) -> list[str]:
    """Return the columns of an Arrow schema that hold images."""
    return [one.name for one in schema if str(one.type).startswith("struct<bytes: ")]


def _image_column(schema: Any) -> str:
    if len(found := image_columns(schema)) == 1:
        return found[0]
    columns = ", ".join(schema.names)
    raise ValueError(f"{len(found)} columns of images (bytes and path), not one, in {columns}")


def _names(images: Any) -> list[str]:
    """Return a name a row, empty without an image: its path, or where they don't tell, its number from 0."""
    import pyarrow.compute as pc

    is_image, paths = images.is_valid().to_pylist(), pc.struct_field(images, "path").to_pylist()
    named = [path for path, there in zip(paths, is_image, strict=True) if there]
    if not all(named) or len(set(named)) < len(named):
        paths = list(map(str, range(len(paths))))
    return [path if there else "" for path, there in zip(paths, is_image, strict=True)]


def parquet_names(file: Any, column: str) -> list[str]:
    """Return the name of each row's image in a ``pyarrow.parquet.ParquetFile``; empty if it has none."""
    return _names(file.read([f"{column}.path"], use_threads=False)[column])


def _parquet_members(path: str) -> Iterator[Member]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        column = _image_column(file.schema_arrow)
        if problem := large_row_group(file, [column]):
            raise ValueError(f"it {problem}")
        names = iter(parquet_names(file, column))
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            chunks = [group.column(n) for n in range(group.num_columns)]
            sizes = [(one.total_compressed_size, one.num_values) for one in chunks]
            for row in range(group.num_rows):
                check = zlib.crc32(f"{sizes}/{row}".encode())
                if name := next(names):
                    yield name, (ROW, number << 32 | row, 0, 0, check)


def _arrow_members(path: str) -> Iterator[Member]:
    import pyarrow as pa

    with pa.memory_map(path) as mapped:
        whole = mapped.read_buffer()
        is_file = whole.slice(0, 6).to_pybytes() == b"ARROW1"
        opened = pa.ipc.open_file(whole) if is_file else pa.ipc.open_stream(whole)
        table, row = opened.read_all(), 0
        images = table[_image_column(table.schema)]
        names = _names(images)
        for chunk in images.chunks:
            content = chunk.field("bytes")
            content.validate(full=True)
            _, places, data = content.buffers()
            begin = data.address - whole.address if data else 0
            if data and not 0 <= begin <= whole.size - data.size:
                raise ValueError("it is compressed; write it without compression")
            width = "<i8" if content.type == pa.large_binary() else "<i4"
            ends = np.frombuffer(places, width)[content.offset :] if places else ()
            for at, there in enumerate(content.is_valid().to_pylist()):
                if names[row] and there:
                    start, size = begin + int(ends[at]), int(ends[at + 1] - ends[at])
                    check = zlib.crc32(whole[start : start + min(size, 4096)])
                    yield names[row], (PLAIN, start, size, size, check)
                row += 1


def content_of_row(path: str, row: int) -> tuple[bytes, str]:
    """Return the image of a row (offset of its member) of a Parquet file, or what is wrong with it."""
    try:
        state = os.stat(path)
        images = group_column(path, state.st_mtime_ns, state.st_size, row >> 32)
        content = images[row & 0xFFFFFFFF]["bytes"].as_py()
    except ERRORS as error:
        return b"", str(error)
    return content or b"", "" if content else "it has no bytes"


@lru_cache(maxsize=2)  # rows are mostly asked for in their order
def group_column(path: str, changed: int, size: int, group: int, column: str = "") -> Any:
    """Read a column of a row group of a Parquet file, by default that of its images, in a bounded worker.

    ``changed`` and ``size`` of the file are there for the cache alone. `Unusable` if it can't be read.
    """
    return run_bounded(_group_column, path, group, column, memory=2 * MAX_COLUMN, seconds=60)


def _group_column(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        column = column or _image_column(file.schema_arrow)
        if problem := large_row_group(file, [column]):
            raise Unusable(problem)
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


MEMBERS = {
    ".zip": _zip_members,
    ".tar": _tar_members,
    ".parquet": _parquet_members,
    ".arrow": _arrow_members,
}
"""Suffix of a container -> function that lists its members, or raises one of `ERRORS`."""
