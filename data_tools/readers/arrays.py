# SPDX-License-Identifier: Apache-2.0

"""Arrays in files: NPZ and NPY, HDF5, TIFF stacks; one image each or many along the first axis.

``N`` counts images, ``H`` and ``W`` are height and width, ``C`` counts colours. What a file claims is bounded
before it is read; nothing is unpickled, and no link or external storage of an HDF5 file is followed.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.readers import SourceOptions
from data_tools.readers.files import file_below, listed
from data_tools.readers.patterns import Places, check_templates, fill, paired, pattern
from data_tools.readers.rows import cell_text
from data_tools.readers.volume import Window, window_for
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.dicom import damage_as
from gmai_xtuner.core.imaging.images import MAX_PIXELS
from gmai_xtuner.core.imaging.volume_headers import library_errors

SUFFIXES = (".npz", ".npy", ".h5", ".hdf5", ".tif", ".tiff")
OTHER_AXES = "array of another number of axes"
OTHER_LENGTH = "arrays of different lengths"
UNREADABLE = "array that can't be read"
TOO_LARGE = "array is too large"
MAX_PAGES = 20_000
_RATIO = 1100  # zlib packs at most 1032 bytes into one


class Options(SourceOptions):
    """Keys of ``reader: arrays``; docs/corpus.md explains them.

    Without ``window`` each image has its own range; ``max_bytes`` is of one image, and of an array that has
    to be held as a whole.
    """

    native_memory: ClassVar[int] = 2**32

    images: str
    masks: str | None = None
    image_key: str | None = None
    mask_key: str | None = None
    label_key: str | None = None
    group_key: str | None = None
    axes: Literal["HW", "HWC", "CHW", "NHW", "NHWC", "NCHW"] | None = None
    window: Window | None = None
    max_bytes: int = Field(2**30, ge=1)

    @model_validator(mode="after")
    def _says_what_is_needed(self) -> Options:
        check_templates(*filter(None, (self.images, self.masks)), suffixes=SUFFIXES)
        if not (self.masks or self.mask_key or self.label_key or "{label}" in self.images):
            ways = "`label_key`, `mask_key`, `masks` or {label} in `images`"
            raise ValueError(f"name the labels: {ways}")
        return self


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each file of images."""
    for found in paired(options, options.images, [options.masks] if options.masks else []):
        yield Unit(found.path, (found.places, [path for path, _ in found.masks]))


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the images of one file."""
    places, masks = unit.payload
    if options.masks and len(masks) != 1:
        raise Unusable("image without a mask" if not masks else "image with several masks")
    with ExitStack() as stack:
        file, mask_file = (
            stack.enter_context(open_arrays(file_below(options, name), options.max_bytes))
            for name in (unit.key, masks[0] if masks else unit.key)
        )
        for key, texts in _image_keys(options, file):
            with drops.image(f"{unit.key} {key}".strip()):
                arrays = _Arrays(options, file, mask_file, key, texts)
                yield from arrays.samples(unit.key, places, drops)


def _image_keys(options: Options, file: ArrayFile) -> list[tuple[str, dict[str, str]]]:
    if options.image_key is None:
        if len(file) != 1:
            raise Unusable("file of several arrays", f"{listed(list(file))}; say `image_key`")
        return [(next(iter(file)), {})]
    own = pattern(options.image_key)
    found = [(key, texts) for key in file if (texts := own.match(key)) is not None]
    if not found:
        raise Unusable("no such array", f"{options.image_key!r}; there are {listed(list(file))}")
    return found


class _Arrays:
    """The arrays that belong together; `Unusable` if one is missing, or they don't fit each other."""

    def __init__(
        self, options: Options, file: ArrayFile, mask_file: ArrayFile, key: str, texts: Places
    ) -> None:
        self.options, self.key = options, key
        self.images = _array(file, key)
        shape = self.images.shape
        coloured = len(shape) == 3 and shape[2] in (3, 4)
        default = {2: "HW", 3: "HWC" if coloured else "NHW", 4: "NHWC"}.get(len(shape))
        self.axes = options.axes or default
        if self.axes is None or len(self.axes) != len(shape):
            raise Unusable(OTHER_AXES, f"{key} {list(shape)}; say `axes`")
        height, width = (shape[self.axes.index(axis)] for axis in "HW")
        if height * width > MAX_PIXELS:  # before any is decoded
            raise Unusable("image is too large", f"{key} {width} x {height} pixels".strip())
        self.many = self.axes[0] == "N"
        self.count = shape[0] if self.many else 1
        own = options.mask_key and fill(options.mask_key, texts)
        if options.masks and own is None:
            own = next(iter(mask_file)) if len(mask_file) == 1 else "mask_key"
        self.masks = _array(mask_file, own) if own is not None else None
        self.labels, self.groups = (
            None if name is None else self._whole(_array(file, fill(name, texts)))
            for name in (options.label_key, options.group_key)
        )
        if self.masks is not None and self.many:
            self._check(self.masks.shape[0] if self.masks.shape else 0, "masks")

    def _whole(self, rows: Rows) -> np.ndarray:
        values = rows.whole()
        values = values.reshape(1, -1) if not self.many else values
        self._check(len(values), rows.name)
        return values.reshape(len(values), -1)

    def _check(self, length: int, name: str) -> None:
        if length != self.count:
            raise Unusable(OTHER_LENGTH, f"{self.count} in {self.key}, {length} in {name}")

    def samples(self, name: str, places: dict[str, str], drops: Drops) -> Iterator[Sample]:
        """Yield a sample for each image."""

        def each(rows: Rows | None) -> Iterable[Any]:
            if rows is None:
                return [None] * self.count
            return rows.rows() if self.many else [rows.whole()]

        for index, (image, mask) in enumerate(
            zip(each(self.images), each(self.masks), strict=True)
        ):
            part: dict[str, int | str] = {"array": self.key} if self.key else {}
            part |= {"index": index} if self.many else {}
            where = "#".join([name, *map(str, part.values())])
            with drops.image(where):
                pixels, done = self._pixels(image)
                found = [Annotation(places["label"])] if "label" in places else []
                found += self._annotations(index, mask, pixels.shape[:2])
                alone = self.labels is not None and self.masks is None
                group = places.get("group") or (where if alone and self.many else name)
                if self.groups is not None:
                    group = cell_text(self.groups[index].flat[0].item())
                yield Sample(pixels, name, tuple(found), part=part, group=group, preprocessing=done)

    def _pixels(self, image: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        assert self.axes is not None
        image = np.moveaxis(image, 0, -1) if "CH" in self.axes else image
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        if image.ndim == 3 and image.shape[2] != 3:
            raise Unusable("array of an unsupported number of colours", str(image.shape[2]))
        if image.dtype.kind not in "buif":
            raise Unusable("array of no numbers", str(image.dtype)[:60])
        image = image.astype(image.dtype.newbyteorder("="), copy=False)
        if self.options.window is None:
            deep = image.dtype not in (np.uint8, np.bool_)
            return image, {"levels": f"{image.dtype} by their own range"} if deep else {}
        window = window_for(self.options.window, image, modality=self.options.modality)
        return window.apply(image), {"window": window.text}

    def _annotations(
        self, index: int, mask: np.ndarray | None, size: tuple[int, ...]
    ) -> Iterator[Annotation]:
        if self.labels is not None:
            cells = [cell_text(value) for value in self.labels[index].tolist()]
            if len(cells) > 1 and not set(cells) <= {"0", "1", "true", "false"}:
                raise Unusable("unclear cell of a label's column", f"{listed(cells)}, not 0 and 1")
            applying = [str(n) for n, cell in enumerate(cells) if cell in ("1", "true")]
            yield from map(Annotation, cells if len(cells) == 1 else applying)
        if mask is None:
            return
        mask = mask.reshape(mask.shape[:2]) if mask.ndim == 3 and mask.shape[2] == 1 else mask
        if mask.shape != size:
            raise Unusable("mask of another size than its image", f"{mask.shape}, image {size}")
        if mask.dtype.kind not in "bui" and not (mask == np.rint(mask)).all():
            raise Unusable("label map with fractions", "nearest neighbour keeps labels whole")
        for value in np.unique(mask):
            if value:
                yield Annotation(str(int(value)), mask=mask == value)


@dataclass(frozen=True, slots=True)
class Rows:
    """An array whose ``rows``, one an index of the first axis, are read one by one; or the ``whole``."""

    name: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[np.ndarray]]
    whole: Callable[[], np.ndarray]


ArrayFile = Mapping[str, Callable[[], Rows]]
"""The arrays of an open file by their names; the one of an NPY or TIFF file is called ``""``."""


def _array(file: ArrayFile, key: str) -> Rows:
    if key not in file:
        raise Unusable("no such array", f"{key!r}; there are {listed(list(file))}")
    return file[key]()


@contextmanager
def open_arrays(path: Path, max_bytes: int) -> Iterator[ArrayFile]:
    """Open a file, or raise `Unusable`; ``max_bytes`` is of a row, and of an array held as a whole."""
    opened = {".npz": _npz, ".npy": _npy, ".h5": _hdf5, ".hdf5": _hdf5}
    with ExitStack() as stack, library_errors(path, UNREADABLE):
        yield opened.get(path.suffix.lower(), _tiff)(path, max_bytes, stack)


def _check(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise Unusable(TOO_LARGE, f"{name}: {size} bytes are more than `max_bytes`, {max_bytes}")


def _npy(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    def open_file() -> BinaryIO:
        return stack.enter_context(path.open("rb"))

    return {"": lambda: _numpy_rows("", open_file, path.stat().st_size, max_bytes)}


def _npz(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    archive = stack.enter_context(zipfile.ZipFile(path))

    def make(info: zipfile.ZipInfo, name: str) -> Rows:
        packed = info.compress_type == zipfile.ZIP_DEFLATED
        if not packed and info.compress_type != zipfile.ZIP_STORED:
            raise Unusable(UNREADABLE, f"{name}: packed neither by deflate nor stored")
        length = min(info.file_size, info.compress_size * (_RATIO if packed else 1))
        return _numpy_rows(name, lambda: stack.enter_context(archive.open(info)), length, max_bytes)

    found = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    return {info.filename[:-4]: partial(make, info, info.filename[:-4]) for info in found}


def _numpy_rows(name: str, open_: Callable[[], Any], length: int, max_bytes: int) -> Rows:
    def opened() -> tuple[Any, tuple[int, ...], bool, np.dtype]:
        stream = open_()
        with damage_as(UNREADABLE):  # numpy hands the header to Python's own parser
            major, minor = np.lib.format.read_magic(stream)
            read = getattr(np.lib.format, f"read_array_header_{major}_{minor}", None)
            if read is None:
                raise Unusable(UNREADABLE, f"{name}: NPY version {major}.{minor}")
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

    return Rows(name, shape, rows, whole)


def _hdf5(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    import h5py

    file = stack.enter_context(h5py.File(path, "r"))
    found: dict[str, Any] = {}

    def add(name: str, item: Any) -> None:  # visititems follows hard links alone
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(add)

    def make(name: str, item: Any) -> Rows:
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

        return Rows(name, item.shape, rows, whole)

    return {name: partial(make, name, item) for name, item in sorted(found.items())}


def _tiff(path: Path, max_bytes: int, stack: ExitStack) -> ArrayFile:
    """Open a TIFF stack: pages of one size, as ImageJ, microscopes and nnU-Net write them."""
    import tifffile

    tiff = stack.enter_context(tifffile.TiffFile(path))
    if (count := len(tiff.pages)) > MAX_PAGES:
        raise Unusable(TOO_LARGE, f"{count} pages; up to {MAX_PAGES} are read")
    series = tiff.series[0]
    pages: list[Any] = list(series.pages)
    first: Any = series.keyframe
    if series.axes[1:] not in ("YX", "YXS") or len(pages) != len(series):
        detail = f"axes {series.axes} of {series.shape}; one axis before Y and X is read"
        raise Unusable(OTHER_AXES, detail)
    if int(first.photometric) == 0:
        raise Unusable(UNREADABLE, "it stores white as 0; save it with 0 as black")
    _check("a page", math.prod(first.shape) * first.dtype.itemsize, max_bytes)

    def rows() -> Iterator[np.ndarray]:
        yield from (page.asarray() for page in pages)

    def whole() -> np.ndarray:
        _check("the stack", math.prod(series.shape) * first.dtype.itemsize, max_bytes)
        return np.stack(list(rows()))

    shape = (len(pages), *first.shape)
    return {"": lambda: Rows("", shape, rows, whole)}
