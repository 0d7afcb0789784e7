"""The picture of a sample whose labels lie in another file: an image file, or a DICOM file of one frame."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.readers.paths import DICOM_SUFFIXES, MISSING, OUTSIDE, below
from data_tools.samples import Annotation, Sample


class BadPicture(ValueError):
    """A picture that is left out.

    Args:
        reason: the same words for all of the kind.
        detail: what is particular to this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture before anything is said of it.

    Args:
        name: path below the root, with ``/``.
        sample: without annotations; of a DICOM file with what the file itself knows.
        path: of the file.
    """

    name: str
    path: Path
    sample: Sample = field(repr=False)

    def size(self) -> tuple[int, int]:
        """Width and height as the file stores them; of an image file only the header is read.

        Raises:
            BadPicture: the header can't be read.
        """
        if isinstance(self.sample.image, np.ndarray):
            height, width = self.sample.image.shape[:2]
            return width, height
        return image_size(self.path)

    def with_findings(
        self,
        annotations: tuple[Annotation, ...],
        *,
        group: str | None = None,
        modality: str | None = None,
        attributes: Mapping[str, str] | None = None,
        incomplete: Iterable[str] = (),
    ) -> Sample:
        """The sample; what a table says goes before what the file says."""
        return replace(
            self.sample,
            annotations=annotations,
            group=group or self.sample.group,
            modality=modality or self.sample.modality,
            attributes={**self.sample.attributes, **(attributes or {})},
            incomplete=tuple(sorted(set(incomplete))),
        )


def picture(root: Path, name: str) -> Picture:
    """The picture that a source names.

    Raises:
        BadPicture: a hostile path, no such file, or a DICOM file that is no picture.
    """
    try:
        path = below(root, name)
    except ValueError as error:
        raise BadPicture(OUTSIDE, str(error)) from error
    if not path.is_file():
        raise BadPicture(MISSING, name)
    name = path.relative_to(root).as_posix()
    if not _is_dicom(path):
        return Picture(name, path, Sample(path, name))
    from data_tools.readers import dicom

    found = dicom.read_picture(path, source_file=name)
    if not isinstance(found, Sample):
        raise BadPicture(found.reason, found.detail)
    return Picture(name, path, found)


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
        BadPicture: the header can't be read, or promises more pixels than Pillow opens.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise BadPicture("image is too large", str(error)) from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise BadPicture("image can't be read", f"{type(error).__name__}: {error}") from error


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
