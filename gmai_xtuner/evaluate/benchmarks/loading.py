"""Name and path -> benchmark; a folder -> the benchmarks in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks import (
    gmai_mmbench,
    huatuo,
    mmmu,
    omnimedvqa,
    path_vqa,
    pmc_vqa,
    slake,
    vqa_rad,
)
from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark, BenchmarkError
from gmai_xtuner.evaluate.benchmarks.reading import Collector, walk
from gmai_xtuner.evaluate.benchmarks.recognition import Recognised, describe, recognise
from gmai_xtuner.evaluate.benchmarks.vlmevalkit import read_tables

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "vqa_rad": ("test",),
    "slake": ("en", "zh"),
    "pmc_vqa": ("test_clean", "test_2"),
    "omnimedvqa": ("open-access", "restricted-access"),
    "gmai_mmbench": ("val", "test"),
    "mmmu_health": ("validation", "dev", "test"),
    "path_vqa": ("test", "val", "train"),
    "huatuo": ("all", *huatuo.COUNTS),
}
"""Variants of each benchmark; the first is the default."""

NAMES = tuple(VARIANTS)
"""Names of the benchmarks, as the command takes them."""

FILES: Mapping[str, str] = {
    "vqa_rad": "'VQA_RAD Dataset Public.json' and 'VQA_RAD Image Folder'",
    "slake": "'test.json' and 'imgs'",
    "pmc_vqa": "'test_clean.csv' or 'test_2.csv' and 'images'",
    "omnimedvqa": "'QA_information/Open-access/*.json' and 'Images'",
    "gmai_mmbench": "'GMAI_mm_bench_VAL.tsv' or 'GMAI_mm_bench_TEST_part_*.tsv'",
    "mmmu_health": "'<subject>/validation-*.parquet' of five subjects",
    "path_vqa": "'qas/test/test_qa.pkl' and 'images/test', or 'test-*.parquet'",
    "huatuo": "'medical_multimodel_evaluation_data.json' and 'images'",
}
"""What the authors ship, for messages; each may be VLMEvalKit's table instead."""

_TABLE_GROUPS: Mapping[str, str] = {
    "answer_type": "answer_type",
    "category": "category",
    "content_type": "content_type",
    "dataset": "dataset",
    "l2-category": "l2-category",
    "modality": "modality",
    "modality_type": "modality",
    "question_type": "question_type",
    "split": "split",
    "subset": "subset",
}


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
        variant: one of ``VARIANTS[name]``; the first of them where None, or the one that a single file is.
        require_images: leave out questions whose image file is missing and count them under
            ``"missing_image"``; False keeps them and looks for no image, for work on the text alone.

    Raises:
        BenchmarkError: nothing of that benchmark at that place, a file of another benchmark, or a file
            that can't be read; the message names it.
    """
    if name not in VARIANTS:
        raise BenchmarkError(f"no benchmark is called {name!r}. There are {', '.join(NAMES)}.")
    if variant is not None and variant not in VARIANTS[name]:
        raise BenchmarkError(
            f"{name} has no variant {variant!r}. There are {', '.join(VARIANTS[name])}."
        )
    data = Path(data)
    if not data.exists():
        raise BenchmarkError(f"{str(data)!r} does not exist. {name} is {FILES[name]}.")
    if data.is_file():
        paths, form, variant = _single_file(name, data, variant)
    else:
        variant = variant or VARIANTS[name][0]
        paths, form = _in_folder(name, data, variant)
    return _READERS[form](name, paths, variant, require_images)


def find_benchmarks(folder: Path) -> tuple[FoundBenchmark, ...]:
    """Every benchmark under a folder, each variant once, in the order of :data:`NAMES`.

    Where both the authors' files and a table of VLMEvalKit lie there, the authors' files are taken, and of
    several copies the first by name. Of the HuatuoGPT-Vision collection the whole is named, not its parts.

    Raises:
        BenchmarkError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BenchmarkError(f"{str(folder)!r} is no folder.")
    found: dict[tuple[str, str], list[tuple[Path, Recognised]]] = {}
    for path in walk(folder):
        recognised = recognise(path)
        if recognised is not None and recognised.name is not None:
            for variant in recognised.variants:
                found.setdefault((recognised.name, variant), []).append((path, recognised))
    places = []
    for name, variants in VARIANTS.items():
        for variant in variants:
            if files := found.get((name, variant)):
                path, recognised = min(files, key=lambda file: file[1].form == "table")
                places.append(FoundBenchmark(name, variant, _place(path, recognised.form)))
    return tuple(places)


def _place(path: Path, form: str) -> Path:
    """What :func:`load_benchmark` takes so that it reads all files of the form, and no other."""
    match form:
        case "omnimedvqa":
            return path.parent.parent.parent
        case "mmmu":
            return path.parent.parent
        case "gmai_mmbench" if gmai_mmbench.part_of(path) is not None:
            return path.parent
        case "pairs":
            return path.parent
    return path


def _single_file(name: str, path: Path, variant: str | None) -> tuple[Sequence[Path], str, str]:
    """(files, form, variant) of an annotation file that the user names."""
    recognised = recognise(path)
    fits = recognised is not None and (
        recognised.name == name
        or (recognised.name is None and recognised.form == "table")
        or (
            recognised.name is None
            and recognised.form == "pairs"
            and name in ("path_vqa", "vqa_rad")
        )
    )
    if recognised is None or not fits:
        raise BenchmarkError(
            f"{name} was asked for, but {describe(path)}. {name} is {FILES[name]}, or a table of VLMEvalKit."
        )
    offered = tuple(found for found in recognised.variants if found in VARIANTS[name])
    if variant is None:
        variant = offered[0] if offered else VARIANTS[name][0]
    elif offered and variant not in offered and name != "huatuo":
        raise BenchmarkError(
            f"{name} {variant} was asked for, but {describe(path)}. Name the other file, or "
            f"the variant {' or '.join(offered)}."
        )
    return [path], recognised.form, variant


def _in_folder(name: str, folder: Path, variant: str) -> tuple[Sequence[Path], str]:
    """(files, form) of a variant in a folder."""
    if name == "omnimedvqa":
        for root in (folder, folder / "OmniMedVQA"):
            questions = root / "QA_information" / omnimedvqa.FOLDERS[variant]
            if questions.is_dir():
                return [questions], "omnimedvqa"
    wanted = "all" if name == "huatuo" else variant
    by_form: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in walk(folder):
        recognised = recognise(path)
        if recognised is None:
            continue
        if recognised.name == name and wanted in recognised.variants:
            by_form.setdefault(recognised.form, []).append(path)
        elif recognised.form == "pairs" and recognised.name is None and name == "path_vqa":
            if wanted in recognised.variants:
                by_form.setdefault("pairs", []).append(path)
        elif recognised.name is not None:
            others.append(path)
    form = next((form for form in by_form if form != "table"), "table")
    paths = by_form.get(form, [])
    if not paths:
        seen = f" There is: {'; '.join(describe(path) for path in others[:3])}." if others else ""
        raise BenchmarkError(
            f"nothing of {name} {variant} in {str(folder)!r}. It is {FILES[name]}, or a table of "
            f"VLMEvalKit.{seen}"
        )
    if form in ("mmmu", "pairs", "table", "gmai_mmbench"):
        if form in ("pairs", "mmmu"):
            return _of_one_copy(paths, folder, deep=form == "mmmu"), form
        if form == "table" or gmai_mmbench.part_of(paths[0]) is not None:
            return _parts(paths, folder), form
    if len(paths) > 1:
        raise BenchmarkError(
            f"{name} {variant} is in {str(folder)!r} more than once: "
            f"{', '.join(repr(str(path)) for path in paths)}. Name the file."
        )
    return paths, form


def _of_one_copy(paths: Sequence[Path], folder: Path, *, deep: bool) -> Sequence[Path]:
    """Files of one data set: all of one folder, or of the subjects' folders beside each other."""
    roots = {path.parent.parent if deep else path.parent for path in paths}
    if len(roots) > 1:
        raise BenchmarkError(
            f"{str(folder)!r} holds more than one copy: {', '.join(repr(str(r)) for r in sorted(roots))}. "
            "Name one of them."
        )
    return sorted(paths)


def _parts(paths: Sequence[Path], folder: Path) -> Sequence[Path]:
    """Parts of one table in the order of their numbers."""
    stems = {re.sub(r"(part_?)\d+", r"\1N", path.stem) for path in paths}
    if len(stems) > 1 or len({path.parent for path in paths}) > 1:
        raise BenchmarkError(
            f"{str(folder)!r} holds more than one table of it: "
            f"{', '.join(repr(str(path)) for path in paths[:4])}. Name the file."
        )
    return sorted(
        paths,
        key=lambda path: [int(number) for number in re.findall(r"part_?(\d+)", path.stem)],
    )


def _table(name: str, paths: Sequence[Path], variant: str, require_images: bool) -> Benchmark:
    if name == "mmmu_health":
        return mmmu.read_tsv(paths, variant, require_images=require_images)
    keep: Callable[[Mapping[str, str]], bool] | None = None
    if name == "slake":
        keep = lambda values: values.get("q_lang", variant) in (variant, "")  # noqa: E731
    elif name == "huatuo" and variant != "all":
        keep = lambda values: values.get("dataset", values.get("category")) == variant  # noqa: E731
    return read_tables(
        paths,
        Collector(name, variant, require_images=require_images),
        groups=_TABLE_GROUPS,
        keep=keep,
    )


def _one(read: Callable[..., Benchmark]) -> Callable[[str, Sequence[Path], str, bool], Benchmark]:
    return lambda _, paths, variant, require_images: read(
        paths[0], variant, require_images=require_images
    )


def _several(
    read: Callable[..., Benchmark],
) -> Callable[[str, Sequence[Path], str, bool], Benchmark]:
    return lambda _, paths, variant, require_images: read(
        paths, variant, require_images=require_images
    )


_READERS: Mapping[str, Callable[[str, Sequence[Path], str, bool], Benchmark]] = {
    "vqa_rad": _one(vqa_rad.read),
    "slake": _one(slake.read),
    "pmc_vqa": _one(pmc_vqa.read),
    "omnimedvqa": _one(omnimedvqa.read),
    "gmai_mmbench": _several(gmai_mmbench.read),
    "mmmu": _several(mmmu.read),
    "pickle": _one(path_vqa.read_pickle),
    "pairs": lambda name, paths, variant, require_images: path_vqa.read_parquet(
        name, paths, variant, require_images=require_images
    ),
    "huatuo": _one(huatuo.read),
    "table": _table,
}
