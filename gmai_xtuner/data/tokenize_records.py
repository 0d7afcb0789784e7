# SPDX-License-Identifier: Apache-2.0

"""Records -> rows of a token cache, in this process or, if there are many, in several.

Bad records are reported all at once: as an error for people, as a list for tools. A build that is refused
leaves ``<dataset>-<key>.bad/`` beside the caches::

    bad.jsonl       each bad record: id, where, reason, problem, remedy; its bad images, with a reason each
    error.json      the error, for processes that waited for the same build
    ...             a token cache of the good records, for looking at

Memory does not grow with their number: the error shows the first, the list on disk has all.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from gmai_xtuner.core.constants import DATA_URL
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import DataError, GMAIError, ImageError
from gmai_xtuner.core.imaging.images import check_image
from gmai_xtuner.core.mixture import DatasetEntry
from gmai_xtuner.core.records import RawRecord, iter_raw
from gmai_xtuner.data.tokenization import ConversationTokenizer, TokenizedConversation, fit

RECORDS_A_CHUNK = 512
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("label_spans", pa.list_(pa.int32())),
        ("images", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The options that decide which records are kept, and how.

    Args:
        max_length: tokens of a pack, image tokens counted.
        num_image_tokens: tokens of one image.
        max_images: images of a pack.
        over_length: ``cut`` between turns, or ``drop``.
        on_bad_sample: ``raise`` collects the bad records and raises one error, ``skip`` leaves them out
            and counts them.
        check_images: ``none``, ``exists``, ``header`` (opens the file, looks at size and trailer) or
            ``decode`` (reads every pixel).
        max_pixels: an image with more is refused.
    """

    max_length: int
    num_image_tokens: int
    max_images: int
    over_length: str
    on_bad_sample: str
    check_images: str
    max_pixels: int

    def __post_init__(self) -> None:
        for name, allowed in (
            ("over_length", ("cut", "drop")),
            ("on_bad_sample", ("raise", "skip")),
            ("check_images", ("none", "exists", "header", "decode")),
        ):
            if getattr(self, name) not in allowed:
                raise GMAIError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )


@dataclass(slots=True)
class Chunk:
    """Rows of some records (``read`` of them), and notes on those that are cut, too long or bad."""

    read: int
    batch: pa.RecordBatch
    counts: np.ndarray
    left_out: list[dict[str, Any]]
    bad: list[dict[str, Any]]


def tokenized_chunks(
    job: TokenizeJob, num_workers: int | None, broken_files: list[DataError]
) -> Iterator[Chunk]:
    """Yield records in chunks, in order, tokenised in this process or, if there are many, in several.

    What is wrong with a file as a whole goes to ``broken_files``; the next file is read all the same.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    raw = _raw_records(job.entry, broken_files)
    chunks = iter(lambda: list(islice(raw, RECORDS_A_CHUNK)), [])
    head = list(islice(chunks, 4))
    if num_workers < 2 or len(head) < 4:
        yield from map(job, chain(head, chunks))
        return
    # Forked workers inherit the modules; a spawned one would import torch and xtuner first (8 s each).
    # They inherit the job too: a tokenizer of 92,544 ids takes 1 s to send, a chunk's work 0.1 s.
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_take_job,
        initargs=(job,),
    )
    try:
        waiting: list[Future[Chunk]] = []
        for chunk in chain(head, chunks):
            waiting.append(pool.submit(_do_job, chunk))
            if len(waiting) >= 4 * num_workers:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _raw_records(entry: DatasetEntry, broken_files: list[DataError]) -> Iterator[RawRecord]:
    for path in entry.annotations:
        try:
            yield from iter_raw(path, dataset=entry.name)
        except DataError as error:
            broken_files.append(error)


_job_of_worker: TokenizeJob | None = None


def _take_job(job: TokenizeJob) -> None:
    global _job_of_worker
    _job_of_worker = job
    # What was inherited stays until the end; looking through all of torch's objects for garbage again and
    # again would also copy their pages.
    gc.freeze()
    # The tokenizer's threads did not survive the fork, and importing xtuner sets this to "true", by
    # which tokenizers does not look whether they did: a worker would wait for them forever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do_job(records: Sequence[RawRecord]) -> Chunk:
    assert _job_of_worker is not None
    return _job_of_worker(records)


@dataclass(slots=True)
class TokenizeJob:
    """Parse, check, tokenise and fit some records. Runs in a worker."""

    entry: DatasetEntry
    tokenizer: ConversationTokenizer
    options: CacheOptions

    def __call__(self, records: Sequence[RawRecord]) -> Chunk:
        left_out: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        conversations, places = [], []
        for record in records:
            try:
                conversation = parse_raw(
                    record,
                    dataset=self.entry.name,
                    image_root=self.entry.image_root,
                    images_first=self.entry.images_first,
                )
            except DataError as error:
                name = error.record or record.default_id
                bad.append(note_of_record(name, record.where, {"": error}))
                continue
            if errors := self._check_images(conversation.images):
                bad.append(note_of_record(conversation.id, record.where, errors))
            else:
                conversations.append(conversation)
                places.append(record.where)
        kept, options = [], self.options
        for tokenized, place in zip(self.tokenizer(conversations), places, strict=True):
            fitted = fit(
                tokenized,
                max_length=options.max_length,
                num_image_tokens=options.num_image_tokens,
                over_length=options.over_length,
                max_images=options.max_images,
            )
            if fitted is not None:
                kept.append(fitted)
            if fitted is not tokenized:
                reason = "cut" if fitted is not None else "over_length"
                problem = (
                    f"{tokenized.num_tokens(options.num_image_tokens)} tokens, {len(tokenized.images)} "
                    f"images (a pack holds {options.max_length} and {options.max_images})"
                )
                note = {"id": tokenized.id, "where": place, "reason": reason, "problem": problem}
                left_out.append(note)
        tokens = options.num_image_tokens
        rows = [(item.num_tokens(tokens), item.num_labels, len(item.images)) for item in kept]
        counts = np.array(rows, dtype=np.int32).reshape(-1, 3)
        return Chunk(len(records), _record_batch(kept), counts, left_out, bad)

    def _check_images(self, images: Sequence[str]) -> dict[str, DataError]:
        """Return what is wrong by image of a record; under ``""``, with all of them."""
        if not images:
            return {}
        root = self.entry.image_root
        if root is None and not all(image.startswith(DATA_URL) for image in images):
            problem = f"has {len(images)} images, but the dataset has no image_root"
            remedy = "Add image_root to the dataset in the mixture file"
            return {"": DataError(problem, remedy=remedy, reason="no_image_root")}
        errors: dict[str, DataError] = {}
        if self.options.check_images == "none":
            return errors
        for image in dict.fromkeys(images):
            try:
                level, most = self.options.check_images, self.options.max_pixels
                check_image(os.path.join(root or "", image), level=level, max_pixels=most)
            except ImageError as error:
                errors[image] = error
        return errors


def _record_batch(kept: Sequence[TokenizedConversation]) -> pa.RecordBatch:
    columns = (
        [item.id for item in kept],
        [item.input_ids for item in kept],
        [item.label_spans.reshape(-1) for item in kept],
        [list(item.images) for item in kept],
    )
    return pa.RecordBatch.from_arrays(list(map(pa.array, columns, SCHEMA.types)), schema=SCHEMA)


# --- bad records ---


BAD_LIST = "bad.jsonl"
ERRORS_SHOWN = 20


class BadRecords(DataError):
    """The bad records of one dataset, by ``facts`` that are fit for JSON.

    ``problem`` is the only one, or the first of them with their places and where the list of all is;
    ``count`` and ``reasons`` (short key -> how many) their number; ``listing`` the JSON Lines file with all
    of them; ``rest`` the folder of a ``TokenCache`` of the good records, for looking at, not for training, or
    ``None``; ``dataset``, ``record`` and ``remedy`` its name, the only record, and what the user can do.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        self.count, self.reasons = facts["count"], facts["reasons"]
        self.listing = Path(facts["listing"])
        self.rest = None if facts["rest"] is None else Path(facts["rest"])
        reason = next(iter(self.reasons)) if len(self.reasons) == 1 else "bad_records"
        named = {name: facts[name] for name in ("dataset", "record", "remedy")}
        super().__init__(facts["problem"], **named, reason=reason)
        if self.count > 1:  # a list: what to do stands below it, not behind its last line
            self.args = (f"dataset {self.dataset!r}: {self.problem}\n{self.remedy}",)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(BadRecords, **self.facts), ()


class BadList:
    """Counts the bad records of a build and keeps the first of them; the file has all.

    ``files``: what is wrong with annotation files as a whole.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reasons: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []
        self.remedies: dict[str, None] = {}
        self.files: list[DataError] = []

    def add(self, notes: Iterable[dict[str, Any]], listing: TextIO) -> None:
        """Count notes and write them to the list."""
        for note in notes:
            self.count += 1
            self.reasons[note["reason"]] += 1
            if len(self.first) < ERRORS_SHOWN:
                self.first.append(note)
            if note["remedy"] and len(self.remedies) < ERRORS_SHOWN:
                self.remedies[note["remedy"].rstrip(".")] = None
            listing.write(json.dumps(note, ensure_ascii=False) + "\n")

    def error(self, dataset: str, *, read: int, folder: Path, kept: int) -> BadRecords:
        """Return one error for all bad ones of ``read`` records; ``kept`` others will lie in ``folder``."""
        reasons = dict(self.reasons.most_common())
        listing, remedy, record = str(folder / BAD_LIST), ". ".join(self.remedies), None
        if self.count == 1:
            (note,) = self.first
            problem, record = note["problem"], _place(note) or None
        else:
            counted = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
            lines = [
                f"{self.count} of {read} records are bad ({counted}); all of them: {listing}",
                *(
                    f"  {_place(note)}: {note['problem']}".replace("  : ", "  ")
                    for note in self.first
                ),
            ]
            if self.count > len(self.first):
                lines.append(f"  ... and {self.count - len(self.first)} more")
            problem = "\n".join(lines)
            if not self.files:
                remedy += ". Or leave them out: on_bad_sample='skip' counts and lists them"
        return BadRecords(
            problem=problem,
            count=self.count,
            reasons=reasons,
            listing=listing,
            rest=str(folder) if kept else None,
            dataset=dataset,
            record=record,
            remedy=remedy,
        )


def note_of_record(record: str, where: str, errors: Mapping[str, DataError]) -> dict[str, Any]:
    """Return the line of the lists about a bad record of this id (perhaps with its place behind) and place.

    ``errors`` say what is wrong, by image, or under ``""`` with the record itself.
    """
    first = next(iter(errors.values()))
    note: dict[str, Any] = {
        "id": record.removesuffix(f" ({where})"),
        "where": where,
        "reason": first.reason,
        "problem": "; ".join(error.problem for error in errors.values()),
        "remedy": first.remedy,
    }
    if isinstance(first, ImageError):
        note["images"] = {image: error.reason for image, error in errors.items()}
    return note


def _place(note: Mapping[str, Any]) -> str:
    """``id (file, line)``, or the place alone where the record has no id."""
    return f"{note['id']} ({note['where']})" if note["id"] != note["where"] else note["where"]


def bad_folder(cache: Path) -> Path:
    """Return where a refused build of this cache is left."""
    return cache.with_name(f"{cache.name}.bad")


def leave_for_inspection(partial: Path, error: BadRecords) -> None:
    """Put a refused build where its error says that it lies."""
    (partial / "error.json").write_text(json.dumps(error.facts), encoding="utf-8")
    folder = error.listing.parent
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def raise_again_if_found_since(asked: float, folder: Path) -> None:
    """Raise the ``BadRecords`` that another process has found since this one ``asked`` (began to wait).

    So the ranks that waited for a build don't find the same ones again, one after the other.
    """
    note = folder / "error.json"
    if note.is_file() and note.stat().st_mtime >= asked:
        raise BadRecords(**json.loads(note.read_text(encoding="utf-8")))
