"""What a worker does with records: plan their conversations, write and check those that need no model."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from data_tools import forms
from data_tools.checks import CheckOptions, check
from data_tools.forms.options import MakeOptions
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.store import (
    ACCEPTED,
    PENDING,
    REJECTED,
    Raw,
    WrittenItem,
    encode,
)
from data_tools.taxonomy import Taxonomy
from data_tools.taxonomy import load as load_taxonomy
from gmai_xtuner.core.rng import seed_of

BY_TEMPLATE = ("perception",)
"""Forms that follow from the labels alone and are never a model's to write."""

_ATTEMPTS = 8  # to word a conversation otherwise than those that the record has already


@dataclass(frozen=True, slots=True)
class Making:
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


def make(packed: bytes, raws: list[Raw]) -> list[list[WrittenItem]]:
    """The items of some records, in their order.

    Args:
        packed: pickled `Making`. A worker unpacks it once: what the checks derive from a vocabulary is kept
            for as long as the object is the same.
        raws: the records.
    """
    making = _unpacked(packed)
    taxonomy = worker_taxonomy(making.taxonomy)
    return [_make_one(making, raw, taxonomy) for raw in raws]


@lru_cache(maxsize=4)
def worker_taxonomy(extra: Path | None) -> Taxonomy:
    """Loaded once a process."""
    return load_taxonomy(extra)


@lru_cache(maxsize=4)
def _unpacked(packed: bytes) -> Making:
    made: Making = pickle.loads(packed)
    return made


def _make_one(making: Making, raw: Raw, taxonomy: Taxonomy) -> list[WrittenItem]:
    record = raw.decode()
    made = []
    said: set[Conversation] = set()
    for item in forms.plan(record, making.context, making.make, seed=making.seed):
        if making.answers is None or item.form in BY_TEMPLATE:
            written = _by_template(making, item, record, taxonomy, said)
            if written is not None:
                made.append(written)
        else:
            key = _key(making.answers, item, record)
            made.append((PENDING, *_own(item, record), key, None, None))
    return made


def _by_template(
    making: Making, item: Item, record: Record, taxonomy: Taxonomy, said: set[Conversation]
) -> WrittenItem | None:
    """The item in words that the record's other conversations don't have; None if there are no others."""
    conversation = forms.write(item, record, making.context, taxonomy)
    for attempt in range(1, _ATTEMPTS):
        if conversation not in said:
            break
        item = replace(item, seed=seed_of(f"{item.id} {attempt}", making.seed))
        conversation = forms.write(item, record, making.context, taxonomy)
    if conversation in said:
        return None
    said.add(conversation)
    problems = check(conversation, item, record, making.context, taxonomy, making.checks)
    return (
        REJECTED if problems else ACCEPTED,
        *_own(item, record),
        None,
        encode(conversation),
        encode(tuple(problems)) if problems else None,
    )


def _own(item: Item, record: Record) -> tuple[str, str, str, str, int | None, int]:
    suffix = item.id.removeprefix(record.id)
    if record.id + suffix != item.id:
        raise ValueError(f"item {item.id!r} doesn't begin with its record's id {record.id!r}")
    return suffix, item.form, item.language, item.kind, item.focus, item.seed


def _key(answers: bytes, item: Item, record: Record) -> bytes:
    """Hash of everything that an answer depends on: where a picture lies or who owns it is none of it."""
    provenance = replace(record.provenance, licence="", url="", file="", sha256="", group="")
    body = encode((item, replace(record, provenance=provenance)))
    return hashlib.blake2b(answers + body, digest_size=16).digest()
