# SPDX-License-Identifier: Apache-2.0

"""Arrays in files: NPZ and NPY, HDF5, TIFF stacks; one image each or many along the first axis.

    images: "{name}.npz"                       # MedMNIST
    image_key: "{split}_images"
    label_key: "{split}_labels"

    images: "npz/{case}.npz"                   # MedSAM
    image_key: imgs
    mask_key: gts

    images: "imgs/{case}.npy"                  # or a file for each
    masks: "gts/{case}.npy"

``N`` counts images, ``H`` and ``W`` are height and width, ``C`` counts colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.readers import SourceOptions
from data_tools.readers.array_files import SUFFIXES, ArrayFile, Rows, open_arrays
from data_tools.readers.files import file_below, listed
from data_tools.readers.patterns import fill, paired, pattern
from data_tools.readers.rows import cell_text
from data_tools.readers.volume_samples import Window, scale_for
from data_tools.records import Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable

OTHER_LENGTH = "arrays of different lengths"


class Options(SourceOptions):
    """Keys of ``reader: arrays``.

    Args:
        images: pattern of the files' paths, with ``{group}`` and ``{label}`` as in ``reader: masks``.
        masks: pattern of the files of label maps; default: the images' own file, if ``mask_key`` is given.
        image_key: name of the array in an NPZ or HDF5 file; default its only one. ``{name}`` in it stands
            for any text: all arrays that fit are read.
        mask_key: of label maps ``[N, H, W]``; the value is the label's code, 0 the background.
        label_key: of a code or name for each image, ``[N]``, or of a column of 0 and 1 for each label.
        group_key: of patient or case of each image, ``[N]``. Default: with ``label_key`` each image is alone,
            else the file is the group.
        axes: order of the axes. Default by their number: HW, HWC if the last is 3 or 4 and else NHW, NHWC.
        window: how deep levels become grey levels, see `volume_samples`; default: each image's own range.
        max_bytes: of one image, and of an array that has to be held as a whole.
    """

    default_source_task: ClassVar[str] = "2D classification"

    reader: Literal["arrays"]
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
        for template in filter(None, (self.images, self.masks)):
            if template.startswith("/") or ".." in template.split("/"):
                raise ValueError(f"the pattern {template!r} leads out of the root")
            if not template.lower().endswith((*SUFFIXES, "}")):
                raise ValueError(f"the pattern {template!r} ends in none of {', '.join(SUFFIXES)}")
        if not (self.masks or self.mask_key or self.label_key or "{label}" in self.images):
            raise ValueError(
                "name the labels: `label_key`, `mask_key`, `masks` or {label} in `images`"
            )
        return self


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each file of images.

    Raises:
        SourceError: no file fits ``images``, or one can be read in two ways.
    """
    labels = None if options.labels is None else set(options.labels)
    masks = [options.masks] if options.masks else []
    for found in paired(options, options.images, masks, labels=labels):
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
        if len(file.keys) != 1:
            raise Unusable("file of several arrays", f"{listed(file.keys)}; say `image_key`")
        return [(file.keys[0], {})]
    own = pattern(options.image_key)
    found = [(key, texts) for key in file.keys if (texts := own.match(key)) is not None]
    if not found:
        raise Unusable("no such array", f"{options.image_key!r}; there are {listed(file.keys)}")
    return found


class _Arrays:
    """The arrays that belong together.

    Raises:
        Unusable: one is missing, or they don't fit each other.
    """

    def __init__(
        self,
        options: Options,
        file: ArrayFile,
        mask_file: ArrayFile,
        key: str,
        texts: dict[str, str],
    ) -> None:
        self.options, self.key = options, key
        self.images = file[key]
        shape = self.images.shape
        coloured = len(shape) == 3 and shape[2] in (3, 4)
        default = {2: "HW", 3: "HWC" if coloured else "NHW", 4: "NHWC"}.get(len(shape))
        self.axes = options.axes or default
        if self.axes is None or len(self.axes) != len(shape):
            raise Unusable("array of another number of axes", f"{key} {list(shape)}; say `axes`")
        self.many = self.axes[0] == "N"
        self.count = shape[0] if self.many else 1
        own = options.mask_key and fill(options.mask_key, texts)
        if options.masks and own is None:
            own = mask_file.keys[0] if len(mask_file.keys) == 1 else "mask_key"
        self.masks = mask_file[own] if own is not None else None
        self.labels, self.groups = (
            None if name is None else self._whole(file[fill(name, texts)])
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
        images = self.images.rows() if self.many else iter([self.images.whole()])
        masks: Iterator[Any] = iter([None] * self.count)
        if self.masks is not None:
            masks = self.masks.rows() if self.many else iter([self.masks.whole()])
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
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
        scale = scale_for(self.options.window, image, modality=self.options.modality)
        return scale.apply(image), {"window": scale.text}

    def _annotations(
        self, index: int, mask: np.ndarray | None, size: tuple[int, ...]
    ) -> Iterator[Annotation]:
        if self.labels is not None:
            cells = [cell_text(value) for value in self.labels[index].tolist()]
            if len(cells) == 1:
                yield Annotation(cells[0])
            elif not set(cells) <= {"0", "1", "true", "false"}:
                raise Unusable("unclear cell of a label's column", f"{listed(cells)}, not 0 and 1")
            else:
                applies = (n for n, cell in enumerate(cells) if cell in ("1", "true"))
                yield from (Annotation(str(number)) for number in applies)
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
