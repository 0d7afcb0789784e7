"""Names that a source gives -> files below its root, and their images.

A source is somebody else's: its names prove nothing. ``{name}`` in a pattern is a placeholder.
"""

from __future__ import annotations

import bisect
import difflib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from data_tools.records import Sample
from gmai_xtuner.core.errors import SourceError, Unusable

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".jp2", ".j2k", ".pgm", ".ppm"),
)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
OUTSIDE = "path outside the source"
MISSING = "no such image file"
LINK = "link to a folder, which isn't followed"
MAX_BYTES = 64 * 2**20  # of an annotation file

_DRIVE = re.compile(r"[A-Za-z]:")


def below(root: Path, name: str) -> Path:
    """Return the path of ``name`` below ``root``; the file need not exist.

    A backslash separates folders as ``/`` does, for tables that were made on Windows. A link may lead to
    another place below the root, but not out of it.

    Raises:
        ValueError: the name is empty, absolute, goes up, or leads out of the root through a link.
    """
    text = name.replace("\\", "/")
    if not text.strip() or "\0" in text:
        raise ValueError(f"{name!r} is no file name")
    if text.startswith("/") or _DRIVE.match(text):
        raise ValueError(f"{name!r} is absolute; names are relative to the source's root")
    if ".." in text.split("/"):
        raise ValueError(f"{name!r} leads out of the source's root")
    path = root / text
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is no file name ({error})") from error
    top = _real(root)
    if real != top and not real.startswith(top.rstrip(os.sep) + os.sep):
        raise ValueError(f"{name!r} is a link that leads out of the source's root")
    return path


@lru_cache(maxsize=64)
def _real(root: Path) -> str:
    return os.path.realpath(root)


def files(root: Path, folder: str = "") -> Iterator[str]:
    """Yield paths below ``root`` with ``/`` of all files in ``folder`` and its subfolders, in a fixed order.

    One folder is held at a time. Hidden names and macOS' ``__MACOSX`` are passed over. Links to folders are
    not followed but come as paths of their own, so that readers can report them.
    """
    here = root / folder
    with os.scandir(here) as entries:
        found = sorted(
            (entry.name, entry.is_dir(follow_symlinks=False))
            for entry in entries
            if not entry.name.startswith(".") and entry.name != "__MACOSX"
        )
    for name, is_folder in found:
        path = f"{folder}/{name}" if folder else name
        if is_folder:
            yield from files(root, path)
        else:
            yield path


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image, DICOM included."""
    return name.lower().endswith(IMAGE_SUFFIXES + DICOM_SUFFIXES)


def file_below(root: Path, name: str, missing: str = MISSING) -> Path:
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


def read_annotation_file(root: Path, name: str, unreadable: str) -> bytes:
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


# --- files that the job names ---------------------------------------------------------------------


def folder_of(root: Path, folder: str, *, source: str, key: str) -> Path:
    """Return the folder ``root / folder`` that the job's ``key`` names.

    Raises:
        SourceError: there is no such folder below the root.
    """
    path = _in_job(root, folder, source, key) if folder else _existing_root(root, source)
    if not path.is_dir():
        here = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise SourceError(
            f"Source {source}: `{key}` names the folder {folder!r}, which is not below {str(root)!r}. "
            f"Folders there: {listed(here)}."
        )
    return path


def file_of(root: Path, name: str, *, source: str, key: str) -> Path:
    """Return the file ``root / name`` that the job's ``key`` names.

    Raises:
        SourceError: there is no such file below the root.
    """
    path = _in_job(root, name, source, key)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else root
        here = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        raise SourceError(
            f"Source {source}: `{key}` names the file {name!r}, which is not below {str(root)!r}. "
            f"Files in {str(folder)!r}: {listed(near(name.rsplit('/')[-1], here) or here)}."
        )
    return path


def _existing_root(root: Path, source: str) -> Path:
    if not root.is_dir():
        raise SourceError(f"Source {source}: root {str(root)!r} is no folder. Correct `root`.")
    return root


def _in_job(root: Path, name: str, source: str, key: str) -> Path:
    try:
        return below(_existing_root(root, source), name)
    except ValueError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"Source {source}: `{key}`: {error}.") from error


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


def open_image(root: Path, name: str) -> Sample:
    """Return the image that a source names, without annotations; of a DICOM file with what it says itself.

    Raises:
        Unusable: a hostile path, no such file, or a DICOM file that holds no image.
    """
    path = file_below(root, name)
    name = path.relative_to(root).as_posix()
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


def size_of(image: Sample | Path) -> tuple[int, int]:
    """Return width and height as stored; of an image file only the header is read, EXIF is not applied.

    Raises:
        Unusable: the header can't be read, or promises more pixels than Pillow opens.
    """
    path = image.image if isinstance(image, Sample) else image
    if not isinstance(path, Path):
        height, width = path.shape[:2]
        return width, height
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return opened.size
    except Image.DecompressionBombError as error:
        raise Unusable("image is too large", str(error)) from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise Unusable("image can't be read", f"{type(error).__name__}: {error}") from error


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


# --- patterns -------------------------------------------------------------------------------------

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(:path)?\}")


def place_names(template: str) -> list[str]:
    """Return the placeholders ``{name}`` and ``{name:path}`` in their order, each once."""
    return list(dict.fromkeys(match[1] for match in _PLACE.finditer(template)))


def template_regex(template: str, known: dict[str, str] | None = None) -> re.Pattern[str]:
    """Return the regular expression of a pattern.

    ``{name}`` is one or more characters without ``/``, ``{name:path}`` may hold ``/``. A placeholder that
    occurs twice holds the same text both times.

    Args:
        template: ``"label/{case}_seg-{label}.png"``.
        known: texts of placeholders that are already known.
    """
    parts, end, seen = [], 0, set()
    for match in _PLACE.finditer(template):
        parts.append(re.escape(template[end : match.start()]))
        end, name = match.end(), match[1]
        if known and name in known:
            parts.append(re.escape(known[name]))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            seen.add(name)
            parts.append(f"(?P<{name}>{'.+?' if match[2] else '[^/]+?'})")
    parts.append(re.escape(template[end:]))
    return re.compile("".join(parts))


def fill(template: str, known: dict[str, str]) -> str:
    """Return the pattern with the known placeholders filled in."""
    return _PLACE.sub(lambda match: known.get(match[1], match[0]), template)


def matching(root: Path, template: str, known: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Return the files below ``root`` that fit a pattern, with the texts of its placeholders, sorted.

    A part of the path that is wholly known is looked up, only the others are listed, and a listing is kept
    for the next call; so a folder of a million masks is read once.
    """
    found: list[tuple[str, dict[str, str]]] = []

    def walk(folder: str, parts: list[str], places: dict[str, str]) -> None:
        part = fill(parts[0], places)
        pattern = template_regex(part)
        names = _listing(root / folder, part[: part.index("{")]) if place_names(part) else [part]
        for name in names:
            match = pattern.fullmatch(name)
            path = f"{folder}/{name}" if folder else name
            if match is None:
                continue
            if len(parts) > 1 and (root / path).is_dir():
                walk(path, parts[1:], places | match.groupdict())
            elif len(parts) == 1 and (root / path).is_file():
                found.append((path, places | match.groupdict()))

    walk("", fill(template, known).split("/"), dict(known))
    return sorted(found, key=lambda pair: pair[0])


def _listing(folder: Path, prefix: str) -> Iterator[str]:
    names = _names(str(folder))
    for name in names[bisect.bisect_left(names, prefix) :]:
        if not name.startswith(prefix):
            return
        yield name


@lru_cache(maxsize=16)
def _names(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def fitting(
    root: Path, template: str, others: Sequence[str], *, source: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the files that fit the job's pattern ``images``, with the texts of its placeholders.

    Args:
        root: of the source.
        template: the pattern.
        others: patterns of files that belong to images and are none.
        source: name in the job.

    Raises:
        SourceError: the pattern's folder is missing, or no file fits.
    """
    pattern = template_regex(template)
    no_images = [template_regex(other) for other in others]
    folder = "/".join(template.split("{")[0].split("/")[:-1])
    folder_of(root, folder, source=source, key="images")
    empty = True
    for name in files(root, folder):
        match = pattern.fullmatch(name)
        if match and not any(other.fullmatch(name) for other in no_images):
            empty = False
            yield name, match.groupdict()
    if empty:
        raise SourceError(
            f"Source {source}: no file below {str(root / folder)!r} fits `images: {template}`."
        )
