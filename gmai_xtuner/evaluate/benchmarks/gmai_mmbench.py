"""GMAI-MMBench (Ye et al., NeurIPS 2024): 18 clinical tasks, 18 departments, 4 granularities, 38 modalities.

``GMAI_mm_bench_VAL.tsv`` (4,550 questions) and ``GMAI_mm_bench_TEST_part_1.tsv`` to ``_11`` (21,281): index,
image (base64), question, A to E, answer (VAL only), category, ``clinical VQA task``, department,
``perceptual granularity``, modality. ``category`` is the gold option's text and is never read: for TEST the
authors keep the answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark
from gmai_xtuner.evaluate.benchmarks.reading import Collector
from gmai_xtuner.evaluate.benchmarks.vlmevalkit import read_tables

TASK = "clinical VQA task"
TEST_PARTS = 11

GROUPS: Mapping[str, str] = {
    "clinical vqa task": TASK,
    "department": "department",
    "perceptual granularity": "perceptual granularity",
    "modality": "modality",
}
"""Column, in lower case -> the authors' name of it."""

TASKS: Mapping[str, str] = {
    "Attribute Recognition": "AR",
    "Blood Vessels Recognition": "BVR",
    "Bone": "B",
    "Cell Recognition": "CR",
    "Counting": "C",
    "Disease Diagnosis": "DD",
    "Image Quality Grading": "IQG",
    "Microorganism Recognition": "MR",
    "Muscle": "M",
    "Nervous Tissue": "NT",
    "Organ Recognition - Abdomen": "OR-A",
    "Organ Recognition - Head and Neck": "OR-HN",
    "Organ Recognition - Pelvic": "OR-P",
    "Organ Recognition - Thorax": "OR-T",
    "Severity Grading": "SG",
    "Surgeon Action Recognition": "SAR",
    "Surgical Instrument Recognition": "SIR",
    "Surgical Workflow Recognition": "SWR",
}
"""The 18 tasks in the order of the paper's Table 4, with its short names."""

_PART = re.compile(r"TEST_part_(\d+)\.tsv$", re.IGNORECASE)


def part_of(path: Path) -> int | None:
    """Number of a part of the test set; None for another file."""
    match = _PART.search(path.name)
    return int(match[1]) if match else None


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Parts by number: part 2 before part 10."""
    return sorted(paths, key=lambda path: (part_of(path) or 0, path.name))


def read(paths: Sequence[Path], variant: str, *, require_images: bool) -> Benchmark:
    """VAL, or the parts of TEST; a part that is not there is noted."""
    collector = Collector("gmai_mmbench", variant, require_images=require_images)
    parts = {part_of(path) for path in paths}
    if variant == "test" and parts != {None}:
        for part in range(1, TEST_PARTS + 1):
            if part not in parts:
                collector.problem("missing_part", f"part {part}", "a file of TEST is not there")
    return read_tables(in_order(paths), collector, groups=GROUPS, answers_hidden=variant == "test")
