"""Tokenised conversations of one dataset on disk, made once and memory-mapped by every process.

A cache is a folder ``<cache_dir>/tokens/<dataset>-<key>/``::

    tokens.arrow    Arrow IPC file: id, input_ids, label_spans (flat pairs), images
    counts.npy      int32 [conversations, 3]: tokens (image tokens counted), supervised tokens, images
    meta.json       what the key was made of, and how many records were read, kept, cut and skipped
    skipped.jsonl   each record that was left out or cut: id, where, reason, problem; of a bad one also the
                    remedy, and its bad images

The key covers everything that the content depends on: the annotation files' bytes, the tokenizer, the
template, the options, the image root. A folder is staged and renamed, so it is whole or absent.

Where no record is bad, ``on_bad_sample`` changes nothing, and both policies share one cache. With bad
records ``skip`` has a cache of its own, and ``raise`` none: all of them are reported in one error, and what
was made, the list of them and the rest of the dataset, stays as ``<dataset>-<key>.bad`` until a build
succeeds. Training never opens that folder; :mod:`gmai_xtuner.preflight` plans with it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from mmengine.logging import print_log
from tqdm import tqdm

from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import DataError, GMAIError, ImageError
from gmai_xtuner.core.files import locked, publish, remove_left_behind, replace_text, staging
from gmai_xtuner.core.imaging.images import check_image
from gmai_xtuner.core.mixture import DatasetEntry
from gmai_xtuner.core.records import RawRecord, iter_raw
from gmai_xtuner.data.bad_records import (
    BAD_LIST,
    BadList,
    bad_folder,
    leave_for_inspection,
    note_of_record,
    raise_again_if_found_since,
)
from gmai_xtuner.data.tokenization import ConversationTokenizer, TokenizedConversation, fit

FORMAT_VERSION = 2
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
class _Chunk:
    """Rows of some records, and notes on records that are cut, too long or bad."""

    batch: pa.RecordBatch | None
    counts: np.ndarray
    left_out: list[dict[str, Any]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)


class TokenCache:
    """A cache folder, opened for reading. Memory-mapped: opening costs nothing, processes share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.counts: np.ndarray = np.load(folder / "counts.npy", mmap_mode="r")
        self._batches: list[pa.RecordBatch] | None = None
        self._starts: np.ndarray = np.array(self.meta["batch_starts"], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.counts)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def __getitem__(self, row: int) -> TokenizedConversation:
        """Return conversation ``row``; ``IndexError`` beyond the end."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.folder}")
        if self._batches is None:
            reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "tokens.arrow")))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, inner = self._batches[number], row - int(self._starts[number])
        return TokenizedConversation(
            id=batch["id"][inner].as_py(),
            input_ids=batch["input_ids"][inner].values.to_numpy(),
            label_spans=batch["label_spans"][inner].values.to_numpy().reshape(-1, 2),
            images=tuple(batch["images"][inner].as_py()),
            turn_ends=(),
        )


def open_cache(
    entry: DatasetEntry,
    tokenizer: ConversationTokenizer,
    options: CacheOptions,
    *,
    cache_dir: str | Path,
    num_workers: int | None = None,
) -> TokenCache:
    """Open the cache of a dataset; build it first if it is not there.

    Args:
        entry: the dataset.
        tokenizer: batched tokenizer.
        options: see :class:`CacheOptions`.
        cache_dir: folder for all caches. Several processes may ask at once; one builds, under a file
            lock, the others wait (outside of any collective, so that no NCCL time-out runs).
        num_workers: processes that tokenise; default: the cores that this process may use.

    Raises:
        BadRecords: all bad records, with ``on_bad_sample="raise"``.
        DataError: an annotation file that can't be read, or a dataset without a usable record.
    """
    ingredients = {
        "format": FORMAT_VERSION,
        "annotations": [file_sha256(path, cache_dir) for path in entry.annotations],
        "image_root": str(entry.image_root.resolve()) if entry.image_root else None,
        "tokenizer": tokenizer.fingerprint,
        "options": asdict(replace(options, on_bad_sample="raise")),
    }
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", entry.name)[:80]
    folder = Path(cache_dir).absolute() / "tokens" / f"{slug}-{_key(ingredients)}"
    places = [folder]
    if options.on_bad_sample == "skip":
        # Its own first: a run that is resumed keeps its data, even if a record was mended meanwhile.
        ingredients["options"] = asdict(options)
        places.insert(0, folder.with_name(f"{slug}-{_key(ingredients)}"))
    if (found := _first_folder(places)) is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        asked = time.time()
        with locked(Path(f"{folder}.lock"), f"tokenise {entry.name}"):
            if (found := _first_folder(places)) is None:
                if options.on_bad_sample == "raise":
                    raise_again_if_found_since(asked, bad_folder(folder))
                job = _Job(entry, tokenizer, options)
                found = _build(job, places, ingredients, num_workers)
    return TokenCache(found)


def _key(ingredients: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]


def _first_folder(places: Sequence[Path]) -> Path | None:
    return next((place for place in places if place.is_dir()), None)


def open_caches(
    entries: Sequence[tuple[DatasetEntry, CacheOptions]],
    tokenizer: ConversationTokenizer,
    *,
    cache_dir: str | Path,
    num_workers: int | None = None,
) -> list[TokenCache]:
    """Open the caches of several datasets; report what is wrong with any of them in one error.

    Args:
        entries: datasets with their options.
        tokenizer: see :func:`open_cache`; so are the rest.

    Raises:
        DataError: as :func:`open_cache`; of several datasets, one after the other in one message.
    """
    caches, errors = [], []
    for entry, options in entries:
        try:
            caches.append(
                open_cache(entry, tokenizer, options, cache_dir=cache_dir, num_workers=num_workers)
            )
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        names = ", ".join(str(error.dataset) for error in errors)
        details = "\n\n".join(str(error) for error in errors)
        raise DataError(
            f"{len(errors)} of {len(entries)} datasets can't be used ({names})\n\n{details}",
            reason="bad_records",
        )
    return caches


def file_sha256(path: Path, cache_dir: str | Path) -> str:
    """Return the SHA-256 of a file, remembered under its size and modification time.

    Reading a corpus of many gigabytes at every start would cost minutes; a file whose path, size and
    nanosecond time are unchanged is not read again.
    """
    stat = path.stat()
    name = hashlib.sha256(
        f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}".encode()
    ).hexdigest()
    note = Path(cache_dir) / "hashes" / name
    note.parent.mkdir(parents=True, exist_ok=True)
    if not note.is_file():
        with locked(note.with_suffix(".lock"), f"read {path.name}"):
            if not note.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                replace_text(note, digest)
    return note.read_text()


def _build(
    job: _Job, places: Sequence[Path], ingredients: dict[str, Any], num_workers: int | None
) -> Path:
    """Build a cache and return its folder.

    Args:
        job: what is done with the records.
        places: where it goes: first if records are bad and left out, last if none is bad.
        ingredients: for ``meta.json``.
        num_workers: see :func:`open_cache`.
    """
    entry, raises = job.entry, job.options.on_bad_sample == "raise"
    clean = places[-1]
    partial = staging(clean)
    remove_left_behind(clean)
    partial.mkdir()
    bad = BadList()
    reasons: Counter[str] = Counter()
    counts: list[np.ndarray] = []
    batch_starts: list[int] = []
    kept = read = 0
    try:
        with (
            pa.OSFile(str(partial / "tokens.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
            (partial / "skipped.jsonl").open("w", encoding="utf-8") as skipped,
            (partial / BAD_LIST).open("w", encoding="utf-8") as listing,
            tqdm(desc=f"Tokenising {entry.name}", unit=" records", mininterval=1.0) as progress,
        ):
            for size, chunk in _chunks(job, num_workers, bad.files):
                read += size
                bad.add(chunk.bad, listing)
                for note in (*chunk.left_out, *chunk.bad):
                    reasons[note["reason"]] += 1
                    skipped.write(json.dumps(note, ensure_ascii=False) + "\n")
                if chunk.batch is not None and chunk.batch.num_rows:
                    batch_starts.append(kept)
                    writer.write_batch(chunk.batch)
                    counts.append(chunk.counts)
                    kept += chunk.batch.num_rows
                progress.update(size)
            # No policy leaves out a part of a file of which nobody knows how large it is.
            bad.add([note_of_record("", "", {"": error}) for error in bad.files], listing)
        refused = bool(bad.files) or (raises and bad.count > 0)
        if not refused and not kept:
            raise DataError(
                f"none of its {read} records can be used ({dict(reasons) or 'it is empty'})",
                dataset=entry.name,
                remedy=f"Look at {', '.join(str(path) for path in entry.annotations)}",
                reason="empty_dataset",
            )
        table = np.concatenate(counts or [np.zeros((0, 3))]).astype(np.int32)
        np.save(partial / "counts.npy", table)
        notes = (partial / "skipped.jsonl").read_bytes()
        meta: dict[str, Any] = {
            "dataset": entry.name,
            "ingredients": ingredients,
            "records": read,
            "kept": kept,
            "cut": reasons.pop("cut", 0),
            "skipped": dict(sorted(reasons.items())),
            "batch_starts": batch_starts,
            # What came out, for plans: the same key may give other rows once images are mended.
            "content": hashlib.sha256(table.tobytes() + notes).hexdigest(),
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if refused:
            error = bad.error(entry.name, read=read, folder=bad_folder(clean), kept=kept)
            leave_for_inspection(partial, error)
            raise error
        (partial / BAD_LIST).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    folder = places[0] if bad.count else clean
    publish(partial, folder)
    shutil.rmtree(bad_folder(clean), ignore_errors=True)
    left_out = ", ".join(f"{number} {reason}" for reason, number in meta["skipped"].items())
    print_log(
        f"Tokenised {entry.name}: {kept} of {read} records kept, {meta['cut']} cut between turns, "
        f"left out: {left_out or 'none'} ({folder})"
        # Images are not part of the key: the cache would not see that they have been mended.
        + (f"; after mending images, remove {folder}" if bad.count else ""),
        logger="current",
        level=logging.INFO,
    )
    return folder


def _chunks(
    job: _Job, num_workers: int | None, broken_files: list[DataError]
) -> Iterator[tuple[int, _Chunk]]:
    """Yield records in chunks, in order, tokenised in this process or, if there are many, in several.

    What is wrong with a file as a whole goes to ``broken_files``; the next file is read all the same.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    raw = _raw_records(job.entry, broken_files)
    chunks = iter(lambda: list(islice(raw, RECORDS_A_CHUNK)), [])
    head = list(islice(chunks, 4))
    if num_workers < 2 or len(head) < 4:
        for chunk in chain(head, chunks):
            yield len(chunk), job(chunk)
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
        waiting: list[tuple[int, Future[_Chunk]]] = []
        for chunk in chain(head, chunks):
            waiting.append((len(chunk), pool.submit(_do_job, chunk)))
            if len(waiting) >= 4 * num_workers:
                size, future = waiting.pop(0)
                yield size, future.result()
        for size, future in waiting:
            yield size, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _raw_records(entry: DatasetEntry, broken_files: list[DataError]) -> Iterator[RawRecord]:
    for path in entry.annotations:
        try:
            yield from iter_raw(path, dataset=entry.name)
        except DataError as error:
            broken_files.append(error)


_job_of_worker: _Job | None = None


def _take_job(job: _Job) -> None:
    global _job_of_worker
    _job_of_worker = job
    # What was inherited stays until the end; looking through all of torch's objects for garbage again and
    # again would also copy their pages.
    gc.freeze()
    # The tokenizer's threads did not survive the fork, and importing xtuner sets this to "true", by
    # which tokenizers does not look whether they did: a worker would wait for them forever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do_job(records: Sequence[RawRecord]) -> _Chunk:
    assert _job_of_worker is not None
    return _job_of_worker(records)


@dataclass(slots=True)
class _Job:
    """Parse, check, tokenise and fit some records. Runs in a worker."""

    entry: DatasetEntry
    tokenizer: ConversationTokenizer
    options: CacheOptions

    def __call__(self, records: Sequence[RawRecord]) -> _Chunk:
        left_out: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        conversations, places = [], []
        for record in records:
            try:
                conversation = parse_raw(record, dataset=self.entry.name)
            except DataError as error:
                name = error.record or record.default_id
                bad.append(note_of_record(name, record.where, {"": error}))
                continue
            if errors := self._check_images(conversation.images):
                bad.append(note_of_record(conversation.id, record.where, errors))
            else:
                conversations.append(conversation)
                places.append(record.where)
        kept = []
        for tokenized, place in zip(self.tokenizer(conversations), places, strict=True):
            fitted = self._fit(tokenized, place, left_out)
            if fitted is not None:
                kept.append(fitted)
        return _Chunk(_record_batch(kept), self._counts(kept), left_out, bad)

    def _fit(
        self, tokenized: TokenizedConversation, place: str, left_out: list[dict[str, Any]]
    ) -> TokenizedConversation | None:
        options = self.options
        fitted = fit(
            tokenized,
            max_length=options.max_length,
            num_image_tokens=options.num_image_tokens,
            over_length=options.over_length,
            max_images=options.max_images,
        )
        problem = (
            f"{tokenized.num_tokens(options.num_image_tokens)} tokens, {len(tokenized.images)} images"
            f" (a pack holds {options.max_length} and {options.max_images})"
        )
        if fitted is not tokenized:
            reason = "cut" if fitted is not None else "over_length"
            note = {"id": tokenized.id, "where": place, "reason": reason, "problem": problem}
            left_out.append(note)
        return fitted

    def _check_images(self, images: Sequence[str]) -> dict[str, DataError]:
        """Return what is wrong by image of a record; under ``""``, with all of them."""
        if not images:
            return {}
        root = self.entry.image_root
        if root is None:
            problem = f"has {len(images)} images, but the dataset has no image_root"
            remedy = "Add image_root to the dataset in the mixture file"
            return {"": DataError(problem, remedy=remedy, reason="no_image_root")}
        errors: dict[str, DataError] = {}
        if self.options.check_images == "none":
            return errors
        for image in dict.fromkeys(images):
            try:
                check_image(
                    root / image,
                    level=self.options.check_images,
                    max_pixels=self.options.max_pixels,
                )
            except ImageError as error:
                errors[image] = error
        return errors

    def _counts(self, kept: Sequence[TokenizedConversation]) -> np.ndarray:
        tokens = self.options.num_image_tokens
        rows = [(item.num_tokens(tokens), item.num_labels, len(item.images)) for item in kept]
        return np.array(rows, dtype=np.int32).reshape(-1, 3)


def _record_batch(kept: Sequence[TokenizedConversation]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            pa.array([item.id for item in kept], pa.string()),
            pa.array([item.input_ids for item in kept], pa.list_(pa.int32())),
            pa.array([item.label_spans.reshape(-1) for item in kept], pa.list_(pa.int32())),
            pa.array([list(item.images) for item in kept], pa.list_(pa.string())),
        ],
        schema=SCHEMA,
    )
