# SPDX-License-Identifier: Apache-2.0

"""The work of a worker: read units of a source, and plan, write and check the conversations of records.

Conversations that a model is to write are only planned here; see `pipeline` for how they are asked for.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools import forms
from data_tools.checks import CheckOptions, check
from data_tools.items import Conversation, Item, SourceContext, Task
from data_tools.licences import Terms
from data_tools.options import MakeOptions
from data_tools.privacy import Names, salted, texts_in
from data_tools.readers import SourceOptions
from data_tools.records import Record, Unit
from data_tools.standardise import UnitResult, read_unit
from data_tools.store import ACCEPTED, MAX_ITEMS, PENDING, REJECTED, ItemRow, StoredRecord, encode
from data_tools.taxonomy import Taxonomy
from data_tools.taxonomy import load as load_taxonomy
from gmai_xtuner.core.archives import locate
from gmai_xtuner.core.rng import seed_of

BY_TEMPLATE = ("perception",)
"""Forms that follow from the labels alone and are never a model's to write."""

_LONGEST_NAME = 4096  # of a file
_ATTEMPTS = 8  # to word a conversation otherwise than those that the record has already


@lru_cache(maxsize=4)
def worker_taxonomy(extra: Path | None) -> Taxonomy:
    """Return the taxonomy with the terms of a job's file; it is loaded once a process."""
    return load_taxonomy(extra)


def read_units(
    source: SourceOptions,
    folder: Path,
    taxonomy: Path | None,
    terms: Terms | None,
    units: list[tuple[int, Unit]],
) -> tuple[list[UnitResult], float]:
    """Read numbered units of a source for the corpus in ``folder``; ``taxonomy`` extends the built-in one.

    Returns what became of each unit, and the seconds that all of them took.
    """
    started = time.perf_counter()
    known, names = worker_taxonomy(taxonomy), Names(salted(source))
    results = []
    for _, unit in units:
        result = read_unit(source, unit, folder=folder, taxonomy=known, terms=terms, names=names)
        fingerprint = unit_fingerprint(source.root, unit, result.files)
        results.append(replace(result, fingerprint=fingerprint))
    return results, time.perf_counter() - started


def unit_fingerprint(root: Path, unit: Unit, files: Iterable[str] = ()) -> bytes:
    """Return 16 bytes that change if the unit's payload, a file that it names or one of ``files`` changes.

    A file counts as named if a text anywhere in key or payload is its path, absolute or below the root. Its
    size and time of change are looked at, not its bytes; a folder's are those of its entries. A `TypeError`
    if the payload holds something else than plain values.
    """
    said = (unit.key, unit.payload, *files)
    texts = list(texts_in(said))
    digest = hashlib.blake2b(repr(said).encode("utf-8", "surrogatepass"), digest_size=16)
    for text in texts:
        if 0 < len(text) < _LONGEST_NAME and "\0" not in text and "\n" not in text:
            _add_file(digest, os.path.join(root, text))
    return digest.digest()


def _add_file(digest: Any, path: str) -> None:
    try:
        if not os.path.exists(path) and (found := locate(path)):
            digest.update(repr(found[0].parts).encode())
            return
        state = os.stat(path)
        digest.update(f"f{state.st_size},{state.st_mtime_ns}".encode())
        if os.path.isdir(path):
            entries = sorted((entry.name, entry.stat()) for entry in os.scandir(path))
            for name, state in entries:
                line = f"e{name}\0{state.st_size},{state.st_mtime_ns}"
                digest.update(line.encode("utf-8", "surrogatepass"))
    except (OSError, ValueError):
        digest.update(b"-")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the conversations of a source are made; the same for all of its records.

    ``taxonomy`` is the file that extends the built-in one. ``answers``, with a model as writer, is the hash
    of everything of the job that its answers depend on; None: all is written by the template writer.
    """

    make: MakeOptions
    checks: CheckOptions
    seed: int
    taxonomy: Path | None
    context: SourceContext
    answers: bytes | None


def make(packed: bytes, records: list[StoredRecord]) -> list[list[ItemRow]]:
    """Return the items of each of some records.

    ``packed`` is a pickled `Recipe`. A worker unpacks it once: what the checks derive from a vocabulary is
    kept for as long as the object is the same.
    """
    recipe: Recipe = _unpacked(packed)
    taxonomy = worker_taxonomy(recipe.taxonomy)
    return [_make_one(recipe, stored, taxonomy) for stored in records]


_unpacked = lru_cache(maxsize=4)(pickle.loads)


def _make_one(recipe: Recipe, stored: StoredRecord, taxonomy: Taxonomy) -> list[ItemRow]:
    record = stored.record
    rows: list[ItemRow] = []
    said: set[Conversation] = set()
    for item in forms.plan(record, recipe.context, recipe.make, seed=recipe.seed):
        row = stored.row * MAX_ITEMS + len(rows)
        if recipe.answers is not None and item.form not in BY_TEMPLATE:
            made = _row(row, PENDING, item, record)
            made.key = _answer_key(recipe.answers, item, record)
            rows.append(made)
        elif written := _by_template(recipe, Task(item, record, recipe.context), taxonomy, said):
            task, conversation = written
            problems = check(conversation, task, taxonomy, recipe.checks)
            made = _row(row, REJECTED if problems else ACCEPTED, task.item, record)
            made.conversation = encode(conversation)
            made.problems = encode(problems) if problems else None
            rows.append(made)
    return rows


def _by_template(
    recipe: Recipe, task: Task, taxonomy: Taxonomy, said: set[Conversation]
) -> tuple[Task, Conversation] | None:
    """Write the task in words that the record's other conversations don't have; None if there are none."""
    item, conversation = task.item, forms.write(task, taxonomy)
    for attempt in range(1, _ATTEMPTS):
        if conversation not in said:
            break
        seed = seed_of(f"{item.id} {attempt}", recipe.seed)
        task = replace(task, item=replace(item, seed=seed))
        conversation = forms.write(task, taxonomy)
    if conversation in said:
        return None
    said.add(conversation)
    return task, conversation


def _row(row: int, state: int, item: Item, record: Record) -> ItemRow:
    suffix = item.id.removeprefix(record.id)
    if record.id + suffix != item.id:
        raise ValueError(f"item {item.id!r} doesn't begin with its record's id {record.id!r}")
    return ItemRow(row, state, suffix, item.form, item.language, item.kind, item.focus, item.seed)


def _answer_key(answers: bytes, item: Item, record: Record) -> bytes:
    """Hash everything that an answer depends on: where an image lies or who owns it is none of it."""
    provenance = replace(record.provenance, licence="", url="", file="", sha256="", group="")
    body = encode((item, replace(record, provenance=provenance)))
    return hashlib.blake2b(answers + body, digest_size=16).digest()
