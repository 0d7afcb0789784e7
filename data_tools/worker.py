# SPDX-License-Identifier: Apache-2.0

"""The work of a worker: read units of a source, and plan, write and check the conversations of records.

Conversations that a model is to write are only planned here; see `pipeline` for how they are asked for.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from data_tools import forms
from data_tools.checks import CheckOptions, check
from data_tools.fingerprints import unit_fingerprint
from data_tools.forms.options import MakeOptions
from data_tools.items import Conversation, Item, SourceContext
from data_tools.readers import SourceOptions
from data_tools.records import Record, Unit
from data_tools.standardise import duplicate_key, read_unit
from data_tools.store import (
    ACCEPTED,
    MAX_ITEMS,
    PENDING,
    REJECTED,
    ItemRow,
    StoredRecord,
    StoredUnit,
    encode,
)
from data_tools.taxonomy import Taxonomy
from data_tools.taxonomy import load as load_taxonomy
from gmai_xtuner.core.rng import seed_of

BY_TEMPLATE = ("perception",)
"""Forms that follow from the labels alone and are never a model's to write."""

_ATTEMPTS = 8  # to word a conversation otherwise than those that the record has already


@lru_cache(maxsize=4)
def worker_taxonomy(extra: Path | None) -> Taxonomy:
    """Return the taxonomy with the terms of a job's file; it is loaded once a process."""
    return load_taxonomy(extra)


def read_units(
    source: SourceOptions, folder: Path, taxonomy: Path | None, units: list[Unit]
) -> tuple[list[StoredUnit], float]:
    """Read units of a source.

    Args:
        source: its entry of the job.
        folder: of the corpus.
        taxonomy: the job's file, which extends the built-in one.
        units: in the order of the source.

    Returns:
        What became of each unit, and the seconds that all of them took.
    """
    started = time.perf_counter()
    terms = worker_taxonomy(taxonomy)
    results = []
    for unit in units:
        result = read_unit(source, unit, folder=folder, taxonomy=terms)
        results.append(
            StoredUnit(
                unit_fingerprint(source.root, unit, result.files),
                [StoredRecord(r.id, encode(r), duplicate_key(r), r.image) for r in result.records],
                result.drops,
                result.samples,
                sum(label.box is not None for r in result.records for label in r.labels),
                result.files,
            )
        )
    return results, time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the conversations of a source are made; the same for all of its records.

    Args:
        make, checks, seed: of the job.
        taxonomy: file that extends the built-in one.
        context: of the source.
        answers: with a model as writer, hash of everything of the job that its answers depend on; None: all
            is written by the template writer.
    """

    make: MakeOptions
    checks: CheckOptions
    seed: int
    taxonomy: Path | None
    context: SourceContext
    answers: bytes | None


def make(packed: bytes, records: list[StoredRecord]) -> list[list[ItemRow]]:
    """Make the items of some records.

    Args:
        packed: pickled `Recipe`. A worker unpacks it once: what the checks derive from a vocabulary is kept
            for as long as the object is the same.
        records: as they are in the store.

    Returns:
        The items of each record.
    """
    recipe = _unpacked(packed)
    taxonomy = worker_taxonomy(recipe.taxonomy)
    return [_make_one(recipe, stored, taxonomy) for stored in records]


@lru_cache(maxsize=4)
def _unpacked(packed: bytes) -> Recipe:
    recipe: Recipe = pickle.loads(packed)
    return recipe


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
        elif written := _by_template(recipe, item, record, taxonomy, said):
            item, conversation = written
            problems = check(conversation, item, record, recipe.context, taxonomy, recipe.checks)
            made = _row(row, REJECTED if problems else ACCEPTED, item, record)
            made.conversation = encode(conversation)
            made.problems = encode(problems) if problems else None
            rows.append(made)
    return rows


def _by_template(
    recipe: Recipe, item: Item, record: Record, taxonomy: Taxonomy, said: set[Conversation]
) -> tuple[Item, Conversation] | None:
    """Write the item in words that the record's other conversations don't have; None if there are none."""
    conversation = forms.write(item, record, recipe.context, taxonomy)
    for attempt in range(1, _ATTEMPTS):
        if conversation not in said:
            break
        item = replace(item, seed=seed_of(f"{item.id} {attempt}", recipe.seed))
        conversation = forms.write(item, record, recipe.context, taxonomy)
    if conversation in said:
        return None
    said.add(conversation)
    return item, conversation


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
