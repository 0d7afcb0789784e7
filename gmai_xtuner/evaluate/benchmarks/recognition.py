"""File -> which benchmark it is, by what stands in it, not by its name alone."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks import mmmu, omnimedvqa, pmc_vqa
from gmai_xtuner.evaluate.benchmarks.benchmark import BenchmarkError
from gmai_xtuner.evaluate.benchmarks.gmai_mmbench import part_of
from gmai_xtuner.evaluate.benchmarks.parquet import column_names, column_texts
from gmai_xtuner.evaluate.benchmarks.table import read_header

_BEGINNING = 1 << 20


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a file is.

    Args:
        name: of the benchmark; None where it may be several, which only the user can tell.
        variants: that the file holds.
        form: which reader reads it.
        fields: the columns, or the fields of the first record.
    """

    name: str | None
    variants: tuple[str, ...]
    form: str
    fields: tuple[str, ...] = ()


_TABLE_NAMES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"path[-_ ]?vqa.*val", "path_vqa", ("val",)),
    (r"path[-_ ]?vqa", "path_vqa", ("test",)),
    (r"omni[-_ ]?med", "omnimedvqa", ("open-access",)),
    (r"mmmu", "mmmu_health", ("validation", "dev")),
    (r"slake.*(?:zh|cn|chinese)", "slake", ("zh",)),
    (r"slake", "slake", ("en",)),
    (r"vqa[-_ ]?rad", "vqa_rad", ("test",)),
    (r"pmc[-_ ]?vqa.*test_2", "pmc_vqa", ("test_2",)),
    (r"pmc[-_ ]?vqa", "pmc_vqa", ("test_clean",)),
)
"""Names of VLMEvalKit's tables, which say no more of themselves."""


def recognise(path: Path) -> Recognised | None:
    """What a file is; None if no benchmark, or if it can't be read.

    Args:
        path: a .json, .csv, .tsv, .parquet or .pkl file.
    """
    try:
        match path.suffix.lower():
            case ".json":
                return _json(path)
            case ".csv":
                return _csv(path)
            case ".tsv":
                return _table(path)
            case ".parquet":
                return _parquet(path)
            case ".pkl":
                return _pickle(path)
    except (OSError, UnicodeDecodeError, csv.Error, BenchmarkError):
        return None
    return None


def _json(path: Path) -> Recognised | None:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        beginning = file.read(_BEGINNING)
    start = beginning.find("{")
    if start < 0 or beginning[:start].strip() != "[":
        return None
    try:
        record, _ = json.JSONDecoder().raw_decode(beginning, start)
    except (json.JSONDecodeError, RecursionError):
        return None
    fields = tuple(record)
    has = set(fields)
    if {"q_lang", "img_name", "answer_type"} <= has:
        return Recognised("slake", ("en", "zh"), "slake", fields)
    if {"phrase_type", "image_name", "answer"} <= has:
        return Recognised("vqa_rad", ("test",), "vqa_rad", fields)
    if {"gt_answer", "image_path", "option_A"} <= has:
        variant = next(
            (name for name, folder in omnimedvqa.FOLDERS.items() if path.parent.name == folder),
            "open-access",
        )
        return Recognised("omnimedvqa", (variant,), "omnimedvqa", fields)
    if {"options", "dataset", "image", "answer", "question"} <= has:
        return Recognised("huatuo", ("all",), "huatuo", fields)
    return Recognised(None, (), "unknown", fields)


def _csv(path: Path) -> Recognised:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = tuple(name.strip() for name in next(csv.reader(file), []))
    variant = pmc_vqa.variant_of(set(header))
    if variant:
        return Recognised("pmc_vqa", (variant,), "pmc_vqa", header)
    return Recognised(None, (), "unknown", header)


def _table(path: Path) -> Recognised:
    columns = read_header(path)
    if "clinical vqa task" in columns:
        is_test = "answer" not in columns or part_of(path) is not None
        return Recognised(
            "gmai_mmbench", ("test",) if is_test else ("val",), "gmai_mmbench", columns
        )
    if not {"index", "question"} <= set(columns):
        return Recognised(None, (), "unknown", columns)
    for pattern, name, variants in _TABLE_NAMES:
        if re.search(pattern, path.name, re.IGNORECASE):
            return Recognised(name, variants, "table", columns)
    return Recognised(None, (), "table", columns)


def _parquet(path: Path) -> Recognised:
    columns = column_names(path)
    has = set(columns)
    part = re.match(r"(dev|validation|val|test|train)\b", path.name)
    found = part[1] if part else ""
    if {"options", "question", "answer", "image_1"} <= has:
        in_folder = mmmu.subject_of(path.parent.name)
        if in_folder is None and not any(map(mmmu.subject_of, column_texts(path, "id"))):
            return Recognised(None, (), "mmmu of another subject", columns)
        variants = (found,) if found in ("dev", "validation", "test") else ()
        return Recognised("mmmu_health", variants, "mmmu", columns)
    if {"image", "question", "answer"} <= has and not {"options", "choices"} & has:
        if re.search(r"vqa[-_ ]?rad", str(path), re.IGNORECASE):
            return Recognised("vqa_rad", ("test",) if found == "test" else (), "pairs", columns)
        variant = {"validation": "val"}.get(found, found)
        if re.search(r"path[-_ ]?vqa", str(path), re.IGNORECASE):
            return Recognised("path_vqa", (variant,) if variant else (), "pairs", columns)
        return Recognised(None, (variant,) if variant else (), "pairs", columns)
    return Recognised(None, (), "unknown", columns)


def _pickle(path: Path) -> Recognised | None:
    match = re.match(r"(train|val|test)_qa\.pkl$", path.name)
    return Recognised("path_vqa", (match[1],), "pickle") if match else None


def describe(path: Path) -> str:
    """What a file is, for a message that it is the wrong one."""
    found = recognise(path)
    if found is None:
        return f"{str(path)!r} is no file of a benchmark"
    fields = f" (its fields are {_listed(found.fields)})" if found.fields else ""
    if found.name is None:
        return f"{str(path)!r} is no file of a benchmark that is known{fields}"
    return f"{str(path)!r} is a file of {found.name} {'/'.join(found.variants)}{fields}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
