# SPDX-License-Identifier: Apache-2.0

"""``summary.json``: the numbers of a corpus, from the source files to the conversations.

docs/corpus.md explains its keys. ``usage`` and ``versions`` are in no other file than this one and
``report.html``: the rest of the folder is the same, byte for byte, whenever it is made.
"""

from __future__ import annotations

import platform
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np

from data_tools import licences
from data_tools.job import Job
from data_tools.output import templates
from data_tools.output.files import reason
from data_tools.output.splits import Split
from data_tools.records import ANYTHING, Record
from data_tools.store import Store, StoredConversation

FIGURES = {
    "modality": "Modality",
    "source_task": "Original task",
    "department": "Department",
    "clinical_task": "Clinical task",
}
"""Distributions of the records."""
STAGES = ("read", "clean", "record", "write", "check")
REPEATED = "text that is in the corpus already"
NONE = "None"  # how a record without a clinical task is counted
_LIBRARIES = ("gmai-xtuner", "numpy", "msgspec", "pillow", "pyarrow", "matplotlib")
_DISTINCT_LABELS = 20_000  # a source with free text for labels must not fill the memory


class Tally:
    """Counts while the corpus is written: of each source, so many of a name of some kind."""

    def __init__(self) -> None:
        # kind -> (source, name) -> how many
        self._counts: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._sources: dict[str, int] = {}
        self._source_of = array("I")  # of each record

    def left_out(self, record: Record, refusal: str) -> None:
        self._counts["left out"][record.provenance.source, refusal] += 1

    def record(self, record: Record) -> None:
        source = record.provenance.source
        self._counts["licence"][source, record.provenance.licence] += 1
        for kind in FIGURES:
            self._counts[kind][source, getattr(record, kind) or NONE] += 1
        self._source_of.append(self._sources.setdefault(source, len(self._sources)))
        counts, boxed = self._counts, any(label.box for label in record.labels)
        asked = 5 if boxed else 2  # yes or no, choice; also all, where and how many of a region
        counts["not examined"][source, ""] += 0 if record.examined else asked
        counts["unclear"][source, ""] += asked if ANYTHING in record.incomplete else 0
        counts["any"][source, ""] += asked
        counts["several"][source, ""] += boxed or len(record.labels) > 1
        labels = self._labels[source]
        for name in {label.name for label in record.labels}:
            if name in labels or len(labels) < _DISTINCT_LABELS:
                labels[name] += 1

    def held_out(self, rows: np.ndarray) -> None:
        """bool ``[records]``, in the order of `record`: which are held out."""
        counts = np.bincount(np.asarray(self._source_of)[rows])
        for source, count in zip(self._sources, counts.tolist(), strict=False):
            self._counts["records held out"][source, ""] = count

    def conversation(self, kept: StoredConversation, *, held_out: bool) -> None:
        source, item = kept.record.provenance.source, kept.item
        for kind in ("form", "kind", "language"):
            self._counts[kind][source, getattr(item, kind)] += 1
        if held_out:
            self._counts["held out"][source, ""] += 1

    def repeated(self, kept: StoredConversation) -> None:
        """Count a text without an image that is in the corpus already."""
        self._counts["repeated"][kept.record.provenance.source, ""] += 1

    def rejected(self, kept: StoredConversation) -> None:
        self._counts["rejected"][kept.record.provenance.source, reason(kept)] += 1

    def _by(self, kind: str, source: str | None = None) -> dict[str, int]:
        """Return the counts of one source, or of all, by name, largest first."""
        sums: Counter[str] = Counter()
        for (its, name), count in self._counts[kind].items():
            if source in (None, its):
                sums[name] += count
        return _ordered(sums)

    def _total(self, kind: str, source: str | None = None) -> int:
        return sum(self._by(kind, source).values())

    def summary(
        self,
        store: Store,
        job: Job,
        *,
        split: Split,
        pictures: int,
        near_duplicates: int | None,
        files: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        """Return the values of ``summary.json``; docs/corpus.md explains them."""
        # Other settings may hold addresses that are nobody's business.
        model = getattr(job.writer, "model", None)
        kinds = self._by("kind")
        values: dict[str, Any] = {
            "title": job.title,
            "seed": job.seed,
            "writer": {"name": job.writer.name} | ({"model": str(model)} if model else {}),
            "records": {
                "count": self._total("licence"),
                "pictures": pictures,
                "held_out": self._total("records held out"),
                **{kind: self._by(kind) for kind in FIGURES},
            },
            "conversations": {
                **self._accepted_and_rejected(),
                "repeated": self._total("repeated"),
                "form": self._by("form"),
                "kind": {k: n for k, n in kinds.items() if k and not k.isdigit()},
                "turns": {k: n for k, n in kinds.items() if k.isdigit()},
                "language": self._by("language"),
            },
            "sources": self._source_rows(store, job),
            "left_out": {
                source: {"reason": refusal, "records": count}
                for (source, refusal), count in sorted(self._counts["left out"].items())
            },
            "licences": [self._licence_row(name) for name in sorted(self._by("licence"))],
            "files": files,
            "split": {
                "share": job.corpus.held_out,
                "groups": split.groups,
                "linked": split.linked,
                "largest": split.largest,
                "near_duplicates": near_duplicates,
            },
            "usage": asdict(store.usage()),
            "versions": versions(),
        }
        values["warnings"] = warnings(values)
        return values

    def _accepted_and_rejected(self, source: str | None = None) -> dict[str, Any]:
        """Count the conversations of one source, or of all."""
        accepted, rejected = self._total("form", source), self._total("rejected", source)
        tried = accepted + rejected
        return {
            "count": accepted,
            "held_out": self._total("held out", source),
            "rejected": rejected,
            "acceptance": round(accepted / tried, 4) if tried else None,
        }

    def _source_rows(self, store: Store, job: Job) -> dict[str, dict[str, Any]]:
        funnel = defaultdict(list)
        for its, stage, lost, count in store.funnel():
            count -= self._total("repeated", its) if stage == "check" and not lost else 0
            funnel[its].append({"stage": stage, "reason": lost, "count": count})
        asked_for = funnel.keys() | {name for counts in self._counts.values() for name, _ in counts}
        sources = {}
        for source in job.sources:
            name = source.name
            if name not in asked_for:
                continue
            if repeated := self._total("repeated", name):
                funnel[name].append({"stage": "check", "reason": REPEATED, "count": repeated})
            accepted = self._accepted_and_rejected(name)
            labels = _ordered(self._labels.get(name, Counter()))
            said = job.make.negatives if source.negatives is None else source.negatives
            # As `SourceContext.known_in` has it: what the job says, or else what the annotations show.
            known = said or (said is None and not self._total("several", name))
            why = "unclear" if known else "any" if said is not None else "not examined"
            reasons = (
                licences.restriction(source, job.agreements, licence, publish=True)
                for licence in (source.licence, *self._by("licence", name))
            )
            sources[name] = {
                "unasked": max(self._total(why, name), self._total("unclear", name)),
                "dataset": source.dataset or name,
                "licence": source.licence,
                "url": source.url,
                "not_published": "; ".join(filter(None, dict.fromkeys(reasons))),
                "records": self._total("licence", name),
                "held_out": self._total("records held out", name),
                "conversations": accepted["count"],
                "rejected": accepted["rejected"],
                "acceptance": accepted["acceptance"],
                "reasons": self._by("rejected", name),
                "labels": labels,
                "funnel": sorted(funnel[name], key=_funnel_order),
            }
        return sources

    def _licence_row(self, licence: str) -> dict[str, Any]:
        counts = {
            source: count
            for (source, name), count in sorted(self._counts["licence"].items())
            if name == licence
        }
        return {
            "licence": licence,
            "demands": list(licences.read(licence).demands),
            "sources": list(counts),
            "records": sum(counts.values()),
        }


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """Return sentences on what to look at before using the corpus, and what to do."""
    template = templates().get_template("output/warnings.txt.j2")
    return template.render(summary, demands=licences.DEMANDS).splitlines()


def versions() -> dict[str, str]:
    """Return the versions of this tool, Python and the libraries that decide on what is written."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _funnel_order(row: Mapping[str, Any]) -> tuple[int, int, str]:
    return STAGES.index(row["stage"]), -row["count"] if row["reason"] else -(2**63), row["reason"]


def as_text(summary: Mapping[str, Any]) -> str:
    """Return the values of ``summary.json`` as text, at most 100 characters a line but for warnings."""
    template = templates().get_template("output/summary.txt.j2")
    return template.render(summary, figures=FIGURES).rstrip("\n")
