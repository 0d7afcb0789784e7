"""Benchmarks in the files their authors ship -> questions.

``load_benchmark("slake", folder, variant="zh").questions``
"""

from __future__ import annotations

from gmai_xtuner.evaluate.benchmarks.benchmark import (
    Benchmark,
    BenchmarkError,
    Problem,
    SourceFile,
)
from gmai_xtuner.evaluate.benchmarks.loading import (
    NAMES,
    VARIANTS,
    FoundBenchmark,
    find_benchmarks,
    load_benchmark,
)
from gmai_xtuner.evaluate.benchmarks.submission import write_submission

__all__ = [
    "NAMES",
    "VARIANTS",
    "Benchmark",
    "BenchmarkError",
    "FoundBenchmark",
    "Problem",
    "SourceFile",
    "find_benchmarks",
    "load_benchmark",
    "write_submission",
]
