# SPDX-License-Identifier: Apache-2.0

"""Uploaded files -> studies, by what they hold and not by their names; and files to begin with."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gmai_xtuner.core.errors import GMAIError, ImageError
from gmai_xtuner.core.imaging.dicom import is_dicom
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.core.imaging.volume_headers import is_nifti
from gmai_xtuner.demo.i18n import Language, PageError
from gmai_xtuner.demo.medical_files import open_dicom, open_nifti
from gmai_xtuner.demo.studies import Limits, Study, photograph

_REASONS = {"enormous_image": "too_large_image", "unsupported_image": "unsupported"}
_MOST_EXAMPLES = 24


class Opened(NamedTuple):
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
    studies = open_dicom([path for _, path in dicom], limits)
    # A series has many names; a file for itself keeps its own.
    alone = len(studies) == len(dicom)
    return opened + [Opened(dicom[at if alone else 0][0], one) for at, one in enumerate(studies)]


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
    return photograph(image)


class Example(NamedTuple):
    """A file that can be picked, and the text of its button."""

    name: dict[Language, str]
    path: Path


# Package, file below it, name. pydicom (MIT), nibabel (MIT), scikit-image (CC0 and public domain).
_INSTALLED = (
    ("skimage", "data/retina.jpg", "Fundus photograph", "眼底照片"),
    ("skimage", "data/ihc.png", "Histology", "组织切片"),
    ("pydicom", "data/test_files/CT_small.dcm", "CT, DICOM", "CT（DICOM）"),
    ("pydicom", "data/test_files/MR_small.dcm", "MR, DICOM", "MR（DICOM）"),
    (
        "pydicom",
        "data/test_files/examples_ybr_color.dcm",
        "Ultrasound, DICOM cine",
        "超声（DICOM 动态）",
    ),
    ("nibabel", "tests/data/example4d.nii.gz", "MR volume, NIfTI", "MR 体数据（NIfTI）"),
)


def installed_examples() -> list[Example]:
    """Return the images that installed packages bring along; packages are looked for, not imported."""
    found = []
    for package, file, english, chinese in _INSTALLED:
        spec = importlib.util.find_spec(package)
        folders = (spec and spec.submodule_search_locations) or ()
        paths = [path for folder in folders if (path := Path(folder, file)).is_file()]
        found += [Example({"en": english, "zh": chinese}, path) for path in paths[:1]]
    return found


def examples_of(folder: str | Path) -> list[Example]:
    """Return every file of a folder, by name.

    Raises:
        GMAIError: it is no folder, it is empty, or it holds too many files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GMAIError(f"--examples {str(folder)!r} is no folder. Give one with a few image files")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not 1 <= len(paths) <= _MOST_EXAMPLES:
        raise GMAIError(
            f"--examples {str(folder)!r} holds {len(paths)} files, expected 1 to {_MOST_EXAMPLES}"
        )
    return [Example({"en": p.stem, "zh": p.stem}, p) for p in paths]
