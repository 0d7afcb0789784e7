# SPDX-License-Identifier: Apache-2.0

"""SLAKE (Liu et al., ISBI 2021): radiology questions in English and Chinese.

``test.json``: records with img_id, img_name, question, answer, q_lang, location, modality, answer_type,
base_type, triple, qid, content_type; images ``imgs/<img_name>``. English: 1,061 questions, 645 OPEN and 416
CLOSED, 355 of these answered by yes or no. Chinese: 1,033.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.definition import Definition, Form, Found, Header
from gmai_xtuner.evaluate.benchmarks.reading import Benchmark, Collector, read_records, text_of
from gmai_xtuner.evaluate.benchmarks.table import read_tables
from gmai_xtuner.evaluate.protocols import vqa_protocols
from gmai_xtuner.evaluate.questions import Question

_GROUPS = ("answer_type", "content_type", "base_type", "modality", "location")


def read(paths: Sequence[Path], collector: Collector) -> Benchmark:
    """Read the questions in the variant's language from the authors' JSON file."""
    (path,) = paths
    records, source = read_records(path)
    for number, record in enumerate(records, start=1):
        if text_of(record, "q_lang") != collector.variant:
            continue
        identifier = text_of(record, "qid") or f"record {number}"
        image = text_of(record, "img_name")
        answer = text_of(record, "answer").strip()
        if not answer:
            collector.problem("no_answer", identifier, "the gold answer is empty")
            continue
        collector.add(
            Question(
                id=identifier,
                text=text_of(record, "question").strip(),
                images=(path.parent / "imgs" / image,) if image else (),
                answer=answer,
                groups={name: text_of(record, name).strip() for name in _GROUPS},
            )
        )
    return collector.benchmark([source])


def _read_table(paths: Sequence[Path], collector: Collector) -> Benchmark:
    languages = (collector.variant, "")
    return read_tables(paths, collector, keep=lambda row: row.get("q_lang", "") in languages)


def _recognise(header: Header) -> Found | None:
    if header.suffix == ".json" and header.has("q_lang", "img_name", "answer_type"):
        return Found(("en", "zh"), "json")
    return None


_TABLE = ("answer_type", "content_type", "modality", "location")

SLAKE = Definition(
    name="slake",
    variants=("en", "zh"),
    files="'test.json' and 'imgs'",
    forms={"json": Form(read), "table": Form(_read_table, parts=True)},
    recognise=_recognise,
    table_names={r"slake.*(?:zh|cn|chinese)": ("zh",), r"slake": ("en",)},
    protocols=(
        *vqa_protocols(
            "slake",
            "en",
            _TABLE,
            {
                "closed": ("closed-416", 416),
                "yes_no": ("closed-355", 355),
                "open": ("open-645", 645),
                "all": ("full-1061", 1061),
            },
        ),
        *vqa_protocols(
            "slake",
            "zh",
            _TABLE,
            {
                "all": ("full-1033", 1033),
                "closed": ("closed-420", 420),
                "open": ("open-613", 613),
            },
            words="short_zh",
        ),
    ),
)
