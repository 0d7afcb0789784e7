"""Name and path -> benchmark; a folder -> the benchmarks in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gmai_xtuner.evaluation.benchmarks.benchmark import Benchmark, BenchmarkError

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "vqa_rad": ("test",),
    "slake": ("en", "zh"),
    "pmc_vqa": ("test_clean", "test_2"),
    "omnimedvqa": ("open-access", "restricted-access"),
    "gmai_mmbench": ("val", "test"),
    "mmmu_health": ("validation", "dev", "test"),
    "path_vqa": ("test", "val", "train"),
    "huatuo": (
        "all",
        "VQA-RAD_test",
        "SLAKE_test",
        "PathVQA_test",
        "PMC-VQA_test",
        "OmniMedVQA",
        "MMMU_Medical_Validation",
    ),
}
"""Variants of each benchmark; the first is the default."""

NAMES = tuple(VARIANTS)
"""Names of the benchmarks, as the command takes them."""


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
    raise BenchmarkError(f"benchmark {name!r} at {str(data)!r} can't be read yet ({variant}, {require_images})")


def find_benchmarks(folder: Path) -> tuple[FoundBenchmark, ...]:
    """Every benchmark under a folder, each variant once, in the order of :data:`NAMES`.

    Raises:
        BenchmarkError: the folder does not exist.
    """
    raise BenchmarkError(f"{str(folder)!r} can't be searched yet")
