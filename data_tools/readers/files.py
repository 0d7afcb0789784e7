# SPDX-License-Identifier: Apache-2.0

"""What a source names and states: files below its root, images, polygons, boxes and run-length codes.

A source is somebody else's: its names and numbers prove nothing. pycocotools is C: it allocates what a
polygon's coordinates ask for, and takes four numbers for a box. ``H`` and ``W`` are height and width.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.preprocess import Rules
from data_tools.preprocess.images import unusable
from data_tools.readers import SourceOptions
from data_tools.records import Sample
from gmai_xtuner.core.archives import locate
from gmai_xtuner.core.errors import ImageError, SourceError, Unusable
from gmai_xtuner.core.imaging.dicom import is_dicom
from gmai_xtuner.core.imaging.images import opened
from gmai_xtuner.core.strict_json import STRICT_JSON

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
    """Return the path of ``name``, with ``/`` or Windows' ``\``, below the root; the file need not exist.

    A `ValueError` if the name is empty, absolute, goes up, or leads out of root and ``links`` through a link.
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
        advice = "if what it leads to belongs to the set, name its folder in `links`"
        raise ValueError(f"{name!r} is a link that leads out of the source's root; {advice}")
    return path


def _inside(real: str, folder: str) -> bool:
    return real == folder or real.startswith(folder.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=64)
def _real(root: Path) -> str:
    return os.path.realpath(root)


def files(source: SourceOptions, folder: str = "") -> Iterator[str]:
    """Yield paths below the root with ``/`` of all files in ``folder`` and its subfolders, in a fixed order.

    Hidden names and macOS' ``__MACOSX`` are passed over. Links to folders are followed below the source's
    ``links`` only; others come as paths of their own, for readers to report.
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
    """Return an existing file, its suffix in any letter case; else raise `Unusable` (``missing``)."""
    stem, dot, suffix = name.rpartition(".")
    for spelt in dict.fromkeys((name, stem + dot + suffix.lower(), stem + dot + suffix.upper())):
        try:
            path = below(source, spelt)
        except ValueError as error:
            raise Unusable(OUTSIDE, str(error)) from error
        if os.path.isfile(path):  # False too for a name that no file can have
            return path
        if (found := locate(path)) and found[0].rows(found[1]):
            return path
    raise Unusable(missing, name)


def annotation_files(source: SourceOptions, folder: str, suffix: str) -> list[str]:
    """Return the files of a suffix, in any letter case, in the folder that ``annotations`` names."""
    folder_of(source, folder, key="annotations")
    names = [n for n in files(source, folder.strip("/")) if n.lower().endswith(suffix)]
    if not names:
        where = f"in {folder!r} below {str(source.root)!r}"
        raise wrong(source, f"no {suffix} file {where}. Correct `annotations`.")
    return names


def read_annotation_file(source: SourceOptions, name: str, unreadable: str) -> bytes:
    """Return a file's content; raise `Unusable` (``unreadable``) if it can't be read or is too large."""
    path = file_below(source, name, "no such annotation file")
    try:
        if path.stat().st_size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise Unusable(unreadable, f"{type(error).__name__}: {error}") from error
    raise Unusable(unreadable, f"larger than {MAX_BYTES} bytes")


def wrong(source: SourceOptions, problem: str) -> SourceError:
    """Return the error of a source that can't be read as a whole."""
    return SourceError(f"Source {source.name}: {problem}")


def folder_of(source: SourceOptions, folder: str, *, key: str) -> Path:
    """Return the folder below the root that the job's ``key`` names, or raise `SourceError`."""
    return _in_job(source, folder or ".", key, "folder", os.path.isdir)


def file_of(source: SourceOptions, name: str, *, key: str) -> Path:
    """Return the file below the root that the job's ``key`` names, or raise `SourceError`."""
    return _in_job(source, name, key, "file", os.path.isfile)


def _in_job(
    source: SourceOptions, name: str, key: str, kind: str, is_one: Callable[[Path], bool]
) -> Path:
    if not source.root.is_dir():
        raise wrong(source, f"root {str(source.root)!r} is no folder. Correct `root`.")
    try:
        path = below(source, name)
    except ValueError as error:
        raise wrong(source, f"`{key}`: {error}.") from error
    if is_one(path):
        return path
    folder = path.parent if kind == "file" and os.path.isdir(path.parent) else source.root
    here = sorted(entry.name for entry in folder.iterdir() if is_one(entry))
    shown = listed(near(name.rsplit("/")[-1], here) or here)
    problem = f"names the {kind} {name!r}, which is not below {str(source.root)!r}"
    raise wrong(source, f"`{key}` {problem}. There in {str(folder)!r}: {shown}.")


def table_of(source: SourceOptions, table: str) -> Path:
    """Return the job's table, which lies below the root, or where `job.load` found it beside the job."""
    return Path(table) if os.path.isabs(table) else file_of(source, table, key="table")


def read_json(source: SourceOptions, path: Path) -> Any:
    """Return the content of a JSON file that is held as a whole, or raise `SourceError`."""
    try:
        return STRICT_JSON.decode(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise wrong(source, f"{path} is no JSON ({error}).") from error


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


def open_image(source: SourceOptions, name: str) -> Sample:
    """Return an image, without annotations; of a DICOM file with what it says itself. Else `Unusable`."""
    path = file_below(source, name)
    name = path.relative_to(source.root).as_posix()
    known = path.suffix.lower() in DICOM_SUFFIXES
    # Parts of a UID look like suffixes.
    if known or ((path.suffix or ".0")[1:].isdigit() and is_dicom(path)):
        from data_tools.readers import dicom

        return dicom.read_picture(path, source_file=name)
    return Sample(path, name)


def open_sized(
    source: SourceOptions, name: str, stated: Sequence[object] = (0, 0)
) -> tuple[Sample, tuple[int, int]]:
    """Return an image and its size, which must be ``stated`` (0 or None: not stated), or raise `Unusable`."""
    found = open_image(source, name)
    size = size_of(found)
    texts = [str(side or 0).strip().removesuffix(".0") for side in stated]
    if "0" not in texts and texts != list(map(str, size)):
        detail = f"{size[0]} x {size[1]}, said {texts[0]} x {texts[1]}"
        raise Unusable("image of another size than its annotation says", detail)
    return found, size


def size_of(image: Sample | Path) -> tuple[int, int]:
    """Return width and height as stored, from the header alone; EXIF is not applied."""
    path = image.image if isinstance(image, Sample) else image
    if not isinstance(path, Path):
        height, width = path.shape[:2]
        return width, height
    try:
        with opened(path) as found:
            return found.size
    except ImageError as error:
        raise unusable(error, path) from error


def numbers(texts: Mapping[str, object]) -> dict[str, float]:
    """Return each value as a finite number, or raise a ValueError that names the one that is none."""
    found = {}
    for key, value in texts.items():
        try:
            found[key] = float(str(value).strip())
        except ValueError:
            raise ValueError(f"{key} is {value!r}, which is no number") from None
        if not math.isfinite(found[key]):
            raise ValueError(f"{key} is {value!r}, which is no finite number")
    return found


BAD_POLYGON = "polygon that can't be read"
Corners = list[tuple[float, float]]


def turned(box: tuple[float, float, float, float], degrees: object) -> Corners:
    """Return the corners of a rectangle that is turned clockwise about its centre, as CVAT stores it."""
    try:
        angle = math.radians(numbers({"rotation": degrees})["rotation"])
    except ValueError as error:
        raise Unusable("box that can't be read", str(error)) from error
    x1, y1, x2, y2 = box
    x, y, sine, cosine = (x1 + x2) / 2, (y1 + y2) / 2, math.sin(angle), math.cos(angle)
    around = [(x1 - x, y1 - y), (x2 - x, y1 - y), (x2 - x, y2 - y), (x1 - x, y2 - y)]
    return [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in around]


def upright_box(corners: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Return the upright box around points."""
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def polygon_mask(polygons: Sequence[Any], size: tuple[int, int], clean: Rules) -> np.ndarray:
    """Return bool ``[H, W]``: the union of polygons ``[x, y, x, y, ...]`` in an image of width and height.

    `Unusable` for fewer than three corners, no number, or more over the edge than ``clean`` allows.
    """
    from pycocotools import mask as codes

    # labelling tools overshoot by a pixel
    room = np.array(size if clean.clip_boxes else (1, 1))
    plain = []
    for polygon in polygons:
        try:
            values = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise Unusable(BAD_POLYGON, str(error)) from error
        if values.ndim != 1 or len(values) < 6 or len(values) % 2 or not np.isfinite(values).all():
            detail = f"{values.size} values, where at least three pairs of numbers are expected"
            raise Unusable(BAD_POLYGON, detail)
        low, high = (edge(values.reshape(-1, 2), axis=0) for edge in (np.min, np.max))
        if (low < -room).any() or (high > size + room).any():
            shown = f"x {low[0]:g} to {high[0]:g}, y {low[1]:g} to {high[1]:g}"
            raise Unusable("polygon outside the image", f"{shown} in {size[0]} x {size[1]}")
        plain.append(values.tolist())
    if not plain:
        raise Unusable(BAD_POLYGON, "no polygon at all")
    return codes.decode(codes.merge(codes.frPyObjects(plain, size[1], size[0]))).astype(bool)


def run_length_mask(code: Any, size: tuple[int, int]) -> np.ndarray:
    """Return bool ``[H, W]`` of COCO's ``{"size": [H, W], "counts": ...}``, compressed or not."""
    width, height = size
    stated = code.get("size") if isinstance(code, dict) else code
    if not isinstance(code, dict) or stated not in ([height, width], (height, width)):
        raise Unusable("mask of another size than its image", f"{stated}, not [{height}, {width}]")
    counts = code.get("counts")
    try:
        counts = counts.encode("ascii") if isinstance(counts, str) else counts
        runs = _runs(counts) if isinstance(counts, bytes) else [int(run) for run in counts]  # type: ignore[union-attr]
    except (ValueError, TypeError, OverflowError) as error:
        raise Unusable("run-length code that can't be read", str(error)) from error
    if min(runs, default=0) < 0 or sum(runs) != width * height:
        raise Unusable("run-length code of a wrong length", f"{sum(runs)} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(data: bytes) -> list[int]:
    """Return the runs of a compressed code (rleFrString of cocoapi's maskApi.c); -1 for a broken one."""
    runs: list[int] = []
    position = 0
    while position < len(data):
        value, shift, digit = 0, 0, 0x20
        while digit & 0x20:
            if position >= len(data) or not 48 <= data[position] < 112 or shift > 30:
                return [-1]
            digit = data[position] - 48
            value |= (digit & 0x1F) << shift
            position, shift = position + 1, shift + 5
        if digit & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
