"""Names that a source gives -> files below its root. A source is somebody else's: its names prove nothing."""

from __future__ import annotations

import bisect
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from gmai_xtuner.core.errors import SourceError

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".jp2", ".j2k", ".pgm", ".ppm"),
)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
OUTSIDE = "path outside the source"
MISSING = "no such image file"
LINK = "link to a folder, which isn't followed"

_DRIVE = re.compile(r"[A-Za-z]:")


def below(root: Path, name: str) -> Path:
    """The path of ``name`` below ``root``; the file need not exist.

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
    """Paths below ``root`` with ``/`` of all files in ``folder`` and its subfolders, in a fixed order.

    One folder is held at a time. Hidden names and macOS' ``__MACOSX`` are passed over. Links to folders are
    not followed but come as paths of their own, so that readers of everything can tell of them.
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
    """Whether a file's suffix is that of a picture, DICOM included."""
    return name.lower().endswith(IMAGE_SUFFIXES + DICOM_SUFFIXES)


def folder_of(root: Path, folder: str, *, source: str, key: str) -> Path:
    """The folder ``root / folder`` that the job's ``key`` names.

    Raises:
        SourceError: there is no such folder below the root.
    """
    if not root.is_dir():
        raise SourceError(f"Source {source}: root {str(root)!r} is no folder. Correct `root`.")
    try:
        path = below(root, folder) if folder else root
    except ValueError as error:
        raise SourceError(f"Source {source}: `{key}`: {error}.") from error
    if not path.is_dir():
        here = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise SourceError(
            f"Source {source}: `{key}` names the folder {folder!r}, which is not below {str(root)!r}. "
            f"Folders there: {listed(here)}."
        )
    return path


def file_of(root: Path, name: str, *, source: str, key: str) -> Path:
    """The file ``root / name`` that the job's ``key`` names.

    Raises:
        SourceError: there is no such file below the root.
    """
    if not root.is_dir():
        raise SourceError(f"Source {source}: root {str(root)!r} is no folder. Correct `root`.")
    try:
        path = below(root, name)
    except ValueError as error:
        raise SourceError(f"Source {source}: `{key}`: {error}.") from error
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else root
        here = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        raise SourceError(
            f"Source {source}: `{key}` names the file {name!r}, which is not below {str(root)!r}. "
            f"Files in {str(folder)!r}: {listed(near(name.rsplit('/')[-1], here) or here)}."
        )
    return path


def near(name: str, names: Iterable[str]) -> list[str]:
    """The names that look most like ``name``, best first, whatever their case."""
    by_folded: dict[str, str] = {}
    for other in names:
        by_folded.setdefault(other.casefold(), other)
    return [by_folded[key] for key in difflib.get_close_matches(name.casefold(), by_folded, n=5)]


def listed(names: Sequence[str], *, at_most: int = 12) -> str:
    """``'a', 'b', ... (40 in all)`` for error texts."""
    text = ", ".join(repr(name) for name in names[:at_most])
    return f"{text}, ... ({len(names)} in all)" if len(names) > at_most else (text or "none at all")


# --- templates ----------------------------------------------------------------------------------

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(:path)?\}")


def place_names(template: str) -> list[str]:
    """Names of the places ``{name}`` and ``{name:path}`` in their order, each once."""
    return list(dict.fromkeys(match[1] for match in _PLACE.finditer(template)))


def template_regex(template: str, known: dict[str, str] | None = None) -> re.Pattern[str]:
    """A pattern that matches what the template can stand for.

    ``{name}`` is one or more characters without ``/``, ``{name:path}`` may hold ``/``. A place that occurs
    twice holds the same text both times.

    Args:
        template: ``"label/{case}_seg-{label}.png"``.
        known: texts of places that are already known.
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
    """The template with the known places filled in."""
    return _PLACE.sub(lambda match: known.get(match[1], match[0]), template)


def matching(root: Path, template: str, known: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Files below ``root`` that the template stands for, with the texts of all its places, sorted.

    A part of the path that is wholly known is looked up, only the others are listed, and a listing is kept
    for the next call; so a folder of a million masks is read once.
    """
    found: list[tuple[str, dict[str, str]]] = []

    def walk(folder: str, parts: list[str], places: dict[str, str]) -> None:
        part = fill(parts[0], places)
        last = len(parts) == 1
        if "{" not in part or not place_names(part):
            path = f"{folder}/{part}" if folder else part
            if last and (root / path).is_file():
                found.append((path, places))
            elif not last and (root / path).is_dir():
                walk(path, parts[1:], places)
            return
        pattern = template_regex(part)
        for name in _listing(root / folder, part[: part.index("{")]):
            match = pattern.fullmatch(name)
            path = f"{folder}/{name}" if folder else name
            if match is None:
                continue
            if last and (root / path).is_file():
                found.append((path, places | match.groupdict()))
            elif not last and (root / path).is_dir():
                walk(path, parts[1:], places | match.groupdict())

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
