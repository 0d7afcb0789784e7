# SPDX-License-Identifier: Apache-2.0

"""Benchmarks in the files their authors ship, or in a user's own -> questions.

``load_benchmark("slake", folder, variant="zh").questions``, ``load_benchmark("my_set.yaml").questions``
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gmai_xtuner.evaluate.benchmarks.build import read_files
from gmai_xtuner.evaluate.benchmarks.maps import NAMES, Layout, Map, built_in, read_map
from gmai_xtuner.evaluate.benchmarks.rows import SUFFIXES, lowered, read_columns
from gmai_xtuner.evaluate.protocols import Protocol, ProtocolError
from gmai_xtuner.evaluate.questions import Benchmark, BenchmarkError

__all__ = ["NAMES", "Benchmark", "BenchmarkError", "built_in", "load_benchmark"]

_IMAGE_FOLDER = re.compile(r"^(?:imgs?|images?|figures?)(?:_\d+)?$|image[_ ]folder$", re.IGNORECASE)
_PART = re.compile(r"part_?(\d+)", re.IGNORECASE)
_MAPS = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Target:
    """A benchmark, by its name or by the file of a user's own, and where its files are."""

    name: str
    data: Path | None
    variant: str | None = None


class Survey(NamedTuple):
    """What lies under a folder: each variant, files of questions that can't be asked, and other files."""

    benchmarks: tuple[Target, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


class _Fit(NamedTuple):
    """The benchmark and the layout of a file, and the variants that it is."""

    found: Map
    layout: Layout
    variants: tuple[str, ...]

    def has(self, variant: str) -> bool:
        return variant in (*self.variants, *self.layout.parts_of_all)


def is_own(name: str) -> bool:
    """Tell whether a benchmark is named by a file: a column map, or data with a map beside."""
    return Path(name).suffix.lower() in (*_MAPS, *SUFFIXES)


def load_benchmark(
    name: str, data: Path | None = None, *, variant: str | None = None, require_images: bool = True
) -> Benchmark:
    """Read one benchmark: one of :data:`NAMES`, or a user's own by its column map, or data with a map beside.

    ``data`` is the folder of the authors' files, or the annotation file; None: the files that an own map
    names. ``variant`` is by default the benchmark's first, or the one that a single file is.
    ``require_images`` leaves out and counts questions whose image file is missing; False looks for no image.

    A ``BenchmarkError`` if nothing of that benchmark is there, a file is another benchmark's or can't be
    read.
    """
    found = _map_of(name)
    own = name not in NAMES
    if variant not in (None, *found.variants):
        there = ", ".join(found.variants)
        raise BenchmarkError(f"{found.name} has no variant {variant!r}. There are {there}.")
    if not own and (data is None or not data.exists()):
        where = "Its files are needed" if data is None else f"{str(data)!r} does not exist"
        raise BenchmarkError(f"{where}: {name} is {found.files}.")
    if own:
        layout, variant = found.layouts[0], variant or found.variants[0]
        paths: Sequence[Path] = _own_paths(found, Path(name), data)
    elif data is not None and data.is_file():
        layout, variant = _single_file(found, data, variant)
        paths = [data]
    else:
        variant = variant or found.variants[0]
        layout, paths = _in_folder(found, Path(data or ""), variant)
    return read_files(found, layout, paths, variant, require_images=require_images, strict=own)


def survey(folder: Path) -> Survey:
    """Find every benchmark under a folder, own ones with a column map among them.

    Where both the authors' files and a table of VLMEvalKit lie there, the authors' files are taken, and of
    several copies the first by name. Of the HuatuoGPT-Vision collection the whole is named, not its parts.
    """
    if not Path(folder).is_dir():
        raise BenchmarkError(f"{str(folder)!r} is no folder.")
    own, faults, taken = _own_benchmarks(folder)
    notes: list[str] = []
    places: dict[tuple[str, str], list[tuple[bool, Path]]] = {}
    for path, fit in _fits(folder, taken):
        if isinstance(fit, BenchmarkError):
            faults.append(f"passed over: {fit}")
        elif fit is None:
            (faults if _has_questions(path) else notes).append(f"passed over: {_describe(path)}")
        else:
            is_table = fit.layout is fit.found.layouts[-1] and len(fit.found.layouts) > 1
            for variant in fit.variants:
                there = places.setdefault((fit.found.name, variant), [])
                there.append((is_table, _place(path, fit.layout)))
    result = []
    for name, found in built_in().items():
        for variant in (one for one in found.variants if (name, one) in places):
            first, *others = dict.fromkeys(path for _, path in sorted(places[name, variant]))
            result.append(Target(name, first, variant))
            told = f"passed over: {name} {variant} in"
            notes += [f"{told} {one}, for that in {first}" for one in others]
    return Survey((*result, *own), tuple(faults), tuple(notes))


def find_benchmarks(folder: Path) -> tuple[Target, ...]:
    """Return every benchmark under a folder; see :func:`survey`."""
    return survey(folder).benchmarks


def choose_protocol(
    protocols: Sequence[Protocol], name: str | None, *, variant: str | None
) -> Protocol:
    """Return a protocol of a benchmark by its name; the variant's first where None.

    A ``ProtocolError`` if there is none; the message lists those there are.
    """
    for one in protocols:
        if name in (None, one.name) and variant in (None, one.variant):
            return one
    listed = ", ".join(f"{one.name} ({one.variant})" for one in protocols)
    wanted = f"protocol {name!r}" if name else "protocol"
    wanted += f" for the variant {variant!r}" if variant else ""
    raise ProtocolError(f"{protocols[0].benchmark} has no {wanted}. There are {listed}.")


# A user's own benchmark


def _map_of(name: str) -> Map:
    if name in NAMES:
        return built_in()[name]
    path = Path(name)
    if path.suffix.lower() in _MAPS:
        return read_map(path)
    if not is_own(name):
        raise BenchmarkError(
            f"no benchmark is called {name!r}. There are {', '.join(NAMES)}; your own is named by its file."
        )
    for suffix in _MAPS:
        if path.with_suffix(suffix).is_file():
            return read_map(path.with_suffix(suffix))
    raise BenchmarkError(
        f"{str(path)!r} has no column map: write {path.stem}.yaml beside it, with name, question, answer and "
        "what else docs/evaluation.md says under 'A benchmark of your own'."
    )


def _own_paths(found: Map, named: Path, data: Path | None) -> list[Path]:
    """Return the files of an own benchmark, which was named by its map or by one of them."""
    folder = data if data is not None and data.is_dir() else named.parent
    if data is not None and not data.is_dir():
        paths = [data]
    elif named.suffix.lower() not in _MAPS:
        paths = [named]
    elif found.files:
        patterns = (found.files,) if isinstance(found.files, str) else found.files
        paths = [one for key in patterns for one in sorted(folder.glob(key)) or [folder / key]]
    else:
        beside = (folder / f"{named.stem}{suffix}" for suffix in SUFFIXES)
        paths = [path for path in beside if path.is_file()]
        if len(paths) != 1:
            raise BenchmarkError(
                f"{str(named)!r} is about one file of its name, there are {[one.name for one in paths]}. "
                "Write the file, relative to the map, under files."
            )
    for path in paths:
        if not path.is_file():
            raise BenchmarkError(f"{str(path)!r} is not there, and {str(named)!r} is about it.")
    return paths


def _own_benchmarks(folder: Path) -> tuple[list[Target], list[str], set[Path]]:
    """Return the own benchmarks of a folder, what is wrong with others, and the files that are theirs."""
    found: list[Target] = []
    faults: list[str] = []
    taken: set[Path] = set()
    for path in _walk(folder, _MAPS):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not re.search(r"(?m)^(question|request|layouts|like)\s*:", text):
            continue
        try:
            one = read_map(path)
            taken |= set(_own_paths(one, path, None))
            found += [Target(str(path), path, variant) for variant in one.variants]
        except BenchmarkError as error:
            faults.append(f"passed over: {error}")
    return found, faults, taken


def _has_questions(path: Path) -> bool:
    """Tell whether a file holds questions that are no other part of a known benchmark."""
    columns = set(read_columns(path))
    layouts = (one for found in built_in().values() for one in found.layouts if not one.base64)
    known = any(one.header and columns >= set(one.header) for one in layouts)
    return "question" in {name.lower() for name in columns} and not known


# Which benchmark a file is, by what stands in it, not by its name alone


def _fits(
    folder: Path, without: Collection[Path] = ()
) -> Iterator[tuple[Path, _Fit | BenchmarkError | None]]:
    """Yield what each file under a folder is; an error where it can't be read, None where it is of none."""
    for path in _walk(folder, SUFFIXES):
        if path not in without:
            try:
                yield path, recognise(path)
            except BenchmarkError as error:
                yield path, error


def recognise(path: Path) -> _Fit | None:
    """Return the benchmark that a file belongs to; None where it is of none, an error if it can't be read."""
    read = cache(lambda at: read_columns(path, at))
    read(())
    for found in built_in().values():
        for layout in found.layouts:
            may_fit = not layout.suffixes or path.suffix.lower() in layout.suffixes
            if may_fit and (variants := _variants(path, read(layout.at), found, layout)):
                return _Fit(found, layout, variants)
    return None


def _variants(path: Path, columns: Sequence[str], found: Map, layout: Layout) -> tuple[str, ...]:
    """Return the variants that a file in this layout is; none where it is not in it."""
    names = {lowered(name) for name in columns} if layout.lower else set(columns)
    fits = names >= set(layout.header) and not names & set(layout.without)
    if not fits or not re.search(layout.path, path.absolute().as_posix(), re.IGNORECASE):
        return ()
    variants = layout.variants or found.variants
    if layout.named:
        named = layout.named.items()
        variants = next((one for key, one in named if re.search(key, path.name, re.IGNORECASE)), ())
    return found.variants if variants == ("*",) else variants


def _describe(path: Path) -> str:
    """Say what a file is, for a message that it is the wrong one."""
    try:
        columns, fit = read_columns(path), recognise(path)
    except BenchmarkError as error:
        return f"{str(path)!r} is no file of a benchmark ({error})"
    more = " ..." if len(columns) > 8 else ""
    fields = f" (its fields are {', '.join(columns[:8])}{more})" if columns else ""
    if fit is not None:
        return f"{str(path)!r} is a file of {fit.found.name} {'/'.join(fit.variants)}{fields}"
    return f"{str(path)!r} is no file of a benchmark that is known{fields}"


# Which files of a folder are the benchmark's


def _single_file(found: Map, path: Path, variant: str | None) -> tuple[Layout, str]:
    """Return the layout of an annotation file that the user names, and its variant."""
    fit = None
    with suppress(BenchmarkError):
        fit = recognise(path)
    if fit is None or fit.found is not found:
        raise BenchmarkError(
            f"{found.name} was asked for, but {_describe(path)}. It is {found.files}, or a table of "
            "VLMEvalKit by its name there. A benchmark of your own needs a column map."
        )
    if variant is None or fit.has(variant):
        return fit.layout, variant or fit.variants[0]
    raise BenchmarkError(
        f"{found.name} {variant} was asked for, but {_describe(path)}. Name the other file, or "
        f"the variant {' or '.join(fit.variants)}."
    )


def _in_folder(found: Map, folder: Path, variant: str) -> tuple[Layout, Sequence[Path]]:
    """Return the layout and the files of a variant in a folder, which must hold one copy, whole."""
    fits: dict[Path, Layout] = {}
    others: dict[Path, _Fit | BenchmarkError | None] = {}
    for path, fit in _fits(folder):
        if isinstance(fit, _Fit) and fit.found is found:
            if fit.has(variant):
                fits[path] = fit.layout
        else:
            others[path] = fit
    layout = next((one for one in found.layouts if any(one is fit for fit in fits.values())), None)
    if layout is None:
        known = [path for path, fit in others.items() if fit]
        seen = f" There is: {'; '.join(map(_describe, known[:3]))}." if known else ""
        raise BenchmarkError(
            f"nothing of {found.name} {variant} in {str(folder)!r}. It is {found.files}, or a table of "
            f"VLMEvalKit.{seen}"
        )
    paths = [path for path, fit in fits.items() if fit is layout]
    folders = {(path.parent, path.suffix) for path in paths}
    for path, other in others.items():
        if (path.parent, path.suffix) in folders:
            if isinstance(other, BenchmarkError):
                raise other
            if layout.every:
                raise BenchmarkError(f"{_describe(path)}, beside files that are. Move it away.")
    copies = sorted({str(_place(path, layout)) for path in paths})
    if len(copies) > 1:
        raise BenchmarkError(
            f"{found.name} {variant} is in {str(folder)!r} more than once: "
            f"{', '.join(map(repr, copies[:4]))}. Name the file, or the folder of one copy."
        )
    return layout, sorted(paths, key=lambda path: (list(map(int, _PART.findall(path.stem))), path))


def _place(path: Path, layout: Layout) -> Path:
    """Return what :func:`load_benchmark` takes so that it reads all files of the copy, and no other."""
    is_part = layout.base64 and _PART.search(path.stem)
    return path.parent if is_part else [path, *path.parents][layout.levels]


def _walk(folder: Path, suffixes: tuple[str, ...], *, depth: int = 4) -> Iterator[Path]:
    """Yield files under a folder, by name; image folders are not entered."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise BenchmarkError(f"{str(folder)!r} can't be listed ({error}).") from error
    for entry in entries:
        if entry.is_dir():
            if depth and not _IMAGE_FOLDER.search(entry.name) and not entry.name.startswith("."):
                yield from _walk(Path(entry.path), suffixes, depth=depth - 1)
        elif entry.name.lower().endswith(suffixes):
            yield Path(entry.path)
