"""The picture of a sample whose labels lie in another file: an image file, or a DICOM file of one frame."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.readers.paths import DICOM_SUFFIXES, MISSING, OUTSIDE, below
from data_tools.records import Sample
from gmai_xtuner.core.errors import Unusable

MAX_BYTES = 64 * 2**20  # of an annotation file


def open_image(root: Path, name: str) -> Sample:
    """Return the image that a source names, without annotations; of a DICOM file with what it says itself.

    Raises:
        Unusable: a hostile path, no such file, or a DICOM file that holds no image.
    """
    path = file_below(root, name, MISSING)
    name = path.relative_to(root).as_posix()
    if not _is_dicom(path):
        return Sample(path, name)
    from data_tools.readers import dicom

    return dicom.read_picture(path, source_file=name)


def file_below(root: Path, name: str, missing: str) -> Path:
    """Return the path of an existing file of the source.

    Args:
        root: of the source.
        name: as the source has it.
        missing: reason if there is no such file.

    Raises:
        Unusable: the name leads out of the root, or there is no such file.
    """
    try:
        path = below(root, name)
    except ValueError as error:
        raise Unusable(OUTSIDE, str(error)) from error
    if not path.is_file():
        raise Unusable(missing, name)
    return path


def read_bytes(root: Path, name: str, unreadable: str) -> bytes:
    """Return the content of an annotation file.

    Args:
        root: of the source.
        name: as the source has it.
        unreadable: reason if the file can't be read or is larger than `MAX_BYTES`.

    Raises:
        Unusable: with that reason, or because there is no such file.
    """
    path = file_below(root, name, "no such annotation file")
    try:
        if path.stat().st_size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise Unusable(unreadable, f"{type(error).__name__}: {error}") from error
    raise Unusable(unreadable, f"larger than {MAX_BYTES} bytes")


def size_of(sample: Sample) -> tuple[int, int]:
    """Return width and height as the file stores them; of an image file only the header is read.

    Raises:
        Unusable: the header can't be read.
    """
    if isinstance(sample.image, Path):
        return image_size(sample.image)
    height, width = sample.image.shape[:2]
    return width, height


def check_size(size: tuple[int, int], stated: tuple[object, object]) -> None:
    """Compare width and height with those that an annotation states, if it states both.

    Raises:
        Unusable: they differ.
    """
    if None not in stated and stated != size:
        raise Unusable(
            "image of another size than its annotation says",
            f"{size[0]} x {size[1]}, said {stated[0]} x {stated[1]}",
        )


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.suffix and not path.suffix[1:].isdigit():  # parts of a UID look like suffixes
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as stored, from the header; EXIF orientation is not applied.

    Raises:
        Unusable: the header can't be read, or promises more pixels than Pillow opens.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise Unusable("image is too large", str(error)) from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise Unusable("image can't be read", f"{type(error).__name__}: {error}") from error


def numbers(texts: Mapping[str, object]) -> dict[str, float]:
    """Each value as a finite number.

    Raises:
        ValueError: one is none; the text names it.
    """
    found = {}
    for key, value in texts.items():
        try:
            number = float(str(value).strip())
        except ValueError:
            raise ValueError(f"{key} is {value!r}, which is no number") from None
        if not np.isfinite(number):
            raise ValueError(f"{key} is {value!r}, which is no finite number")
        found[key] = number
    return found
