"""Store -> corpus folder. Everything streams; see `publish` for what a kill leaves."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.items import TEXT_FORMS
from data_tools.output import card, figures, licences, mixture, report
from data_tools.output.corpus_files import (
    CorpusFiles,
    reason,
    record_line,
    rejected_line,
)
from data_tools.output.examples import Chosen, example
from data_tools.output.publish import replacing
from data_tools.output.splits import Split, SplitBuilder
from data_tools.output.summary import Tally
from data_tools.records import Record

if TYPE_CHECKING:
    from data_tools.job import Job, OutputOptions
    from data_tools.store import Kept, Store


def build(store: Store, job: Job, folder: Path) -> dict[str, Any]:
    """Make the corpus folder of what the store holds; an older corpus in it is replaced as a whole.

    Args:
        store: records and conversations of a finished job.
        job: its title, seed, sources and section ``corpus``.
        folder: the corpus folder, where the pictures already are.

    Returns:
        The values of ``summary.json``, see `summary`.

    Raises:
        CorpusError: a text isn't valid Unicode, or a stored picture is missing.
    """
    options = job.corpus
    tally = Tally()
    with replacing(folder) as new:
        files = CorpusFiles(new, parquet=options.parquet)
        with files:
            groups = SplitBuilder(options.held_out, seed=job.seed)
            keeps = _Keeps(options)
            for record in store.records():
                if refusal := keeps.refusal(record):
                    tally.left_out(record, refusal)
                    continue
                tally.record(record)
                groups.add(record.provenance.group, record.image)
                files.records.write(record_line(record))
            first = groups.first_rows()
            alike = None
            if options.near_duplicates is not None:
                alike = _alike(store, job, folder, first)
            split = groups.split(alike or ())
            tally.held_out(groups.held_out(split))
            accepted = _write_conversations(store, options, files, split, tally)
            rejected = _write_rejected(store, options, files, tally)
            for source, drop in store.drops():
                files.dropped.write({"source": source, **asdict(drop)})
        contents = files.contents()
        summary = tally.summary(
            store,
            job,
            split=split,
            pictures=int(first.sum()),
            near_duplicates=None if alike is None else len(alike),
            files=contents,
        )
        lines = {name: int(file["lines"]) for name, file in contents.items()}
        mixture.write(new, title=job.title, lines=lines)
        figures.write(new, summary["records"])
        card.write(new, summary, job)
        report.write(
            new,
            summary,
            accepted=[example(kept, folder) for kept in accepted.spread(options.examples)],
            rejected=[example(kept, folder) for kept in rejected.spread(options.examples)],
            job=Path(job.path).name,
        )
        text = json.dumps(summary, ensure_ascii=False, indent=1)
        (new / "summary.json").write_text(f"{text}\n", encoding="utf-8")
    return summary


class _Keeps:
    """Which records the job's rules on licences keep; each licence is looked at once."""

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        self._refusals: dict[str, str | None] = {}

    def refusal(self, record: Record) -> str | None:
        """Why a record is left out, or None."""
        licence = record.provenance.licence
        if licence not in self._refusals:
            self._refusals[licence] = licences.refusal(licence, self._options)
        return self._refusals[licence]


def _alike(store: Store, job: Job, folder: Path, first: Any) -> list[tuple[int, int]]:
    """Pairs of record numbers whose pictures are near-identical; each picture is decoded once."""
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
    store: Store, options: OutputOptions, files: CorpusFiles, split: Split, tally: Tally
) -> Chosen:
    """Write what was accepted; the conversations that the report may show come back."""
    chosen, keeps = Chosen(), _Keeps(options)
    texts: set[int] = set()  # some 70 bytes a different text
    group, held_out = None, False
    for kept in store.accepted():
        provenance = kept.record.provenance
        if keeps.refusal(kept.record):
            continue
        if kept.item.form in TEXT_FORMS:
            # Without its picture a text is the same for many records: on one side, and once.
            text = _fingerprint(kept)
            if text in texts:
                tally.repeated(kept)
                continue
            texts.add(text)
        if provenance.group != group:
            group, held_out = provenance.group, split.held_out(provenance.group)
        files.write(kept, held_out=held_out)
        tally.conversation(kept, held_out=held_out)
        chosen.add(kept, (provenance.source, kept.item.form))
        if options.prompts and kept.prompt:
            files.prompts.write({"id": kept.item.id, "prompt": kept.prompt, "answer": kept.answer})
    return chosen


def _fingerprint(kept: Kept) -> int:
    said = "\0".join(turn.text for turn in kept.conversation or ())
    return int.from_bytes(blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _write_rejected(
    store: Store, options: OutputOptions, files: CorpusFiles, tally: Tally
) -> Chosen:
    """Write what was set aside; the conversations that the report may show come back."""
    chosen, keeps = Chosen(), _Keeps(options)
    for kept in store.rejected():
        if keeps.refusal(kept.record):
            continue
        files.rejected.write(rejected_line(kept))
        tally.rejected(kept)
        chosen.add(kept, (kept.record.provenance.source, reason(kept)))
    return chosen
