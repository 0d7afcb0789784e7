# SPDX-License-Identifier: Apache-2.0

"""Texts of the command: a dry run, the state of a job, the end of a run."""

from __future__ import annotations

import heapq
import itertools
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools import forms, readers, writers
from data_tools.items import Task
from data_tools.job import Job
from data_tools.licences import Terms, publishable_part
from data_tools.output import templates
from data_tools.output.files import turns_of
from data_tools.pipeline import STATE, WORK, Selection, check_writer, kept_sources, source_context
from data_tools.privacy import neutral_errors
from data_tools.readers import SourceOptions
from data_tools.records import Drop, Record, Unit, by_reason
from data_tools.standardise import read_unit
from data_tools.store import Store, Vocabulary
from data_tools.taxonomy import Taxonomy
from data_tools.worker import BY_TEMPLATE, worker_taxonomy
from gmai_xtuner.core.errors import CorpusError

UNITS_READ = 8
"""Of each source in a dry run, spread over the source."""
_RECORDS_OF_A_UNIT = 50
EXAMPLES = 3


def dry_run(job: Job, selection: Selection) -> dict[str, Any]:
    """Read a few units of each source, away from the output; count and estimate the rest from them.

    Returns ``sources`` (with records and conversations estimated for the whole source or the limit),
    ``drops`` of what was read, ``estimate`` of the cost or None, ``examples``. A `CorpusError` if a source
    can't be read.
    """
    job = publishable_part(job)
    check_writer(job, selection)
    writers.check_sending(job, kept_sources(job, selection.sources(job)))
    taxonomy = worker_taxonomy(job.taxonomy)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = [
            _look(job, source, selection, folder, taxonomy) for source in selection.sources(job)
        ]
        estimate = None
        if job.writer.name != "template":
            estimate = _estimate(job, selection, folder, found)
        pool = [task for _, tasks in found for task in _for_writer(job, tasks)]
        examples = [_example(job, task, selection, taxonomy) for task in _spread(pool)]
        sources = [row for row, _ in found]
    return {
        "job": str(job.path),
        "output": str(job.output),
        "writer": job.writer.name,
        "sources": sources,
        "records": sum(row["records"] for row in sources),
        "conversations": sum(row["conversations"] for row in sources),
        "estimate": estimate,
        "examples": examples,
    }


def _look(
    job: Job, source: SourceOptions, selection: Selection, folder: Path, taxonomy: Taxonomy
) -> tuple[dict[str, Any], list[Task]]:
    module, terms = readers.load(source.reader), Terms(job.corpus, job.agreements)
    with neutral_errors(source):
        units, chosen = _sample(module.units(source), job.seed)
    records: list[Record] = []
    drops: list[Drop] = []
    count = 0
    for unit in chosen:
        with neutral_errors(source):
            result = read_unit(source, unit, folder=folder, taxonomy=taxonomy, terms=terms)
        count += len(result.stored)
        records += result.records[:_RECORDS_OF_A_UNIT]
        drops += result.drops
    found = Vocabulary.of(records)
    context = source_context(job, source, found)
    items = [
        Task(item, record, context)
        for record in records
        for item in forms.plan(record, context, job.make, seed=job.seed)
    ]
    expected = count * units / len(chosen) if chosen else 0
    if selection.limit is not None:
        expected = min(expected, selection.limit)
    for_each = len(items) / len(records) if records else 0
    row = {
        "name": source.name,
        "reader": source.reader,
        "units": units,
        "units_read": len(chosen),
        "records_read": count,
        "records": round(expected),
        "conversations": round(expected * for_each),
        "labels": list(found.names[:50]),
        "drops": [
            {
                "stage": stage,
                "reason": reason,
                "count": number,
                "example": f"{first.where}: {first.detail}",
            }
            for (stage, reason), (number, first) in by_reason(drops).items()
        ],
    }
    return row, items


def _sample(units: Iterable[Unit], seed: int) -> tuple[int, list[Unit]]:
    """Return how many units there are, and a few of them in their order, drawn evenly."""
    rng, places = random.Random(seed), itertools.count()
    numbered = ((rng.random(), place, unit) for unit, place in zip(units, places, strict=False))
    drawn = heapq.nlargest(UNITS_READ, numbered)
    return next(places), [unit for _, _, unit in sorted(drawn, key=lambda entry: entry[1])]


def _for_writer(job: Job, tasks: list[Task]) -> list[Task]:
    if job.writer.name == "template":
        return tasks
    return [task for task in tasks if task.item.form not in BY_TEMPLATE]


def _spread(tasks: list[Task]) -> list[Task]:
    """Choose a few tasks, of different forms as far as there are."""
    by_form: dict[str, Task] = {}
    for task in tasks:
        by_form.setdefault(task.item.form, task)
    first = list(by_form.values())
    return [*first, *(task for task in tasks if task not in first)][:EXAMPLES]


def _estimate(
    job: Job, selection: Selection, folder: Path, tasks: list[tuple[dict[str, Any], list[Task]]]
) -> dict[str, float]:
    """Estimate each source by itself, scaled from what was read to the whole."""
    total: Counter[str] = Counter()
    writer = writers.model_writer(job, grounded=selection.grounded, folder=folder)
    for row, found in tasks:
        if not found:
            continue
        estimate = writer.estimate(_for_writer(job, found))
        scale = row["conversations"] / len(found)
        for name, value in estimate.items():
            total[name] += value * scale
    digits = {name: 2 if name.startswith("dollars") else None for name in total}
    return {name: round(value, digits[name]) for name, value in total.items()}


def _example(job: Job, task: Task, selection: Selection, taxonomy: Taxonomy) -> dict[str, Any]:
    item = task.item
    shown: dict[str, Any] = {"id": item.id, "form": item.form, "language": item.language}
    if job.writer.name == "template":
        return shown | {"conversation": turns_of(forms.write(task, taxonomy))}
    prompt = writers.prompts_of(job, grounded=selection.grounded).build(task)
    return shown | {"system": prompt.system, "user": prompt.user, "image": prompt.image}


def stats(job: Job, selection: Selection) -> dict[str, Any]:
    """Return ``funnel``, ``forms``, ``usage`` and ``pending`` of what was made so far.

    A `CorpusError` if nothing was made yet.
    """
    selection.sources(job)
    path = job.output / WORK / STATE
    if not path.is_file():
        raise CorpusError(f"there is nothing in {job.output} yet; run the job first.")
    with Store(path) as store:
        store.choose(selection.only)
        return {
            "output": str(job.output),
            "funnel": [row._asdict() for row in store.funnel()],
            "forms": store.forms(),
            "usage": asdict(store.usage()),
            "pending": store.count_pending(),
        }


def as_text(found: Mapping[str, Any], template: str) -> str:
    """Return what `dry_run` or `stats` found as text for people, by ``dry_run.j2`` or ``stats.j2``."""
    return templates().get_template(f"output/{template}").render(found).rstrip("\n")
