# SPDX-License-Identifier: Apache-2.0

"""Real medical images that the project's dependencies carry in their wheels, with known labels.

Nothing is downloaded. A label is written down only where the file or its library's documentation
states it: ``CT_small.dcm`` names no body part, so it has none here.

Shapes: a plane is ``uint8 [H, W, 3]``; a box is ``(left, top, right, bottom)`` in pixels of its
plane, right and bottom exclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import skimage
from PIL import Image
from pydicom.pixels import apply_modality_lut

Box = tuple[int, int, int, int]

MODALITIES = ("ct", "mr", "fundus", "histology")
SPLITS = ("train", "heldout")
SOFT_TISSUE = (40.0, 400.0)  # centre and width of the usual CT window for soft tissue, in HU


class SourceError(ValueError):
    """A dependency does not carry an image, or carries another than the labels describe."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One image of one source, with the two regions that crops may come from.

    ``regions`` maps a split to its box; a split that this plane does not serve has no entry.
    ``tissue`` is ``bool [H, W]``: where the image shows tissue and not empty background.
    ``window`` names the CT display window, None for other modalities; planes that differ in it
    alone show the same pixels, those of ``(source, index)``.
    """

    source: str
    index: int
    modality: str
    anatomy: str | None
    window: str | None
    pixels: np.ndarray
    tissue: np.ndarray
    regions: dict[str, Box]


def window_to_uint8(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Grey levels of a linear VOI window, DICOM PS3.3 C.11.2.1.2.1: ``[H, W]`` to ``uint8``."""
    levels = (values - (center - 0.5)) / (width - 1.0) + 0.5
    return np.rint(np.clip(levels, 0.0, 1.0) * 255.0).astype(np.uint8)


def read_dicom(path: Path) -> tuple[np.ndarray, pydicom.Dataset]:
    """Values after the modality LUT (HU for CT), ``float64 [H, W]``, and the header.

    For monochrome files. Padding pixels get the smallest value that is not padding, so that they
    show as background.
    """
    header = pydicom.dcmread(path)
    stored = header.pixel_array
    values = apply_modality_lut(stored, header).astype(np.float64)
    padding = header.get("PixelPaddingValue")
    if padding is not None and (stored == padding).any():
        values[stored == padding] = values[stored != padding].min()
    return values, header


def _first(value: object) -> float:
    """The first value of a DICOM element that may hold one or several, such as WindowCenter."""
    return float(value if isinstance(value, (int, float, str)) else value[0])  # type: ignore[index]


def _grey(levels: np.ndarray, header: pydicom.Dataset | None = None) -> np.ndarray:
    """Grey levels ``[H, W]`` as RGB ``[H, W, 3]``, inverted where the header says so."""
    if header is not None and header.PhotometricInterpretation == "MONOCHROME1":
        levels = 255 - levels
    return np.repeat(levels[:, :, None], 3, axis=2)


def _split_at(shape: tuple[int, ...], column: int, *, gap: int) -> dict[str, Box]:
    """Left of ``column`` is for training, right of it, after a gap, is held out."""
    height, width = shape[:2]
    return {"train": (0, 0, column, height), "heldout": (column + gap, 0, width, height)}


def _carried(package: object, relative: str) -> Path:
    path = Path(package.__file__).parent / relative  # type: ignore[attr-defined]
    if not path.is_file():
        name = package.__name__  # type: ignore[attr-defined]
        raise SourceError(
            f"{name} {getattr(package, '__version__', '?')} does not carry {relative}; the images "
            f"come from the wheels on PyPI: install {name} from there, not from a system package"
        )
    return path


def _expect_shape(path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise SourceError(
            f"{path.name} has the shape {tuple(shape)}, its labels and regions were written for "
            f"{expected}; install the version of its package that the project was tested with"
        )


def _color(path: Path, expected: tuple[int, ...]) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    _expect_shape(path, pixels.shape, expected)
    return pixels


def fundus() -> Iterator[Plane]:
    """scikit-image ``retina.jpg``: fundus photograph of a normal left eye (CC0, M. Haggstrom)."""
    pixels = _color(_carried(skimage, "data/retina.jpg"), (1411, 1411, 3))
    tissue = pixels.max(axis=2) > 40
    regions = _split_at(pixels.shape, 850, gap=10)
    yield Plane("skimage-retina", 0, "fundus", "retina", None, pixels, tissue, regions)


def histology() -> Iterator[Plane]:
    """scikit-image ``ihc.png``: colonic glands, FHL2 shown with DAB, haematoxylin counterstain."""
    pixels = _color(_carried(skimage, "data/ihc.png"), (512, 512, 3))
    tissue = np.ones(pixels.shape[:2], dtype=bool)
    regions = _split_at(pixels.shape, 330, gap=6)
    yield Plane("skimage-ihc", 0, "histology", "colon", None, pixels, tissue, regions)


def ct_small() -> Iterator[Plane]:
    """pydicom ``CT_small.dcm``: 128 x 128, no window in the header, body part not stated."""
    path = _carried(pydicom, "data/test_files/CT_small.dcm")
    values, header = read_dicom(path)
    _expect_shape(path, values.shape, (128, 128))
    regions = _split_at(values.shape, 62, gap=4)
    pixels = _grey(window_to_uint8(values, *SOFT_TISSUE), header)
    yield Plane("pydicom-ct-small", 0, "ct", None, "soft tissue", pixels, values > -400, regions)


def ct_head() -> Iterator[Plane]:
    """pydicom ``J2K_pixelrep_mismatch.dcm``: head CT; its first window, 40/100, is the brain's."""
    path = _carried(pydicom, "data/test_files/J2K_pixelrep_mismatch.dcm")
    values, header = read_dicom(path)
    _expect_shape(path, values.shape, (512, 512))
    regions = _split_at(values.shape, 268, gap=6)
    brain = (_first(header.WindowCenter), _first(header.WindowWidth))
    for window, limits in (("brain", brain), ("soft tissue", SOFT_TISSUE)):
        pixels = _grey(window_to_uint8(values, *limits), header)
        yield Plane("pydicom-ct-head", 0, "ct", "head", window, pixels, values > -400, regions)


def mr_abdomen() -> Iterator[Plane]:
    """pydicom ``examples_overlay.dcm``: abdominal MR (T1 VIBE), shown in its own first window."""
    path = _carried(pydicom, "data/test_files/examples_overlay.dcm")
    values, header = read_dicom(path)
    _expect_shape(path, values.shape, (300, 484))
    levels = window_to_uint8(values, _first(header.WindowCenter), _first(header.WindowWidth))
    regions = _split_at(values.shape, 270, gap=6)
    yield Plane(
        "pydicom-mr-abdomen", 0, "mr", "abdomen", None, _grey(levels, header), values > 60, regions
    )


def mr_brain() -> Iterator[Plane]:
    """nibabel ``example4d.nii.gz``, first time point: axial brain slices, some held out.

    Slices are shown as radiologists see them (the patient's right on the left, front on top), in
    one window for the whole volume, up to its 99.5th percentile.
    """
    path = _carried(nibabel, "tests/data/example4d.nii.gz")
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_filename(path).slicer[..., 0])
    volume = np.asarray(image.dataobj, dtype=np.float64)
    _expect_shape(path, volume.shape, (128, 96, 24))
    top = float(np.percentile(volume[volume > 0], 99.5))
    splits = dict.fromkeys((*range(1, 9), *range(15, 23)), "train")
    splits |= dict.fromkeys(range(10, 14), "heldout")
    for z, split in splits.items():
        values = volume[::-1, ::-1, z].T
        levels = window_to_uint8(values, top / 2.0, top)
        height, width = values.shape
        regions = {split: (0, 0, width, height)}
        yield Plane(
            "nibabel-mr-brain", z, "mr", "brain", None, _grey(levels), values > 0.12 * top, regions
        )


SOURCES: tuple[Callable[[], Iterator[Plane]], ...] = (
    fundus,
    histology,
    ct_small,
    ct_head,
    mr_abdomen,
    mr_brain,
)


def load_planes() -> list[Plane]:
    """Every plane that serves a split; raises `SourceError` for a file missing or changed."""
    return [plane for source in SOURCES for plane in source() if plane.regions]
