# SPDX-License-Identifier: Apache-2.0

"""PathVQA (He et al., 2020): questions about pathology images of textbooks.

As its authors ship it: ``pvqa/qas/<part>/<part>_qa.pkl``, a pickled list of ``{"image": "test_0001",
"question", "answer"}``, images ``pvqa/images/<part>/<image>.jpg``; 6,761 test questions. As on the hub, where
42 duplicates were dropped: ``data/test-*.parquet`` with image, question, answer; 6,719 test questions, 3,362
of them answered by yes or no.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.parquet import add_pair, is_pairs, part_of, read_pairs
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    BenchmarkError,
    Collector,
    hashed,
    text_of,
)
from gmai_xtuner.evaluate.benchmarks.table import read_tables
from gmai_xtuner.evaluate.protocols import vqa_protocols


class _OnlyContainers(pickle.Unpickler):
    """Lists, dicts and texts need no class; whatever asks for one is refused, so that no code is run."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def read_pickle(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read the authors' file of one part."""
    (path,) = paths
    try:
        source = hashed(path)
        records = _OnlyContainers(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise BenchmarkError(f"{str(path)!r} can't be read ({error}). Check the path.") from error
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise BenchmarkError(
            f"{str(path)!r} is no pickled list of plain records ({error}); nothing else is unpickled, since "
            "that could run code. Fetch it again from its authors."
        ) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise BenchmarkError(f"{str(path)!r} holds no list of records. Fetch it again.")
    images = path.parent.parent.parent / "images" / collector.variant
    for number, record in enumerate(records):
        name = text_of(record, "image")
        add_pair(record, str(number), (images / f"{name}.jpg",) if name else (), collector)
    return collector.benchmark([source])


def _recognise(header: Header) -> Found | None:
    if match := re.match(r"(train|val|test)_qa\.pkl$", header.path.name):
        return Found((match[1],), "pickle")
    if not is_pairs(header) or re.search(r"vqa[-_ ]?rad", str(header.path), re.IGNORECASE):
        return None
    part = part_of(header.path)
    variants = ({"validation": "val"}.get(part, part),) if part else ()
    named = re.search(r"path[-_ ]?vqa", str(header.path), re.IGNORECASE)
    return Found(variants, "pairs", needs="nothing" if named else "benchmark")


PATH_VQA = Definition(
    name="path_vqa",
    variants=("test", "val", "train"),
    files="'qas/test/test_qa.pkl' and 'images/test', or 'test-*.parquet'",
    forms={
        "pickle": Form(read_pickle, images_up=2),
        "pairs": Form(read_pairs, levels=1),
        "table": Form(read_tables, parts=True),
    },
    recognise=_recognise,
    table_names={r"path[-_ ]?vqa.*val": ("val",), r"path[-_ ]?vqa": ("test",)},
    protocols=(
        *vqa_protocols(
            "path_vqa",
            "test",
            ("answer_type",),
            {
                "yes_no": ("closed-3362", 3362),
                "open": ("open-3357", 3357),
                "all": ("full-6719", 6719),
            },
        ),
        *vqa_protocols("path_vqa", "val", ("answer_type",), {"all": ("val-6259", 6259)}),
        *vqa_protocols("path_vqa", "train", ("answer_type",), {"all": ("train-19654", 19654)}),
    ),
)
