# SPDX-License-Identifier: Apache-2.0

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

import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from gmai_xtuner.core.archives import open_archives
from gmai_xtuner.core.errors import DataError
from gmai_xtuner.core.files import (
    delete,
    keep_first,
    locked,
    remove_left_behind,
    replace_text,
    staging,
)
from gmai_xtuner.core.mixture import DatasetEntry
from gmai_xtuner.data.log import info, warn
from gmai_xtuner.data.tokenization import ConversationTokenizer, TokenizedConversation
from gmai_xtuner.data.tokenize_records import (
    BAD_LIST,
    SCHEMA,
    BadList,
    CacheOptions,
    TokenizeJob,
    bad_folder,
    leave_for_inspection,
    note_of_record,
    raise_again_if_found_since,
    tokenized_chunks,
)

FORMAT_VERSION = 3
"""Raised when the same records would give other rows; 3: keys such as ``image_path`` are asked about."""


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

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Path]]:
        return TokenCache, (self.folder,)

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


OpenCache = Callable[[DatasetEntry], TokenCache]
"""Opens the cache of a dataset, see :func:`open_cache`."""


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
    archives = open_archives(entry.image_root) if entry.image_root else None
    ingredients = {
        "format": FORMAT_VERSION,
        "annotations": [file_sha256(path, cache_dir) for path in entry.annotations],
        "image_root": str(entry.image_root.resolve()) if entry.image_root else None,
        **({"images": archives.identity} if archives else {}),
        "tokenizer": tokenizer.fingerprint,
        "options": asdict(replace(options, on_bad_sample="raise")),
        # Not named where it is the default: caches from before there was a choice stay.
        **({"image_marks": entry.image_marks} if entry.images_first else {}),
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
            if (found := _first_folder(places, remove_cut_off=True)) is None:
                if options.on_bad_sample == "raise":
                    raise_again_if_found_since(asked, bad_folder(folder))
                job = TokenizeJob(entry, tokenizer, options)
                found = _build(job, places, ingredients, num_workers)
    return TokenCache(found)


def _key(ingredients: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]


def _first_folder(places: Sequence[Path], *, remove_cut_off: bool = False) -> Path | None:
    """Return the first cache that is there, if it is whole; what is cut off may go, to be built anew."""
    for place in places:
        if not place.is_dir():
            continue
        if (problem := what_is_cut_off(place)) is None:
            return place
        if not remove_cut_off:
            return None
        warn(f"{problem}. The cache is built anew")
        delete(place)
    return None


def what_is_cut_off(folder: Path) -> str | None:
    """Return which file of a cache is not whole, and how; ``None`` if all are. Reads no rows."""
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        file = folder / "counts.npy"
        rows = len(np.load(file, mmap_mode="r"))
        file = folder / "tokens.arrow"
        with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
            batches = reader.num_record_batches
    except (OSError, ValueError, EOFError) as error:
        return f"{file} is cut off or damaged ({error})"
    if (rows, batches) != (meta.get("kept"), len(meta.get("batch_starts", ()))):
        return f"{folder} has {rows} rows in {batches} batches, not what its meta.json says"
    return None


def open_caches(entries: Sequence[DatasetEntry], opened: OpenCache) -> list[TokenCache]:
    """Open the caches of several datasets; report what is wrong with any of them in one error.

    Raises:
        DataError: as :func:`open_cache`; of several datasets, one after the other in one message.
    """
    caches, errors = [], []
    for entry in entries:
        try:
            caches.append(opened(entry))
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        names = ", ".join(str(error.dataset) for error in errors)
        details = "\n\n".join(map(str, errors))
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
    what = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}"
    note = Path(cache_dir) / "hashes" / hashlib.sha256(what.encode()).hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)

    def known() -> str:
        return note.read_text() if note.is_file() else ""

    if len(known()) != 64:
        with locked(note.with_suffix(".lock"), f"read {path.name}"):
            if len(known()) != 64:
                with path.open("rb") as file:
                    replace_text(note, hashlib.file_digest(file, "sha256").hexdigest())
    return known()


def _build(
    job: TokenizeJob, places: Sequence[Path], ingredients: dict[str, Any], num_workers: int | None
) -> Path:
    """Build a cache in the first of ``places`` if bad records are left out, in the last if there are none."""
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
            for chunk in tokenized_chunks(job, num_workers, bad.files):
                read += chunk.read
                bad.add(chunk.bad, listing)
                for note in (*chunk.left_out, *chunk.bad):
                    reasons[note["reason"]] += 1
                    skipped.write(json.dumps(note, ensure_ascii=False) + "\n")
                if chunk.batch.num_rows:
                    batch_starts.append(kept)
                    writer.write_batch(chunk.batch)
                    counts.append(chunk.counts)
                    kept += chunk.batch.num_rows
                progress.update(chunk.read)
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
    keep_first(partial, folder)
    shutil.rmtree(bad_folder(clean), ignore_errors=True)
    left_out = ", ".join(f"{number} {reason}" for reason, number in meta["skipped"].items())
    info(
        f"Tokenised {entry.name}: {kept} of {read} records kept, {meta['cut']} cut between turns, "
        f"left out: {left_out or 'none'} ({folder})"
        # Images are not part of the key: the cache would not see that they have been mended.
        + (f"; after mending images, remove {folder}" if bad.count else "")
    )
    return folder
