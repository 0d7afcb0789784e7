# SPDX-License-Identifier: Apache-2.0

"""The job file: YAML -> `Job`, or one error with every mistake of the file and its line."""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from data_tools import readers
from data_tools.options import (
    CheckOptions,
    MakeOptions,
    Options,
    OutputOptions,
    TemplateOptions,
    WriterOptions,
)
from data_tools.readers import SourceOptions
from data_tools.taxonomy import KINDS, Taxonomy
from data_tools.taxonomy import load as load_taxonomy
from gmai_xtuner.core.agreements import Agreement
from gmai_xtuner.core.errors import CorpusError, JobError
from gmai_xtuner.core.yaml_lines import Document, Place

_MEANT = Path(__file__).with_name("other_words.yaml")


class Job(Options):
    """A whole job file; docs/corpus.md explains its keys."""

    path: Path
    output: Path
    title: str = "Corpus"
    seed: int = Field(default=0, ge=0)
    taxonomy: Path | None = None
    engine: Literal["processes", "ray"] = "processes"
    workers: int | None = Field(default=None, ge=1)
    sources: tuple[SourceOptions, ...]
    agreements: tuple[Agreement, ...] = ()
    make: MakeOptions = MakeOptions.model_validate({})
    writer: WriterOptions = Field(default_factory=TemplateOptions)
    checks: CheckOptions = CheckOptions.model_validate({})
    corpus: OutputOptions = Field(default_factory=OutputOptions)


def load(path: Path, *, output: Path | None = None) -> Job:
    """Read and check a job file; relative paths in it are relative to its folder.

    ``output`` stands for the file's own; relative to the current folder. A `JobError` has all mistakes, one
    line each, ``file:line: where: what``.
    """
    document = Document(path, what="job file", error=JobError)
    data = document.data
    if data is None:
        raise JobError(f"{path}:1: the job file is empty; it needs output and sources.")
    if not isinstance(data, dict):
        raise JobError(f"{path}:1: expected keys such as output and sources, got {_kind(data)}.")
    if output is not None:
        data["output"] = str(output.absolute())
    problems = _Problems(document)
    made = _sources(data, problems)
    sources = tuple(made.values())
    extended = _settle(data, "taxonomy", problems)
    _settle(data, "output", problems)
    if isinstance(data.get("writer"), dict):
        data["writer"] = dict(data["writer"])
        _settle(data["writer"], "cache", problems, ("writer",))
    if "path" in data:
        problems.add(("path",), _unknown("path", Job))
    job = _validated(Job, data | {"path": path.absolute(), "sources": sources}, (), problems)
    if job is not None:
        _check_output(job, problems)
    if extended is None or os.path.isfile(extended):
        _check_terms(made, load_taxonomy(extended), problems)
    else:
        problems.add(("taxonomy",), f"there is no file {extended}")
    problems.stop()
    assert job is not None
    return job


def fingerprint(options: BaseModel, *, without: Sequence[str] = ()) -> str:
    """Return a hash of options; the same for the same values."""
    values = options.model_dump(mode="json", exclude=set(without))
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# --- mistakes -------------------------------------------------------------------------------------


class _Problems:
    """Mistakes, told together in the order of the file's lines."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.folder = document.path.parent  # what paths are relative to
        self._found: set[tuple[int, str]] = set()

    def add(self, place: Place, text: str) -> None:
        place = tuple(part for part in place if part != "[key]")  # pydantic's mark of a key
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        where = f"{where.removeprefix('.')}: " if where else ""
        self._found.add((self._document.line(place), f"{where}{text}"))

    def stop(self) -> None:
        """Raise an error with all mistakes, if there are any."""
        if self._found:
            raise JobError(
                "\n".join(
                    f"{self._document.path}:{line}: {text}{'' if text.endswith('?') else '.'}"
                    for line, text in sorted(self._found)
                )
            )


def _validated(
    model: type[BaseModel], data: Mapping[str, Any], place: Place, problems: _Problems
) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            where, owner = _walk(model, data, mistake["loc"])
            problems.add((*place, *where), _text(mistake, owner))
        return None


def _walk(
    model: type[BaseModel], data: Any, location: tuple[str | int, ...]
) -> tuple[Place, type[BaseModel]]:
    """Turn pydantic's location into the place in the file and the section that it is in.

    Pydantic puts the names of the tried alternatives between the keys, which are not in the file.
    """
    place: list[str | int] = []
    owner, candidates = model, [model]
    for index, part in enumerate(location):
        last = index == len(location) - 1
        is_there = (isinstance(data, dict) and part in data) or (
            isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        )
        fields = [made for made in candidates if part in made.model_fields]
        if fields:
            owner = fields[0]
        elif candidates:
            named = ((made, made.model_fields.get("name")) for made in candidates)
            tagged = [
                made for made, tag in named if tag and part in typing.get_args(tag.annotation)
            ]
            candidates = tagged or candidates
            owner = candidates[0]
        if not is_there and not (last and fields):
            continue
        place.append(part)
        data = data[part] if is_there else None
        if fields:
            candidates = list(_models(fields[0].model_fields[str(part)].annotation))
        elif isinstance(part, str):
            candidates = []
    return tuple(place), owner


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for part in typing.get_args(annotation):
        yield from _models(part)


def _text(mistake: Mapping[str, Any], owner: type[BaseModel]) -> str:
    kind, got = mistake["type"], mistake.get("input")
    if kind == "extra_forbidden":
        return _unknown(str(mistake["loc"][-1]), owner)
    if kind == "missing":
        return "this key is missing"
    text = mistake["msg"].removeprefix("Value error, ").rstrip(".")
    text = text[:1].lower() + text[1:] if text[:6] == "Input " else text
    if kind == "value_error":
        return text
    if kind == "string_type" and isinstance(got, bool | int | float):
        return f"{text}, got {got!r}; put it in quotes"
    shown = repr(got) if got is None or isinstance(got, str | int | float) else _kind(got)
    return f"{text}, got {shown[:120]}"


def _unknown(key: str, owner: type[BaseModel]) -> str:
    known = [field.alias or name for name, field in owner.model_fields.items() if name != "path"]
    return f"unknown key{nearest(key, known)}"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``; did you mean 'licence'?``, or the names there are."""
    lower = {name.lower(): name for name in known}
    # key -> other words for what it says
    meant: dict[str, list[str]] = yaml.safe_load(_MEANT.read_text(encoding="utf-8"))
    found = [key for key, words in meant.items() if key in known and word.lower() in words]
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    if found or close:
        return f"; did you mean {found[0] if found else lower[close[0]]!r}?"
    return f"; there are {', '.join(sorted(known))}"


def _kind(value: Any) -> str:
    names = {dict: "keys", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), repr(value)[:120])


# --- sources --------------------------------------------------------------------------------------


def _sources(data: Mapping[str, Any], problems: _Problems) -> dict[int, SourceOptions]:
    """Return the sources by their place in the list."""
    entries = data.get("sources")
    if not isinstance(entries, list) or not entries:
        text = "expected a list of at least one source, each with name, reader, root and licence"
        problems.add(("sources",), f"{text}, got {_kind(entries)}")
        return {}
    made: dict[int, SourceOptions] = {}
    names: dict[str, str] = {}
    for number, entry in enumerate(entries):
        place: Place = ("sources", number)
        if not isinstance(entry, dict):
            problems.add(place, f"expected the keys of a source, got {_kind(entry)}")
            continue
        source = _source(dict(entry), place, problems)
        if source is not None:
            made[number] = source
        name = entry.get("name")
        if isinstance(name, str):
            # Case doesn't tell names apart: some file systems don't.
            if name.lower() in names:
                problems.add((*place, "name"), f"{name!r} is the name of another source as well")
            names[name.lower()] = name
    return made


def _source(entry: dict[str, Any], place: Place, problems: _Problems) -> SourceOptions | None:
    reader = entry.get("reader")
    if not isinstance(reader, str) or reader not in readers.READERS:
        missing = f"reader is missing; there are {', '.join(readers.READERS)}"
        unknown = f"no reader {reader!r}{nearest(str(reader), list(readers.READERS))}"
        problems.add(*((place, missing) if reader is None else ((*place, "reader"), unknown)))
        return None
    try:
        options = readers.load(reader).Options
    except ImportError as error:
        told = f"the reader {reader} needs a library that is not installed ({error})"
        problems.add((*place, "reader"), f"{told}; pip install 'gmai-xtuner[data]'")
        return None
    if root := _settle(entry, "root", problems, place, is_there=True):
        _table(entry, root, problems.folder)
    if isinstance(links := entry.get("links"), list):
        for number in range(len(links)):
            _settle(links, number, problems, (*place, "links"), is_there=True)
    source = _validated(options, entry, place, problems)
    if source is not None and source.group is not None:
        try:
            re.compile(source.group)
        except re.error as error:
            problems.add((*place, "group"), f"not a regular expression: {error}")
    return source


# Readers that take whatever lies below the root: they would read the corpus' own images.
_WALKING = (
    *("arrays", "labelme", "image_folder", "dicom", "video", "slide", "masks", "volume", "yolo"),
)


def _check_output(job: Job, problems: _Problems) -> None:
    """Keep output and data apart: what is in the output is replaced, and what no record needs deleted."""
    output = job.output.resolve()
    for source in job.sources:
        with suppress(ValueError):  # a NUL, which the reader refuses
            root = source.root.resolve()
            of = f"the source {source.name!r} ({root})"
            if root.is_relative_to(output):
                why = "a run deletes what isn't its own in the output; name another folder"
                problems.add(("output",), f"{output} holds the data of {of}, and {why}")
            elif output.is_relative_to(root) and source.reader in _WALKING:
                why = "the next run would read its own pictures as data; name a folder outside it"
                problems.add(("output",), f"{output} lies below the root of {of}, so {why}")


def _settle(
    values: Any, key: Any, problems: _Problems, place: Place = (), *, is_there: bool = False
) -> Path | None:
    """Make a path absolute; None if there is none, or ``is_there``, a package's perhaps, and it isn't."""
    text = values.get(key) if isinstance(values, dict) else values[key]
    if not isinstance(text, str) or not (text or is_there):
        return None
    try:
        is_package = is_there and text.startswith("package:")
        path = _package_folder(text) if is_package else _absolute(text, problems.folder)
        if is_there and not os.path.exists(path):
            raise ValueError(f"there is no folder {path}")
    except ValueError as error:
        problems.add((*place, key), str(error))
        values[key] = text if is_there else str(problems.folder.absolute())
        return None
    values[key] = str(path)
    return path


def _table(entry: dict[str, Any], root: Path, folder: Path) -> None:
    """Find a table of labels that lies beside the job; one below the root goes first."""
    table = entry.get("table")
    if isinstance(table, str) and table and not os.path.exists(root / table):
        with suppress(ValueError):  # then the reader says that there is no such table
            beside = _absolute(table, folder)
            if os.path.isfile(beside):
                entry["table"] = str(beside)


def _absolute(text: str, folder: Path) -> Path:
    """Return a path that is relative to the job's folder; a `ValueError` if no file can have this name."""
    try:
        path = folder.absolute() / Path(text).expanduser()
    except RuntimeError as error:  # ~ of a user that isn't there
        raise ValueError(f"{text!r}: {error}") from error
    if "\0" in text:
        raise ValueError(f"no file can have the name {text!r}")
    return path


def _package_folder(text: str) -> Path:
    """Return the folder of an installed Python package for ``package:NAME/FOLDER``."""
    name, _, below = text.removeprefix("package:").partition("/")
    if ".." in PurePosixPath(below).parts or below.startswith("/"):
        raise ValueError(f"{text!r} leaves the package")
    try:
        found = importlib.resources.files(name)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"there is no installed Python package {name!r}") from error
    root = found.joinpath(below) if below else found
    if not isinstance(root, Path):
        raise ValueError(f"the package {name} is not installed as plain files")
    return root


def _check_terms(
    made: Mapping[int, SourceOptions], taxonomy: Taxonomy, problems: _Problems
) -> None:
    for number, source in made.items():
        place: Place = ("sources", number)
        if source.department is None:
            names = ", ".join(taxonomy.names("departments"))
            told = "department is missing; name one, or None for a set of no department"
            problems.add(place, f"{told} ({names})")
        for kind in ("modalities", "departments", "clinical_tasks"):
            key = KINDS[kind].replace(" ", "_")
            if (value := getattr(source, key)) is not None:
                try:
                    taxonomy.find(kind, value)
                except CorpusError as error:
                    problems.add((*place, key), str(error).rstrip("."))
        task, tasks = source.source_task, taxonomy.names("source_tasks")
        if task is not None and task not in tasks:
            problems.add((*place, "source_task"), f"no task {task!r}{nearest(task, tasks)}")
