# SPDX-License-Identifier: Apache-2.0

"""Names that a source gives -> files below its root, and their images.

A source is somebody else's: its names prove nothing.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from data_tools.preprocess.images import unusable
from data_tools.readers import SourceOptions
from data_tools.records import Sample
from gmai_xtuner.core.errors import ImageError, SourceError, Unusable
from gmai_xtuner.core.imaging.images import opened

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".jp2", ".j2k", ".pgm", ".ppm"),
)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
OUTSIDE = "path outside the source"
MISSING = "no such image file"
UNKNOWN = "unknown label"
LINK = "link to a folder, which isn't followed"
MAX_BYTES = 64 * 2**20  # of an annotation file

_DRIVE = re.compile(r"[A-Za-z]:")


def below(source: SourceOptions, name: str) -> Path:
    """Return the path of ``name`` below the source's root; the file need not exist.

    A backslash separates folders as ``/`` does, for tables that were made on Windows. A link may lead to
    another place below the root, or below one of the source's ``links``.

    Raises:
        ValueError: the name is empty, absolute, goes up, or leads elsewhere through a link.
    """
    text = name.replace("\\", "/")
    if not text.strip() or "\0" in text:
        raise ValueError(f"{name!r} is no file name")
    if text.startswith("/") or _DRIVE.match(text):
        raise ValueError(f"{name!r} is absolute; names are relative to the source's root")
    if ".." in text.split("/"):
        raise ValueError(f"{name!r} leads out of the source's root")
    path = source.root / text
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is no file name ({error})") from error
    if not any(_inside(real, _real(folder)) for folder in source.roots):
        raise ValueError(
            f"{name!r} is a link that leads out of the source's root; if the files that it leads to "
            "belong to the set, name their folder in `links`"
        )
    return path


def _inside(real: str, folder: str) -> bool:
    return real == folder or real.startswith(folder.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=64)
def _real(root: Path) -> str:
    return os.path.realpath(root)


def files(source: SourceOptions, folder: str = "") -> Iterator[str]:
    """Yield paths below the root with ``/`` of all files in ``folder`` and its subfolders, in a fixed order.

    One folder is held at a time. Hidden names and macOS' ``__MACOSX`` are passed over. Links to folders are
    followed below the source's ``links`` only; others come as paths of their own, for readers to report.
    """
    with os.scandir(source.root / folder) as entries:
        found = sorted(
            (entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink())
            for entry in entries
            if not entry.name.startswith(".") and entry.name != "__MACOSX"
        )
    for name, is_folder, is_link in found:
        path = f"{folder}/{name}" if folder else name
        if is_folder or (is_link and source.links and _may_be_followed(source, path)):
            yield from files(source, path)
        else:
            yield path


def _may_be_followed(source: SourceOptions, path: str) -> bool:
    """Return whether a link leads to a folder of ``links``, and not to one that it lies in itself."""
    real, here = os.path.realpath(source.root / path), os.path.realpath((source.root / path).parent)
    is_named = any(_inside(real, _real(folder)) for folder in source.links)
    return is_named and os.path.isdir(real) and not _inside(here, real)


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image, DICOM included."""
    return name.lower().endswith(IMAGE_SUFFIXES + DICOM_SUFFIXES)


def file_below(source: SourceOptions, name: str, missing: str = MISSING) -> Path:
    """Return the path of an existing file of the source; its suffix may be in other letter case.

    Args:
        source: of the job.
        name: as the source has it.
        missing: reason if there is no such file.

    Raises:
        Unusable: the name leads out of the root, or there is no such file.
    """
    stem, dot, suffix = name.rpartition(".")
    for spelt in dict.fromkeys((name, stem + dot + suffix.lower(), stem + dot + suffix.upper())):
        try:
            path = below(source, spelt)
        except ValueError as error:
            raise Unusable(OUTSIDE, str(error)) from error
        if os.path.isfile(path):  # False too for a name that no file can have
            return path
    raise Unusable(missing, name)


def annotation_files(source: SourceOptions, folder: str, suffix: str) -> list[str]:
    """Return the files of a suffix, in any letter case, in the folder that the job's ``annotations`` names.

    Raises:
        SourceError: there is no such folder below the root, or no such file in it.
    """
    folder_of(source, folder, key="annotations")
    names = [n for n in files(source, folder.strip("/")) if n.lower().endswith(suffix)]
    if not names:
        raise SourceError(
            f"Source {source.name}: no {suffix} file in {folder!r} below {str(source.root)!r}. Correct "
            "`annotations`."
        )
    return names


def read_annotation_file(source: SourceOptions, name: str, unreadable: str) -> bytes:
    """Return the content of an annotation file.

    Args:
        source: of the job.
        name: as the source has it.
        unreadable: reason if the file can't be read or is larger than `MAX_BYTES`.

    Raises:
        Unusable: with that reason, or because there is no such file.
    """
    path = file_below(source, name, "no such annotation file")
    try:
        if path.stat().st_size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise Unusable(unreadable, f"{type(error).__name__}: {error}") from error
    raise Unusable(unreadable, f"larger than {MAX_BYTES} bytes")


# --- files that the job names ---------------------------------------------------------------------


def folder_of(source: SourceOptions, folder: str, *, key: str) -> Path:
    """Return the folder below the root that the job's ``key`` names.

    Raises:
        SourceError: there is no such folder below the root.
    """
    root = source.root
    path = _in_job(source, folder or ".", key)
    if not os.path.isdir(path):
        here = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise SourceError(
            f"Source {source.name}: `{key}` names the folder {folder!r}, which is not below {str(root)!r}. "
            f"Folders there: {listed(here)}."
        )
    return path


def file_of(source: SourceOptions, name: str, *, key: str) -> Path:
    """Return the file below the root that the job's ``key`` names.

    Raises:
        SourceError: there is no such file below the root.
    """
    path = _in_job(source, name, key)
    if not os.path.isfile(path):
        folder = path.parent if os.path.isdir(path.parent) else source.root
        here = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        raise SourceError(
            f"Source {source.name}: `{key}` names the file {name!r}, which is not below "
            f"{str(source.root)!r}. Files in {str(folder)!r}: "
            f"{listed(near(name.rsplit('/')[-1], here) or here)}."
        )
    return path


def _in_job(source: SourceOptions, name: str, key: str) -> Path:
    if not source.root.is_dir():
        raise SourceError(
            f"Source {source.name}: root {str(source.root)!r} is no folder. Correct `root`."
        )
    try:
        return below(source, name)
    except ValueError as error:
        raise SourceError(f"Source {source.name}: `{key}`: {error}.") from error


def near(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that look most like ``name``, best first, whatever their case."""
    by_folded: dict[str, str] = {}
    for other in names:
        by_folded.setdefault(other.casefold(), other)
    return [by_folded[key] for key in difflib.get_close_matches(name.casefold(), by_folded, n=5)]


def listed(names: Sequence[str], *, at_most: int = 12) -> str:
    """Return ``'a', 'b', ... (40 in all)`` for error texts."""
    text = ", ".join(repr(name) for name in names[:at_most])
    return f"{text}, ... ({len(names)} in all)" if len(names) > at_most else (text or "none at all")


# --- images ---------------------------------------------------------------------------------------


def open_image(source: SourceOptions, name: str) -> Sample:
    """Return the image that a source names, without annotations; of a DICOM file with what it says itself.

    Raises:
        Unusable: a hostile path, no such file, or a DICOM file that holds no image.
    """
    path = file_below(source, name)
    name = path.relative_to(source.root).as_posix()
    if not _is_dicom(path):
        return Sample(path, name)
    from data_tools.readers import dicom

    return dicom.read_picture(path, source_file=name)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.suffix and not path.suffix[1:].isdigit():  # parts of a UID look like suffixes
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def open_sized(
    source: SourceOptions, name: str, stated: Sequence[object] = (0, 0)
) -> tuple[Sample, tuple[int, int]]:
    """Return an image as `open_image` does, and its size, see `size_of`.

    Args:
        source, name: see `open_image`.
        stated: width and height that an annotation states; 0 or None for what it doesn't.

    Raises:
        Unusable: as `open_image`, or the size is another one.
    """
    found = open_image(source, name)
    size = size_of(found)
    texts = [str(side or 0).strip().removesuffix(".0") for side in stated]
    if "0" not in texts and texts != list(map(str, size)):
        raise Unusable(
            "image of another size than its annotation says",
            f"{size[0]} x {size[1]}, said {texts[0]} x {texts[1]}",
        )
    return found, size


def size_of(image: Sample | Path) -> tuple[int, int]:
    """Return width and height as stored; of an image file only the header is read, EXIF is not applied.

    Raises:
        Unusable: the header can't be read, or promises more pixels than are opened.
    """
    path = image.image if isinstance(image, Sample) else image
    if not isinstance(path, Path):
        height, width = path.shape[:2]
        return width, height
    try:
        with opened(path) as found:
            return found.size
    except ImageError as error:
        raise unusable(error, path) from error
