# SPDX-License-Identifier: Apache-2.0

"""Mixture file (YAML or JSON) -> datasets with their ratios, and seeded sampling.

docs/data.md explains both forms, ours and the authors' (uni-medical/GMAI-VL, examples/example_list.json).
Relative paths are looked up in the mixture file's folder, then in the working directory.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gmai_xtuner.core.archives import SUFFIXES as ARCHIVES
from gmai_xtuner.core.archives import archives_of, open_archives
from gmai_xtuner.core.errors import ArchiveError, MixtureError
from gmai_xtuner.core.records import SUFFIXES
from gmai_xtuner.core.yaml_lines import Document, Section

STAGES = ("stage1", "stage2", "stage3")
QUALITIES = ("high", "low")
_DEFAULTS = {
    **dict.fromkeys(("category", "quality", "on_bad_sample")),
    "over_length": "cut",
    "image_marks": "required",
}


def _one_of(*known: str) -> tuple[Callable[[Any], bool], str]:
    return known.__contains__, f"one of {', '.join(known)}"


_SCALARS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quality": _one_of(*QUALITIES),
    "over_length": _one_of("cut", "drop"),
    "on_bad_sample": _one_of("raise", "skip"),
    "image_marks": _one_of("required", "first"),
    "size": (lambda value: type(value) is int and value >= 0, "a number of records"),
    "base": (lambda value: isinstance(value, str) and value != "", "the name of a mixture file"),
    "data_augment": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(
        ("category", "image_root", "images"),
        (lambda value: isinstance(value, str | None), "a text in quotes"),
    ),
}
"""Key -> what its value must be."""
_SHARED = (
    *("image_root", "images", "category", "quality", "ratio"),
    *("over_length", "on_bad_sample", "image_marks"),
)
_OWN = ("annotations", *_SHARED, "size", "exclude")
_AUTHORS = {  # our key -> the authors'
    "image_root": "image_dir",
    "annotations": "annotations",
    "ratio": "sample_ratio",
    "size": "length",
    "": "data_augment",
}


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a mixture; docs/data.md says what its fields mean in the file.

    ``image_root`` is a folder, archive or pattern of these, None for text alone; ``ratios``: stage name
    -> how often each record is seen; ``on_bad_sample`` None leaves the choice to the config; ``size`` is
    what the file states; ``exclude`` begins with the whole mixture's.
    """

    name: str
    annotations: tuple[Path, ...]
    image_root: Path | None
    category: str | None
    quality: str | None
    ratios: Mapping[str, float]
    over_length: str
    on_bad_sample: str | None
    size: int | None
    exclude: tuple[Path, ...] = ()
    image_marks: str = "required"

    @property
    def images_first(self) -> bool:
        return self.image_marks == "first"


@dataclass(frozen=True)
class Mixture:
    """The datasets of one mixture file, in its order; ``without`` names those of a base that it lacks."""

    path: Path
    entries: tuple[DatasetEntry, ...]
    without: tuple[str, ...] = ()

    @property
    def known(self) -> frozenset[str]:
        """Names that an exclude list may speak of."""
        return frozenset(self.without) | {entry.name for entry in self.entries}


def load_mixture(
    path: str | Path, *, check_files: bool = True, variants: tuple[Path, ...] = ()
) -> Mixture:
    """Read and check a ``.yaml``, ``.yml`` or ``.json`` file in our or the authors' form.

    With ``check_files`` annotation files, image folders and exclude lists must exist; ``variants`` are the
    files that this one is a base of. A ``MixtureError`` has file, line, dataset and remedy.
    """
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise MixtureError(f"{path}: a mixture file ends in .yaml, .yml or .json.")
    remedy = "Name yours in GMAI_MIXTURE; the default is found from the repository's root."
    document = Document(path, what="mixture file", error=MixtureError, remedy=remedy)
    if document.data is None:
        raise MixtureError(f"{path} is empty. List at least one dataset under 'datasets'.")
    top = Section(document, title="the mixture")
    # In the authors' form the top level is the datasets, and each of them a mapping.
    is_variant = "base" in top and not isinstance(top.values["base"], dict | list)
    base = Mixture(path, ())
    exclude: tuple[Path, ...] = ()
    defaults: Section | None = None
    datasets: Section | None = top
    is_ours = is_variant or "datasets" in top
    if is_ours:
        top.check_keys(("datasets", "defaults", "exclude", *(("base", "without") * is_variant)))
        datasets = top.section("datasets") if "datasets" in top else None
        if "defaults" in top:
            defaults = top.section("defaults")
            defaults.check_keys(_SHARED)
        if is_variant:
            base = _read_base(top, variants, check_files=check_files)
        exclude = _files(top, "exclude", check_files=check_files)
    else:
        near = difflib.get_close_matches("datasets", top.values, n=1)
        if near and "annotations" not in top.section(near[0]):
            raise top.error(f"unknown key {near[0]!r}", "Did you mean 'datasets'?", key=near[0])
    if datasets is not None and not datasets.values and not base.entries:
        raise datasets.error("no dataset is listed", "List at least one.")
    entries = list(base.entries)
    for name in datasets.values if datasets is not None else ():
        assert datasets is not None
        section = datasets.section(name, title=f"dataset {name!r}")
        section.check_keys(_OWN if is_ours else _AUTHORS.values())
        if not is_ours:
            if "data_augment" in section:
                _read_scalar(section, "data_augment")
            section = datasets.section(name, title=section.title, names=_AUTHORS)
        if not name.strip():
            raise section.error("the name is empty", "Name the dataset.")
        if any(entry.name == name for entry in base.entries):
            raise section.error(
                "the base has a dataset of this name", "Rename it, or name it in `without`."
            )
        entries.append(_read_entry(name, section, defaults, check_files=check_files))
    own = (
        replace(entry, exclude=tuple(dict.fromkeys((*exclude, *entry.exclude))))
        for entry in entries
    )
    return Mixture(path, tuple(own), base.without)


def _read_base(top: Section, variants: tuple[Path, ...], *, check_files: bool) -> Mixture:
    """Read the mixture that this one is a variant of, without what it leaves out."""
    key = "base"
    value = _read_scalar(top, key)
    file = _locate(top, value, key=key, must_exist=True)
    family = (*variants, top.document.path.resolve())
    if file.resolve() in family:
        raise top.error(f"base {value!r} is based on this file itself", "Name another.", key=key)
    base = load_mixture(file, check_files=check_files, variants=family)
    names = [entry.name for entry in base.entries]
    left_out: set[str] = set()
    key = "without"
    for pattern in top.texts(key, what="a dataset of the base, or a pattern") if key in top else ():
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            near = difflib.get_close_matches(pattern, names, n=1)
            raise top.error(
                f"without: {pattern!r} is no dataset of {file}",
                f"Did you mean {near[0]!r}?" if near else "`*` stands for any characters.",
                key=key,
            )
        left_out |= matching
    kept = tuple(entry for entry in base.entries if entry.name not in left_out)
    return Mixture(file, kept, (*base.without, *(name for name in names if name in left_out)))


def select(
    mixture: Mixture, *, stage: str, quality: str | None = None
) -> list[tuple[DatasetEntry, float]]:
    """Return the datasets that a stage trains on, of one ``quality`` or of all, with their ratios, in order.

    A ``MixtureError`` for an unknown stage or quality, a dataset without the quality that is asked for, or if
    no dataset is left.
    """
    for what, value, known in (("stage", stage, STAGES), ("quality", quality, QUALITIES)):
        if value not in known and not (what == "quality" and value is None):
            raise MixtureError(f"{what} must be one of {', '.join(known)}, got {value!r}.")
    used = [entry for entry in mixture.entries if entry.ratios[stage] > 0]
    if quality is not None:
        unknown = [entry.name for entry in used if entry.quality is None]
        if unknown:
            raise MixtureError(
                f"{mixture.path}: quality {quality!r} was asked for, but {', '.join(unknown)} "
                "has none. Write quality: high or low for each dataset."
            )
        used = [entry for entry in used if entry.quality == quality]
    if not used:
        wanted = f" of quality {quality!r}" if quality else ""
        raise MixtureError(
            f"{mixture.path}: no dataset{wanted} has a ratio above 0 in {stage}. Raise a ratio."
        )
    return [(entry, entry.ratios[stage]) for entry in used]


def sample_indices(size: int, ratio: float, *, seed: int, name: str) -> np.ndarray:
    """Draw the records of a dataset that are seen: each ``floor(ratio)`` or ``ceil(ratio)`` times.

    2.5 means two whole copies and a random half. The draw depends on seed and name of the dataset alone, so
    another dataset in the mixture changes nothing.

    Returns:
        int64 ``[round(size * ratio)]``, sorted.
    """
    if size < 0 or seed < 0 or not (math.isfinite(ratio) and ratio >= 0):
        raise ValueError(
            f"size, ratio and seed must be finite and not negative, got {size}, {ratio} and {seed}."
        )
    whole = math.floor(ratio)
    times = np.full(size, whole, dtype=np.int64)
    digest = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    generator = np.random.default_rng([seed, *digest.tolist()])
    rest = round(size * ratio) - whole * size
    times[generator.choice(size, rest, replace=False, shuffle=False) if rest else []] += 1
    return np.repeat(np.arange(size, dtype=np.int64), times)


def _read_entry(
    name: str, section: Section, defaults: Section | None, *, check_files: bool
) -> DatasetEntry:
    def field(key: str, default: Any = None, *, read: Any = _read_scalar) -> Any:
        """Read a field of the dataset, else of the defaults."""
        holder = next((part for part in (section, defaults) if part and key in part), None)
        return default if holder is None else read(holder, key)

    if "annotations" not in section:
        raise section.error("annotations are missing", "Name the file(s) with the records.")
    annotations = _files(section, "annotations", check_files=check_files, suffixes=SUFFIXES)
    for file in annotations:
        if annotations.count(file) > 1:
            raise section.error(
                f"{file.name!r} is listed twice", "Raise the ratio instead.", key="annotations"
            )
    if "images" in section and "image_root" in section:
        raise section.error("has image_root and images", remedy="Give one.", key="images")
    image_root = partial(_read_image_root, annotations=annotations, check_files=check_files)
    holder = section if defaults is None or "image_root" in section else defaults
    root = "images" if "images" in section or "images" in holder else "image_root"
    return DatasetEntry(
        name=name,
        annotations=annotations,
        image_root=field(root, read=image_root),
        ratios=field("ratio", dict.fromkeys(STAGES, 1.0), read=_read_ratios),
        size=_read_scalar(section, "size") if "size" in section else None,
        exclude=_files(section, "exclude", check_files=check_files),
        **{key: field(key, default) for key, default in _DEFAULTS.items()},
    )


def _read_scalar(section: Section, key: str) -> Any:
    return section.scalar(key, *_SCALARS[key])


def _read_ratios(section: Section, key: str) -> dict[str, float]:
    if not isinstance(section.values[key], dict):
        return dict.fromkeys(STAGES, _read_ratio(section, key))
    stages = section.section(key, title=f"{section.title}, ratio")
    stages.check_keys(STAGES)
    for stage in STAGES:
        if stage not in stages:
            raise stages.error(f"{stage} is missing", "Give all three stages; 0 leaves one out.")
    return {stage: _read_ratio(stages, stage) for stage in STAGES}


def _read_ratio(section: Section, key: str) -> float:
    def is_right(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and value >= 0

    remedy = "1 is all records once, 0.05 is 5 %, 2.5 is two and a half times."
    return float(section.scalar(key, is_right, "a number of 0 or more", remedy=remedy))


def _files(
    section: Section, key: str, *, check_files: bool, suffixes: tuple[str, ...] = ()
) -> tuple[Path, ...]:
    files = []
    for value in section.texts(key, what="a file") if key in section else ():
        if suffixes and Path(value).suffix.lower() not in suffixes:
            remedy = f"Use one of {', '.join(suffixes)}."
            raise section.error(f"the file {value!r} has an unknown suffix", remedy, key=key)
        file = _locate(section, value, key=key, must_exist=check_files)
        if check_files and not os.path.isfile(file):
            raise section.error(f"{str(file)!r} is not a file", "Name a file.", key=key)
        files.append(file)
    return tuple(files)


def _read_image_root(
    section: Section, key: str, *, annotations: tuple[Path, ...], check_files: bool
) -> Path | None:
    value = _read_scalar(section, key)
    if value is None:
        return None
    if value == "":
        folders = {file.parent for file in annotations}
        if len(folders) > 1:
            told = "an empty image root means the annotations' folder, but they lie in several"
            raise section.error(told, "Name the folder.", key=key)
        return folders.pop()
    folder = _locate(section, value, key=key, must_exist=check_files)
    try:
        if check_files and not os.path.isdir(folder) and open_archives(folder) is None:
            problem = f"image root {str(folder)!r} is not a folder"
            remedy = f"Name a folder, an archive ({', '.join(ARCHIVES)}) or a pattern of archives."
            raise section.error(problem, remedy=remedy, key=key)
    except ArchiveError as error:
        raise section.error(str(error).rstrip("."), remedy=f"Correct {key}.", key=key) from error
    return folder


def _locate(section: Section, value: str, *, key: str, must_exist: bool) -> Path:
    """Return a path as it stands, below the mixture file's folder, or below the working directory."""
    candidates = [section.document.path.parent / value, Path.cwd() / value]
    for candidate in candidates:
        if os.path.exists(candidate) or archives_of(candidate):
            return candidate
    if must_exist:
        looked = " and ".join(dict.fromkeys(repr(str(candidate)) for candidate in candidates))
        told = f"{key} {value!r} does not exist (looked for {looked})"
        raise section.error(told, "Give a path relative to the mixture file.", key=key)
    return candidates[0]
