# SPDX-License-Identifier: Apache-2.0

"""Arrays of NPZ, NPY, HDF5 and TIFF files, row by row: what a file claims is bounded before it is read.

Nothing is unpickled, and no link or external storage of an HDF5 file is followed.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.readers.files import listed
from gmai_xtuner.core.errors import Unusable

SUFFIXES = (".npz", ".npy", ".h5", ".hdf5", ".tif", ".tiff")
UNREADABLE = "array that can't be read"
TOO_LARGE = "array is too large"
MAX_PAGES = 20_000
_RATIO = 1100  # zlib packs at most 1032 bytes into one


@dataclass(frozen=True, slots=True)
class Rows:
    """An array whose rows are read one after the other.

    Args:
        name: in the file.
        shape, dtype: of the array.
        rows: yields what lies at each index of the first axis; of an array without axes nothing.
        whole: returns all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[], Iterator[np.ndarray]]
    whole: Callable[[], np.ndarray]


class ArrayFile:
    """The arrays of an open file. ``keys`` are their names; the one of an NPY or TIFF file is ``""``."""

    def __init__(self, makers: Mapping[str, Callable[[], Rows]]) -> None:
        self._makers = makers
        self.keys = list(makers)

    def __getitem__(self, key: str) -> Rows:
        if key not in self._makers:
            raise Unusable("no such array", f"{key!r}; there are {listed(self.keys)}")
        return self._makers[key]()


@contextmanager
def open_arrays(path: Path, max_bytes: int) -> Iterator[ArrayFile]:
    """Open a file.

    Args:
        path: of the file; its suffix is one of `SUFFIXES`.
        max_bytes: of one row, and of an array that is read as a whole.

    Raises:
        Unusable: it can't be read, here or inside the block.
    """
    opened = {".npz": _npz, ".npy": _npy, ".h5": _hdf5, ".hdf5": _hdf5}
    bad = (
        *(OSError, EOFError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError),
        *(MemoryError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError),
    )
    with ExitStack() as stack:
        try:
            yield opened.get(path.suffix.lower(), _tiff)(path, max_bytes, stack)
        except Unusable:
            raise
        except bad as error:
            text = " ".join(str(error).replace(str(path), path.name).split())
            raise Unusable(UNREADABLE, f"{type(error).__name__}: {text[-300:]}") from error


def _check(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise Unusable(TOO_LARGE, f"{name}: {size} bytes are more than `max_bytes`, {max_bytes}")


# --- NPY and NPZ ----------------------------------------------------------------------------------


def _npy(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    def open_file() -> BinaryIO:
        return stack.enter_context(path.open("rb"))

    return ArrayFile({"": lambda: _numpy_rows("", open_file, path.stat().st_size, max_bytes)})


def _npz(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    archive = stack.enter_context(zipfile.ZipFile(path))

    def maker(info: zipfile.ZipInfo, name: str) -> Callable[[], Rows]:
        def make() -> Rows:
            packed = info.compress_type == zipfile.ZIP_DEFLATED
            if not packed and info.compress_type != zipfile.ZIP_STORED:
                raise Unusable(UNREADABLE, f"{name}: packed neither by deflate nor stored")
            length = min(info.file_size, info.compress_size * (_RATIO if packed else 1))
            return _numpy_rows(
                name, lambda: stack.enter_context(archive.open(info)), length, max_bytes
            )

        return make

    names = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    return ArrayFile({info.filename[:-4]: maker(info, info.filename[:-4]) for info in names})


def _numpy_rows(name: str, open_: Callable[[], Any], length: int, max_bytes: int) -> Rows:
    def opened() -> tuple[Any, tuple[int, ...], bool, np.dtype]:
        stream = open_()
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise Unusable(UNREADABLE, f"{name}: NPY version {version}")
        return stream, *read(stream)

    start, shape, fortran, dtype = opened()
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise Unusable(UNREADABLE, f"{name}: Python objects, which aren't unpickled")
    if min(shape, default=1) < 1 or size > length - start.tell():
        raise Unusable(UNREADABLE, f"{name}: {size} bytes are promised, there are at most {length}")

    def exactly(stream: Any, count: int) -> bytes:
        data = stream.read(count)
        if len(data) < count:
            raise Unusable(UNREADABLE, f"{name}: the file ends inside of it")
        return data

    def whole() -> np.ndarray:
        _check(name, size, max_bytes)
        flat = np.frombuffer(exactly(opened()[0], size), dtype=dtype)
        return flat.reshape(shape, order="F" if fortran else "C")

    def rows() -> Iterator[np.ndarray]:
        if fortran:
            yield from whole()
            return
        step = size // shape[0]
        _check(name, step, max_bytes)
        stream = opened()[0]
        for _ in range(shape[0]):
            yield np.frombuffer(exactly(stream, step), dtype=dtype).reshape(shape[1:])

    return Rows(name, shape, dtype, rows, whole)


# --- HDF5 -----------------------------------------------------------------------------------------


def _hdf5(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    import h5py

    file = stack.enter_context(h5py.File(path, "r"))
    found: dict[str, Any] = {}

    def add(name: str, item: Any) -> None:  # visititems follows hard links alone
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(add)

    def maker(name: str, item: Any) -> Callable[[], Rows]:
        def make() -> Rows:
            if item.external or item.is_virtual:
                raise Unusable(UNREADABLE, f"{name}: its numbers lie in other files")
            size = math.prod(item.shape or ()) * item.dtype.itemsize
            _check(name, math.prod(item.chunks or (1,)) * item.dtype.itemsize, max_bytes)

            def whole() -> np.ndarray:
                _check(name, size, max_bytes)
                text = h5py.check_string_dtype(item.dtype)
                return np.asarray(item.asstr()[()] if text else item[()])

            def rows() -> Iterator[np.ndarray]:
                _check(name, size // max(item.shape[0], 1), max_bytes)
                yield from (item[index] for index in range(item.shape[0]))

            return Rows(name, item.shape, item.dtype, rows, whole)

        return make

    return ArrayFile({name: maker(name, item) for name, item in sorted(found.items())})


# --- TIFF -----------------------------------------------------------------------------------------


def _tiff(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    """Open a TIFF stack: pages of one size, as ImageJ, microscopes and nnU-Net write them."""
    import tifffile

    tiff = stack.enter_context(tifffile.TiffFile(path))
    series = tiff.series[0]
    pages: list[Any] = list(series.pages)
    first: Any = series.keyframe
    if len(pages) > MAX_PAGES or series.axes[1:] not in ("YX", "YXS") or len(pages) != len(series):
        detail = f"axes {series.axes} of {series.shape}; one axis before Y and X is read"
        raise Unusable("array of another number of axes", detail)
    _check("a page", math.prod(first.shape) * first.dtype.itemsize, max_bytes)

    def rows() -> Iterator[np.ndarray]:
        yield from (page.asarray() for page in pages)

    def whole() -> np.ndarray:
        _check("the stack", math.prod(series.shape) * first.dtype.itemsize, max_bytes)
        return np.stack(list(rows()))

    shape = (len(pages), *first.shape)
    return ArrayFile({"": lambda: Rows("", shape, first.dtype, rows, whole)})
