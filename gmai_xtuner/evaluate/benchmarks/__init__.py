# SPDX-License-Identifier: Apache-2.0

"""Benchmarks in the files their authors ship -> questions.

``load_benchmark("slake", folder, variant="zh").questions``
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.gmai_mmbench import GMAI_MMBENCH
from gmai_xtuner.evaluate.benchmarks.huatuo import HUATUO
from gmai_xtuner.evaluate.benchmarks.mmmu import MMMU_HEALTH
from gmai_xtuner.evaluate.benchmarks.omnimedvqa import OMNIMEDVQA
from gmai_xtuner.evaluate.benchmarks.path_vqa import PATH_VQA
from gmai_xtuner.evaluate.benchmarks.pmc_vqa import PMC_VQA
from gmai_xtuner.evaluate.benchmarks.reading import Benchmark, BenchmarkError, Collector
from gmai_xtuner.evaluate.benchmarks.slake import SLAKE
from gmai_xtuner.evaluate.benchmarks.vqa_rad import VQA_RAD
from gmai_xtuner.evaluate.protocols import Protocol, ProtocolError

DEFINITIONS: Mapping[str, Definition] = {
    one.name: one
    for one in (
        VQA_RAD,
        SLAKE,
        PMC_VQA,
        OMNIMEDVQA,
        GMAI_MMBENCH,
        MMMU_HEALTH,
        PATH_VQA,
        HUATUO,
    )
}
"""Every benchmark by its name; a new one is registered here."""

NAMES = tuple(DEFINITIONS)

_BEGINNING = 1 << 20
_SUFFIXES = (".json", ".csv", ".tsv", ".parquet", ".pkl")
_IMAGE_FOLDER = re.compile(r"^(?:imgs?|images?|figures?)(?:_\d+)?$|image[_ ]folder$", re.IGNORECASE)
_PART = re.compile(r"(part_?)(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FoundBenchmark:
    """A benchmark that lies in a folder: what :func:`load_benchmark` takes."""

    name: str
    variant: str
    data: Path


def load_benchmark(
    name: str, data: Path, *, variant: str | None = None, require_images: bool = True
) -> Benchmark:
    """Read one benchmark from its authors' files or from a TSV of VLMEvalKit.

    Args:
        name: one of :data:`NAMES`.
        data: the folder that holds the authors' files, or the annotation file.
        variant: one of the benchmark's; the first of them where None, or the one that a single file is.
        require_images: leave out questions whose image file is missing and count them under
            ``"missing_image"``; False keeps them and looks for no image, for work on the text alone.

    Raises:
        BenchmarkError: nothing of that benchmark at that place, a file of another benchmark, or a file
            that can't be read; the message names it.
    """
    if name not in DEFINITIONS:
        raise BenchmarkError(f"no benchmark is called {name!r}. There are {', '.join(NAMES)}.")
    definition = DEFINITIONS[name]
    if variant is not None and variant not in definition.variants:
        raise BenchmarkError(
            f"{name} has no variant {variant!r}. There are {', '.join(definition.variants)}."
        )
    data = Path(data)
    if not data.exists():
        raise BenchmarkError(f"{str(data)!r} does not exist. {name} is {definition.files}.")
    if data.is_file():
        paths: Sequence[Path] = [data]
        form, variant = _single_file(definition, data, variant)
    else:
        variant = variant or definition.variants[0]
        paths, form = _in_folder(definition, data, variant)
    roots = {
        os.path.abspath([*path.parents, Path("/")][form.images_up])
        for path in map(Path.absolute, paths)
    }
    return form.read(paths, Collector(name, variant, require_images=require_images, roots=roots))


def find_benchmarks(folder: Path) -> tuple[FoundBenchmark, ...]:
    """Return every benchmark under a folder, each variant once, in the order of :data:`NAMES`.

    Where both the authors' files and a table of VLMEvalKit lie there, the authors' files are taken, and of
    several copies the first by name. Of the HuatuoGPT-Vision collection the whole is named, not its parts.

    Raises:
        BenchmarkError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BenchmarkError(f"{str(folder)!r} is no folder.")
    places: dict[tuple[str, str], list[tuple[Path, Found]]] = {}
    for path in _walk(folder):
        for name, found in recognise(path)[1].items():
            if found.needs == "nothing":
                for variant in found.variants:
                    places.setdefault((name, variant), []).append((path, found))
    result = []
    for name, definition in DEFINITIONS.items():
        for variant in definition.variants:
            if files := places.get((name, variant)):
                path, found = min(files, key=lambda file: file[1].form == "table")
                form = definition.forms[found.form]
                result.append(FoundBenchmark(name, variant, _place(path, form)))
    return tuple(result)


def find_protocol(
    name: str, protocol: str | None = None, *, variant: str | None = None
) -> Protocol:
    """Look a protocol up.

    Args:
        name: of the benchmark, one of :data:`NAMES`.
        protocol: its name; None takes the default of the variant.
        variant: None takes the one that the protocol belongs to, or the benchmark's first.

    Raises:
        ProtocolError: no such benchmark, protocol or variant; the message lists those there are.
    """
    if name not in DEFINITIONS:
        raise ProtocolError(f"no benchmark is called {name!r}. There are {', '.join(NAMES)}.")
    definition = DEFINITIONS[name]
    if protocol is None:
        variant = variant or definition.variants[0]
    for one in definition.protocols:
        if protocol in (None, one.name) and variant in (None, one.variant):
            return one
    listed = ", ".join(f"{one.name} ({one.variant})" for one in definition.protocols)
    wanted = f"protocol {protocol!r}" if protocol else "protocol"
    of_variant = f" for the variant {variant!r}" if variant else ""
    raise ProtocolError(f"{name} has no {wanted}{of_variant}. There are {listed}.")


# Which benchmark a file is, by what stands in it, not by its name alone


def recognise(path: Path) -> tuple[Header | None, dict[str, Found]]:
    """Return the head of a file and the benchmarks that it may be of, by their names.

    The head is None for a file that can't be read. Of a file that says what it is there is one benchmark.
    """
    try:
        header = _read_header(path)
    except (OSError, UnicodeDecodeError, csv.Error, BenchmarkError):
        header = None
    if header is None:
        return None, {}
    found = {name: one for name in NAMES if (one := DEFINITIONS[name].recognise(header))}
    if not found and header.suffix == ".tsv" and header.has("index", "question"):
        found = _recognise_table(header)
    certain = {name: one for name, one in found.items() if one.needs == "nothing"}
    return header, certain or found


def _recognise_table(header: Header) -> dict[str, Found]:
    """Recognise a table of VLMEvalKit by its name, if that says what it is."""
    for name, definition in DEFINITIONS.items():
        for pattern, variants in definition.table_names.items():
            if re.search(pattern, header.path.name, re.IGNORECASE):
                return {name: Found(variants, "table")}
    return {name: Found((), "table", needs="file") for name in NAMES}


def _read_header(path: Path) -> Header | None:
    match path.suffix.lower():
        case ".json":
            return _read_json_header(path)
        case ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return Header(path, tuple(name.strip() for name in next(csv.reader(file), [])))
        case ".tsv":
            from gmai_xtuner.evaluate.benchmarks.table import read_header

            return Header(path, read_header(path))
        case ".parquet":
            from gmai_xtuner.evaluate.benchmarks.parquet import column_names

            return Header(path, column_names(path))
        case ".pkl":
            return Header(path)
    return None


def _read_json_header(path: Path) -> Header | None:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        beginning = file.read(_BEGINNING)
    start = beginning.find("{")
    if start < 0 or beginning[:start].strip() != "[":
        return None
    try:
        record, _ = json.JSONDecoder().raw_decode(beginning, start)
    except (ValueError, RecursionError):
        return None
    return Header(path, tuple(record))


def _describe(path: Path) -> str:
    """Say what a file is, for a message that it is the wrong one."""
    header, found = recognise(path)
    if header is None:
        return f"{str(path)!r} is no file of a benchmark"
    more = " ..." if len(header.fields) > 8 else ""
    fields = f" (its fields are {', '.join(header.fields[:8])}{more})" if header.fields else ""
    for name, one in found.items():
        if one.needs == "nothing":
            return f"{str(path)!r} is a file of {name} {'/'.join(one.variants)}{fields}"
    return f"{str(path)!r} is no file of a benchmark that is known{fields}"


# Which files of a folder are the benchmark's


def _single_file(definition: Definition, path: Path, variant: str | None) -> tuple[Form, str]:
    """Return the form and the variant of an annotation file that the user names."""
    name = definition.name
    found = recognise(path)[1].get(name)
    if found is None:
        raise BenchmarkError(
            f"{name} was asked for, but {_describe(path)}. {name} is {definition.files}, or a table of "
            "VLMEvalKit."
        )
    offered = [one for one in found.variants if one in definition.variants]
    if variant is None:
        variant = offered[0] if offered else definition.variants[0]
    elif offered and variant not in (*offered, *found.parts):
        raise BenchmarkError(
            f"{name} {variant} was asked for, but {_describe(path)}. Name the other file, or "
            f"the variant {' or '.join(offered)}."
        )
    return definition.forms[found.form], variant


def _in_folder(definition: Definition, folder: Path, variant: str) -> tuple[Sequence[Path], Form]:
    """Return the files of a variant in a folder, and their form."""
    name = definition.name
    if (located := definition.locate(folder, variant)) is not None:
        return located, next(iter(definition.forms.values()))
    by_form: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in _walk(folder):
        recognised = recognise(path)[1]
        found = recognised.get(name)
        if found and found.needs != "file" and variant in (*found.variants, *found.parts):
            by_form.setdefault(found.form, []).append(path)
        elif any(one.needs == "nothing" for one in recognised.values()):
            others.append(path)
    form = next((form for form in by_form if form != "table"), "table")
    paths = by_form.get(form, [])
    if not paths:
        seen = f" There is: {'; '.join(_describe(path) for path in others[:3])}." if others else ""
        raise BenchmarkError(
            f"nothing of {name} {variant} in {str(folder)!r}. It is {definition.files}, or a table of "
            f"VLMEvalKit.{seen}"
        )
    return _one_copy(paths, definition.forms[form], f"{name} {variant}", folder), definition.forms[
        form
    ]


def _one_copy(paths: Sequence[Path], form: Form, wanted: str, folder: Path) -> Sequence[Path]:
    """Return the files in their order.

    Raises:
        BenchmarkError: they are of several copies.
    """
    if form.parts:
        copies = {path.parent / _PART.sub(r"\1N", path.stem) for path in paths}
    else:
        copies = {_place(path, form) for path in paths}
    if len(copies) > 1:
        named = sorted(copies) if form.levels else paths[:4]
        raise BenchmarkError(
            f"{wanted} is in {str(folder)!r} more than once: "
            f"{', '.join(repr(str(path)) for path in named)}. Name the file, or the folder of one copy."
        )
    return sorted(
        paths, key=lambda path: ([int(part[1]) for part in _PART.findall(path.stem)], path)
    )


def _place(path: Path, form: Form) -> Path:
    """Return what :func:`load_benchmark` takes so that it reads all files of the copy, and no other."""
    for _ in range(1 if form.parts and _PART.search(path.stem) else form.levels):
        path = path.parent
    return path


def _walk(folder: Path, *, depth: int = 4) -> Iterator[Path]:
    """Yield annotation files under a folder, in the order of their names; image folders are not entered.

    Raises:
        BenchmarkError: the folder can't be listed.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise BenchmarkError(f"{str(folder)!r} can't be listed ({error}).") from error
    for entry in entries:
        if entry.is_dir():
            if depth and not _IMAGE_FOLDER.search(entry.name) and not entry.name.startswith("."):
                yield from _walk(Path(entry.path), depth=depth - 1)
        elif entry.name.lower().endswith(_SUFFIXES):
            yield Path(entry.path)
