# SPDX-License-Identifier: Apache-2.0

"""Uploaded files -> studies, by what they hold and not by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.dicom import is_dicom
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.core.imaging.volumes import is_nifti
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.demo.limits import Limits
from gmai_xtuner.demo.medical_files import open_dicom, open_nifti
from gmai_xtuner.demo.studies import Facts, Picture, Study

_REASONS = {"enormous_image": "too_large_image", "unsupported_image": "unsupported"}


@dataclass(frozen=True, slots=True)
class Opened:
    """The outcome of one or several files.

    Args:
        name: of the file, as its owner calls it: for messages to him, never to be kept.
        study: what it is, or why it can't be opened.
    """

    name: str
    study: Study | PageError


def open_files(files: Sequence[tuple[str, Path]], limits: Limits) -> list[Opened]:
    """Open what came in one upload; DICOM files of one series become one volume.

    Args:
        files: names, and where their bytes lie; they stay as they are.
        limits: what is refused.
    """
    dicom = [(name, path) for name, path in files if is_dicom(path)]
    opened = [Opened(name, _open_one(path, limits)) for name, path in files if not is_dicom(path)]
    if dicom:
        studies = open_dicom([path for _, path in dicom], limits)
        # A series has many names; a file for itself keeps its own.
        alone = len(studies) == len(dicom)
        for at, study in enumerate(studies):
            opened.append(Opened(dicom[at if alone else 0][0], study))
    return opened


def _open_one(path: Path, limits: Limits) -> Study | PageError:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return PageError("empty_file")
    if start == b"PK\x03\x04":
        return PageError("zip")
    try:
        if is_nifti(path):
            return open_nifti(path, limits)
        image = open_rgb(path, max_pixels=limits.pixels)
    except ImageError as error:
        return PageError(_REASONS.get(error.reason, "damaged"), limit=f"{limits.pixels:,}")
    except PageError as error:
        return error
    return Picture(image, Facts("picture", "", f"{image.width} × {image.height}"))
