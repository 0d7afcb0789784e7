# SPDX-License-Identifier: Apache-2.0

"""Uploaded files -> studies, by what they hold and not by their names; and files to begin with.

Files are read as the corpus builder reads them (`gmai_xtuner.core.imaging`), so that the model sees here what
it saw in training. Only modality and sizes leave a header of DICOM or NIfTI.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gmai_xtuner.core.errors import GMAIError, ImageError, Unusable
from gmai_xtuner.core.imaging import dicom, dicom_pixels, volume_headers, volumes
from gmai_xtuner.core.imaging.dicom import Header
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.core.imaging.windows import PRESETS, Window, foreground_window
from gmai_xtuner.demo.i18n import Language, PageError
from gmai_xtuner.demo.studies import Facts, Frames, Limits, Study, Volume, photograph

_REASONS = {"enormous_image": "too_large_image", "unsupported_image": "unsupported"}
_MOST_EXAMPLES = 24


class Opened(NamedTuple):
    """The outcome of one or several files; their owner's name for it is for messages, never to be kept."""

    name: str
    study: Study | PageError


def open_files(files: Sequence[tuple[str, Path]], limits: Limits) -> list[Opened]:
    """Open what came in one upload (names, and where bytes lie); DICOM files of a series become a volume."""
    found = [(name, path) for name, path in files if dicom.is_dicom(path)]
    opened = [
        Opened(name, _open_one(path, limits)) for name, path in files if not dicom.is_dicom(path)
    ]
    studies = open_dicom([path for _, path in found], limits)
    # A series has many names; a file for itself keeps its own.
    alone = len(studies) == len(found)
    return opened + [Opened(found[at if alone else 0][0], one) for at, one in enumerate(studies)]


def _open_one(path: Path, limits: Limits) -> Study | PageError:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return PageError("empty_file")
    if start == b"PK\x03\x04":
        return PageError("zip")
    try:
        if volume_headers.is_nifti(path):
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
    """Return every file of a folder, by name; none or too many are a ``GMAIError``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise GMAIError(f"--examples {str(folder)!r} is no folder. Give one with a few image files")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not 1 <= len(paths) <= _MOST_EXAMPLES:
        raise GMAIError(
            f"--examples {str(folder)!r} holds {len(paths)} files, expected 1 to {_MOST_EXAMPLES}"
        )
    return [Example({"en": p.stem, "zh": p.stem}, p) for p in paths]


Image = tuple[Header, Any]
"""A DICOM file: its header and its data set."""
_Found = TypeVar("_Found")

# Reason -> message of the page, and the name under which it shows the error's detail.
_MESSAGES = {
    dicom.NO_PICTURE: ("no_picture", "kind"),
    dicom_pixels.UNKNOWN_COLOURS: ("photometric", "name"),
    **dict.fromkeys(dicom_pixels.BAD_PIXELS, ("pixels", "")),
    volume_headers.NO_GREY_LEVELS: ("nifti_type", "type"),
    volume_headers.FEW_AXES: ("nifti_axes", "shape"),
    volume_headers.MANY_AXES: ("nifti_axes", "shape"),
    volumes.NO_ORIENTATION: ("no_directions", ""),
}
_NO_STACK = (dicom.MIXED, dicom.TWICE, dicom.NO_SPACING)


@contextmanager
def _said() -> Iterator[None]:
    """Say in the page's words why a file can't be used."""
    try:
        with dicom.damage_as(dicom.DAMAGED):
            yield
    except Unusable as error:
        key, name = _MESSAGES.get(error.reason, ("damaged", ""))
        detail = error.detail.replace(" x ", " × ") or "DICOM"
        raise PageError(key, **({name: detail} if name else {})) from error


def _attempt(read: Callable[..., _Found], *arguments: Any) -> _Found | PageError:
    try:
        with _said():
            return read(*arguments)
    except PageError as error:
        return error


# --- DICOM --------------------------------------------------------------------------------------


def open_dicom(paths: Sequence[Path], limits: Limits) -> list[Study | PageError]:
    """Open files that came together: a series with places becomes a volume, others stay alone.

    Studies are in the order of their first file; an error is in the place of what can't be opened.
    """
    groups: dict[object, list[Image] | PageError] = {}
    for number, path in enumerate(paths):
        image = _attempt(_read, path)
        if isinstance(image, PageError):
            groups[number] = image
            continue
        header, _ = image
        placed = header.frames == 1 and header.orientation and header.position
        found = groups.setdefault((placed and header.series) or number, [])
        assert isinstance(found, list)
        found.append(image)
    opened: list[Study | PageError] = []
    for group in groups.values():
        opened += [group] if isinstance(group, PageError) else _open_group(group, limits)
    return opened


def _read(path: Path) -> Image:
    data = dicom.open_dataset(path)
    modality = dicom.modality_code(data)
    if modality in dicom.NO_PICTURES or not dicom_pixels.has_pixels(data):
        raise Unusable(dicom.NO_PICTURE, modality)
    return dicom.header_of(data), data


class _NoStack(GMAIError):
    """Files of one series that can't be shown as one study of this kind."""


def _open_group(group: list[Image], limits: Limits) -> Sequence[Study | PageError]:
    for together in (_volume, _pages) if len(group) > 1 else ():
        with suppress(_NoStack):
            return [_attempt(together, group, limits)]
    return [_attempt(_frames, image, limits) for image in group]


def _frames(image: Image, limits: Limits) -> Frames:
    """Return the frames of one file."""
    header, data = image
    photometric = dicom_pixels.photometric_of(data)
    is_colour = photometric in dicom_pixels.COLOUR
    width, height, count = header.columns, header.rows, header.frames
    limits.check(
        width=width, height=height, voxels=count * height * width * (3 if is_colour else 1)
    )
    modality = dicom.modality_code(data)
    size = f"{width} × {height} × {count}" if count > 1 else f"{width} × {height}"
    facts = Facts("DICOM", modality, size)
    frames = range(count)
    if is_colour:
        return Frames(np.stack([dicom_pixels.colours(data, frame)[0] for frame in frames]), facts)
    values = np.stack([_intensities(data, frame) for frame in frames])
    tables = [dicom_pixels.file_table(data, frame) for frame in frames]
    lookups = [table.apply if table else None for table in tables] if any(tables) else []
    own = [window for frame in frames if (window := _own_window(data, frame)) is not None]
    all_have_one = len(own) == count
    if not all_have_one:
        own = [_default_window(data, values)]
    return Frames(
        values,
        facts,
        own if len(set(own)) > 1 else own[:1],
        lookups,
        inverted=photometric == "MONOCHROME1",
        own_window=all_have_one or bool(lookups),
        hounsfield=modality == "CT",
    )


def _pages(group: list[Image], limits: Limits) -> Frames:
    """Return images of one series that are no stack, such as radial slices, by their number."""
    group = sorted(group, key=lambda image: image[0].number)
    first, count = group[0][0], len(group)
    voxels = count * first.rows * first.columns
    limits.check(width=first.columns, height=first.rows, voxels=voxels)
    kinds = {
        (header.rows, header.columns, dicom_pixels.photometric_of(data)) for header, data in group
    }
    if len(kinds) > 1 or kinds.pop()[2] not in dicom_pixels.GREY:
        raise _NoStack
    pages = [_frames(image, limits) for image in group]
    if any(page.lookups for page in pages):
        raise _NoStack
    return replace(
        pages[0],
        values=np.concatenate([page.values for page in pages]),
        facts=replace(pages[0].facts, size=f"{first.columns} × {first.rows} × {count}"),
        windows=[page.windows[0] for page in pages],
    )


def _volume(group: list[Image], limits: Limits) -> Volume:
    """Return slices of one series in RAS+, which have one size and direction, and no two one place."""
    headers = [header for header, _ in group]
    first, count = headers[0], len(headers)
    voxels = count * first.rows * first.columns
    limits.check(width=first.columns, height=first.rows, voxels=voxels)
    if any(dicom_pixels.photometric_of(data) not in dicom_pixels.GREY for _, data in group):
        raise _NoStack
    try:
        stack = dicom.stack_of(headers)
    except Unusable as error:
        if error.reason in _NO_STACK:
            raise _NoStack from error
        raise
    slices = [group[at][1] for at in stack.order]
    middle = slices[count // 2]
    values = np.stack([_intensities(data, 0) for data in slices])
    turned, ras = volumes.to_ras(values[..., None], volume_headers.LPS_TO_RAS @ stack.affine)
    own = _own_window(middle, 0)
    modality = dicom.modality_code(middle)
    size = f"{first.columns} × {first.rows} × {count}"
    return Volume(
        turned,
        Facts("DICOM", modality, size, ("uneven",) if stack.flaw else ()),
        volumes.spacing_of(ras),
        (stack.axis, *(at for at in ("z", "y", "x") if not stack.flaw and at != stack.axis)),
        own or _default_window(middle, values),
        inverted=str(middle.PhotometricInterpretation) == "MONOCHROME1",
        own_window=own is not None,
        hounsfield=modality == "CT",
    ).checked(limits)


def _intensities(data: Any, frame: int) -> np.ndarray:
    """Return ``[H, W]``; whole numbers as int16, a quarter of the memory of pydicom's float64."""
    values = dicom_pixels.intensities(data, frame)
    if values.dtype.kind != "f":
        return values
    fits = values.min() >= -32768 and values.max() <= 32767
    return values.astype(np.int16 if fits and (values == np.rint(values)).all() else np.float32)


def _own_window(data: Any, frame: int) -> Window | None:
    """Return the file's first window; None without one that can be applied."""
    try:
        return dicom_pixels.file_window(data, frame)
    except Unusable:
        return None


def _default_window(data: Any, values: np.ndarray) -> Window:
    is_ct = dicom.modality_code(data) == "CT"
    return PRESETS["soft_tissue"] if is_ct else foreground_window(values)


# --- NIfTI --------------------------------------------------------------------------------------


def open_nifti(path: Path, limits: Limits) -> Volume:
    """Open a NIfTI file; a fourth axis becomes channels.

    One that is damaged, too large (with square pixels), or holds no grey levels is a ``PageError``.
    """
    with _said():
        file = volume_headers.open_volume(path)
        shape = file.grid
        voxels = int(np.prod(shape, dtype=object))
        limits.check(width=shape[0], height=shape[1], voxels=voxels)
        grid = volumes.intensities(file, None)
    notes = [] if file.oriented else ["no_orientation"]
    if "not finite" in grid.notes:
        notes.append("not_finite")
    return Volume(
        grid.array,
        Facts("NIfTI", "", " × ".join(map(str, shape[: 4 if shape[3] > 1 else 3])), tuple(notes)),
        volumes.spacing_of(grid.affine),
        ("z", "y", "x"),
        foreground_window(grid.array),
        hounsfield=True,  # the format does not say; the presets are there for who knows
    ).checked(limits)
