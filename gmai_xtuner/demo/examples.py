# SPDX-License-Identifier: Apache-2.0

"""Images to begin with: those that installed packages bring along, or a folder of one's own."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.demo.i18n import Language

MOST = 24


@dataclass(frozen=True, slots=True)
class Example:
    """A file that can be picked.

    Args:
        name: on its button.
        path: of the file.
    """

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
    """What is there; packages are looked for, not imported."""
    found = []
    for package, file, english, chinese in _INSTALLED:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder) / file
            if path.is_file():
                found.append(Example({"en": english, "zh": chinese}, path))
                break
    return found


def examples_of(folder: str | Path) -> list[Example]:
    """Every file of a folder, by name.

    Raises:
        GMAIError: it is no folder, it is empty, or it holds too many files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GMAIError(f"--examples {str(folder)!r} is no folder. Give one with a few image files")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not 1 <= len(paths) <= MOST:
        raise GMAIError(
            f"--examples {str(folder)!r} holds {len(paths)} files, expected 1 to {MOST}"
        )
    return [Example({"en": p.stem, "zh": p.stem}, p) for p in paths]
