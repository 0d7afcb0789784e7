# SPDX-License-Identifier: Apache-2.0

"""Store -> corpus folder; the new corpus takes the place of the old one, whole, whenever the run is killed.

Everything streams into ``.work/corpus.new``; its renaming to ``.work/corpus.ready`` is the moment from which
the new corpus holds. Then its files are moved to where they belong. ``mixture.yaml`` and
``held_out.yaml``, by which a training finds the corpus, are taken away before the first file is moved and
put back after the last. So a kill leaves

- before that moment: the old corpus, untouched;
- after it: the new corpus, or, for the milliseconds in between, a folder that no training can start on and
  that `recover` completes from ``corpus.ready``, which every run calls first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import licences
from data_tools.items import TEXT_FORMS
from data_tools.job import Job
from data_tools.output import card, files, manifest, report, review
from data_tools.output.splits import Split, SplitBuilder, hashes
from data_tools.output.summary import Tally
from data_tools.store import Store, StoredConversation
from gmai_xtuner.core.files import directory_to_disk, replace_text, to_disk
from gmai_xtuner.core.hamming import close_pairs


def build(store: Store, job: Job, folder: Path) -> dict[str, Any]:
    """Make the corpus folder of what the store holds; an older corpus in it is replaced as a whole.

    ``folder`` has the images already. Returns the values of ``summary.json``, see `summary`. A `CorpusError`
    if a text isn't valid Unicode, or a stored image is missing.
    """
    options = job.corpus
    refusal = cache(lambda licence: licences.refusal(licence, options))
    tally, errors = Tally(), review.ErrorRate(folder)
    accepted, rejected = report.Chosen(), report.Chosen()

    def allowed(kepts: Iterable[StoredConversation]) -> Iterator[StoredConversation]:
        return (kept for kept in kepts if refusal(kept.record.provenance.licence) is None)

    with replacing(folder) as new:
        with files.CorpusFiles(new) as corpus, manifest.Manifest(new, folder, job) as rows:
            groups = SplitBuilder(options.held_out, seed=job.seed)
            for record in store.records():
                if why := refusal(record.provenance.licence):
                    tally.left_out(record, why)
                else:
                    tally.record(record)
                    groups.add(record.provenance.group, record.image)
                    corpus["records.jsonl"].write(record.to_json())
            first = groups.first_rows()
            kept_records = (r for r in store.records() if refusal(r.provenance.licence) is None)
            images = (folder / record.image for record in compress(kept_records, first))
            alike = None if options.near_duplicates is None else _alike(job, images, first)
            split = groups.split(alike or ())
            tally.held_out(groups.held_out(split))
            for kept, held_out in _sides(allowed(store.accepted()), split, tally):
                line = corpus.write(kept, held_out=held_out)
                rows.add(kept, line, held_out=held_out, verdict=errors.add(kept))
                tally.conversation(kept, held_out=held_out)
                accepted.add(kept, (kept.record.provenance.source, kept.item.form))
                if options.prompts and kept.prompt:
                    asked = {"id": kept.item.id, "prompt": kept.prompt, "answer": kept.answer}
                    corpus["prompts.jsonl"].write(asked)
            for kept in allowed(store.rejected()):
                corpus["rejected.jsonl"].write(files.rejected_line(kept))
                tally.rejected(kept)
                rejected.add(kept, (kept.record.provenance.source, files.reason(kept)))
            for source, drop in store.drops():
                corpus["dropped.jsonl"].write({"source": source, **asdict(drop)})
        if options.parquet:
            corpus.write_parquet(folder)
        summary = tally.summary(
            store,
            job,
            split=split,
            pictures=int(first.sum()),
            near_duplicates=None if alike is None else len(alike),
            files=corpus.contents(),
        )
        summary["review"] = errors.summary()
        files.write_mixtures(new, title=job.title, files=corpus.contents())
        card.write(new, summary, job)
        manifest.write_croissant(new, summary, job)
        report.write(
            new,
            summary,
            images=folder,
            accepted=accepted.spread(options.examples),
            rejected=rejected.spread(options.examples),
            job=job.path.name,
        )
        text = json.dumps(summary, ensure_ascii=False, indent=1)
        (new / "summary.json").write_text(f"{text}\n", encoding="utf-8")
    return summary


def _alike(job: Job, images: Iterable[Path], first: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of record numbers whose images are near-identical; each image is decoded once."""
    rows = first.nonzero()[0]
    values = hashes(images, threads=job.workers or os.cpu_count() or 1)
    pairs = close_pairs(values, distance=job.corpus.near_duplicates or 0)
    return [(int(rows[one]), int(rows[other])) for one, other in pairs]


def _sides(
    kepts: Iterable[StoredConversation], split: Split, tally: Tally
) -> Iterator[tuple[StoredConversation, bool]]:
    """Yield each conversation, and whether it is held out.

    Without its image a text is the same for many records: on one side, and once.
    """
    texts: set[bytes] = set()  # some 70 bytes a different text
    group, held_out = None, False
    for kept in kepts:
        if kept.item.form in TEXT_FORMS:
            said = "\0".join(turn.text for turn in kept.conversation or ())
            text = blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if text in texts:
                tally.repeated(kept)
                continue
            texts.add(text)
        if kept.record.provenance.group != group:
            group = kept.record.provenance.group
            held_out = split.held_out(group)
        yield kept, held_out


WORK = ".work"
ENTRIES = ("mixture.yaml", "held_out.yaml")
_PLAN = ".plan.json"
_INSTALLED = "corpus.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder for the new corpus, which takes the old one's place if the block ends well.

    Images and ``.work`` in the corpus folder are left alone.
    """
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    recover(folder)
    new = work / "corpus.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    yield new
    names = sorted(path.name for path in new.iterdir())
    (new / _PLAN).write_text(json.dumps(names), encoding="utf-8")
    to_disk(new)
    os.rename(new, work / "corpus.ready")
    directory_to_disk(work)
    recover(folder)


def recover(folder: Path) -> bool:
    """Put a corpus that was complete when its run was killed where it belongs; True if there was one."""
    work = folder / WORK
    ready = work / "corpus.ready"
    if not (ready / _PLAN).is_file():
        return False
    names = json.loads((ready / _PLAN).read_text(encoding="utf-8"))
    installed = work / _INSTALLED
    old = json.loads(installed.read_text(encoding="utf-8")) if installed.is_file() else []
    for name in ENTRIES:
        if (ready / name).exists() or name not in names:
            (folder / name).unlink(missing_ok=True)
    directory_to_disk(folder)
    for name in sorted(set(old) - set(names)):
        _remove(folder / name)
    replace_text(installed, json.dumps(sorted({*old, *names})))
    for name in sorted(names, key=lambda name: (name in ENTRIES, name)):
        if (ready / name).exists():
            if (folder / name).is_dir() or (ready / name).is_dir():
                _remove(folder / name)
            if name in ENTRIES:
                directory_to_disk(folder)
            os.replace(ready / name, folder / name)
    directory_to_disk(folder)
    replace_text(installed, json.dumps(names))
    (ready / _PLAN).unlink()
    ready.rmdir()
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
