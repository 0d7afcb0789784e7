# SPDX-License-Identifier: Apache-2.0

"""Records -> rows of a token cache, in this process or, if there are many, in several."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from gmai_xtuner.core.constants import DATA_URL
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import DataError, GMAIError, ImageError
from gmai_xtuner.core.imaging.images import check_image
from gmai_xtuner.core.mixture import DatasetEntry
from gmai_xtuner.core.records import RawRecord, iter_raw
from gmai_xtuner.data.bad_records import note_of_record
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
