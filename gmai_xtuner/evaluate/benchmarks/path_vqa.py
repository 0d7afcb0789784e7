"""PathVQA (He et al., 2020): questions about pathology images of textbooks.

As its authors ship it: ``pvqa/qas/<part>/<part>_qa.pkl``, a pickled list of ``{"image": "test_0001",
"question", "answer"}``, images ``pvqa/images/<part>/<image>.jpg``; 6,761 test questions. As on the hub, where
42 duplicates were dropped: ``data/test-*.parquet`` with image, question, answer; 6,719 test questions, 3,362
of them answered by yes or no.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark, BenchmarkError, SourceFile
from gmai_xtuner.evaluate.benchmarks.parquet import rows_of
from gmai_xtuner.evaluate.benchmarks.reading import Collector, hashed, text_of
from gmai_xtuner.evaluate.questions import ImageSource, Question


class _OnlyContainers(pickle.Unpickler):
    """Lists, dicts and texts need no class; whatever asks for one is refused, so that no code is run."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def read_pickle(path: Path, variant: str, *, require_images: bool) -> Benchmark:
    """The authors' file of one part."""
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
    collector = Collector("path_vqa", variant, require_images=require_images)
    images = path.parent.parent.parent / "images" / variant
    for number, record in enumerate(records):
        name = text_of(record, "image")
        _add(record, str(number), (images / f"{name}.jpg",) if name else (), collector)
    return collector.benchmark([source])


def read_parquet(
    name: str, paths: Sequence[Path], variant: str, *, require_images: bool
) -> Benchmark:
    """Files of the hub with image, question and answer, as PathVQA and VQA-RAD (``name``) come there."""
    collector = Collector(name, variant, require_images=require_images)
    sources: list[SourceFile] = []
    number = 0
    for path in paths:
        sources.append(hashed(path))
        for row, images in rows_of(path, ("image",)):
            _add(row, str(number), tuple(images.values()), collector)
            number += 1
    return collector.benchmark(sources)


def answer_type(answer: str) -> str:
    """CLOSED for yes and no, as users of PathVQA divide it; OPEN otherwise."""
    return "CLOSED" if answer.strip().lower() in ("yes", "no") else "OPEN"


def _add(
    record: Mapping[str, Any],
    identifier: str,
    images: tuple[ImageSource, ...],
    collector: Collector,
) -> None:
    answer = text_of(record, "answer").strip()
    if not answer:
        collector.problem("no_answer", identifier, "the gold answer is empty")
        return
    collector.add(
        Question(
            id=identifier,
            text=text_of(record, "question").strip(),
            images=images,
            answer=answer,
            groups={"answer_type": answer_type(answer)},
        )
    )
