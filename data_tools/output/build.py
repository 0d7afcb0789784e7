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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.items import TEXT_FORMS
from data_tools.output import card, files, licences, report, review
from data_tools.output.splits import Split, SplitBuilder
from data_tools.output.summary import Tally
from data_tools.records import Record
from gmai_xtuner.core.files import directory_to_disk, replace_text, to_disk

if TYPE_CHECKING:
    from data_tools.job import Job, OutputOptions
    from data_tools.store import Kept, Store


def build(store: Store, job: Job, folder: Path) -> dict[str, Any]:
    """Make the corpus folder of what the store holds; an older corpus in it is replaced as a whole.

    Args:
        store: records and conversations of a finished job.
        job: its title, seed, sources and section ``corpus``.
        folder: the corpus folder, where the images already are.

    Returns:
        The values of ``summary.json``, see `summary`.

    Raises:
        CorpusError: a text isn't valid Unicode, or a stored image is missing.
    """
    options = job.corpus
    tally = Tally()
    with replacing(folder) as new:
        corpus = files.CorpusFiles(new, parquet=options.parquet)
        with corpus:
            groups = SplitBuilder(options.held_out, seed=job.seed)
            keeps = _Keeps(options)
            for record in store.records():
                if refusal := keeps.refusal(record):
                    tally.left_out(record, refusal)
                    continue
                tally.record(record)
                groups.add(record.provenance.group, record.image)
                corpus.records.write(record.to_json())
            first = groups.first_rows()
            alike = None
            if options.near_duplicates is not None:
                alike = _alike(store, job, folder, first)
            split = groups.split(alike or ())
            tally.held_out(groups.held_out(split))
            errors = review.ErrorRate(folder)
            accepted = _write_conversations(store, options, corpus, split, tally, errors)
            rejected = _write_rejected(store, options, corpus, tally)
            for source, drop in store.drops():
                corpus.dropped.write({"source": source, **asdict(drop)})
        contents = corpus.contents()
        summary = tally.summary(
            store,
            job,
            split=split,
            pictures=int(first.sum()),
            near_duplicates=None if alike is None else len(alike),
            files=contents,
        )
        summary["review"] = errors.summary()
        lines = {name: int(file["lines"]) for name, file in contents.items()}
        files.write_mixtures(new, title=job.title, lines=lines)
        card.write_figures(new, summary["records"])
        card.write(new, summary, job)
        report.write(
            new,
            summary,
            accepted=[report.example(kept, folder) for kept in accepted.spread(options.examples)],
            rejected=[report.example(kept, folder) for kept in rejected.spread(options.examples)],
            job=Path(job.path).name,
        )
        text = json.dumps(summary, ensure_ascii=False, indent=1)
        (new / "summary.json").write_text(f"{text}\n", encoding="utf-8")
    return summary


class _Keeps:
    """Decides which records the job's rules on licences keep; each licence is looked at once."""

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        self._refusals: dict[str, str | None] = {}

    def refusal(self, record: Record) -> str | None:
        """Return why a record is left out, or None."""
        licence = record.provenance.licence
        if licence not in self._refusals:
            self._refusals[licence] = licences.refusal(licence, self._options)
        return self._refusals[licence]


def _alike(store: Store, job: Job, folder: Path, first: Any) -> list[tuple[int, int]]:
    """Return pairs of record numbers whose images are near-identical; each image is decoded once."""
    from data_tools.output import near_duplicates
    from gmai_xtuner.core.hamming import close_pairs

    rows = first.nonzero()[0]
    keeps = _Keeps(job.corpus)
    kept = (record for record in store.records() if keeps.refusal(record) is None)
    paths = (folder / record.image for record in compress(kept, first))
    values = near_duplicates.hashes(paths, threads=job.workers or os.cpu_count() or 1)
    distance = job.corpus.near_duplicates or 0
    return [
        (int(rows[one]), int(rows[other])) for one, other in close_pairs(values, distance=distance)
    ]


def _write_conversations(
    store: Store,
    options: OutputOptions,
    corpus: files.CorpusFiles,
    split: Split,
    tally: Tally,
    errors: review.ErrorRate,
) -> report.Chosen:
    """Write what was accepted, and return the conversations that the report may show."""
    chosen, keeps = report.Chosen(), _Keeps(options)
    texts: set[int] = set()  # some 70 bytes a different text
    group, held_out = None, False
    for kept in store.accepted():
        provenance = kept.record.provenance
        if keeps.refusal(kept.record):
            continue
        if kept.item.form in TEXT_FORMS:
            # Without its image a text is the same for many records: on one side, and once.
            text = _fingerprint(kept)
            if text in texts:
                tally.repeated(kept)
                continue
            texts.add(text)
        if provenance.group != group:
            group, held_out = provenance.group, split.held_out(provenance.group)
        corpus.write(kept, held_out=held_out)
        tally.conversation(kept, held_out=held_out)
        errors.add(kept)
        chosen.add(kept, (provenance.source, kept.item.form))
        if options.prompts and kept.prompt:
            corpus.prompts.write({"id": kept.item.id, "prompt": kept.prompt, "answer": kept.answer})
    return chosen


def _fingerprint(kept: Kept) -> int:
    said = "\0".join(turn.text for turn in kept.conversation or ())
    return int.from_bytes(blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _write_rejected(
    store: Store, options: OutputOptions, corpus: files.CorpusFiles, tally: Tally
) -> report.Chosen:
    """Write what was set aside, and return the conversations that the report may show."""
    chosen, keeps = report.Chosen(), _Keeps(options)
    for kept in store.rejected():
        if keeps.refusal(kept.record):
            continue
        corpus.rejected.write(files.rejected_line(kept))
        tally.rejected(kept)
        chosen.add(kept, (kept.record.provenance.source, files.reason(kept)))
    return chosen


WORK = ".work"
ENTRIES = ("mixture.yaml", "held_out.yaml")
_PLAN = ".plan.json"
_INSTALLED = "corpus.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder for the new corpus, which takes the old one's place if the block ends well.

    Args:
        folder: of the corpus; images and ``.work`` in it are left alone.
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
