# SPDX-License-Identifier: Apache-2.0

"""``summary.json``: the numbers of a corpus, from the source files to the conversations.

========================  ==========================================================================
key                       what it holds
========================  ==========================================================================
``title``, ``seed``       of the job
``writer``                ``name``; ``model`` if there is one
``records``               ``count``, ``pictures`` (distinct), ``held_out``, and the number of records by
                          ``modality``, ``source_task``, ``department``, ``clinical_task``
``conversations``         ``count``, ``held_out``, ``rejected``, ``acceptance`` (accepted by accepted and
                          rejected; null without either), ``repeated`` (texts without an image that were
                          there already), and the number by ``form``, ``kind`` (of perception),
                          ``turns`` (questions asked of dialogues), ``language``
``sources``               source of this run -> ``dataset``, ``licence``, ``url``, ``records``, ``held_out``,
                          ``conversations``, ``rejected``, ``acceptance``, ``reasons`` (of rejection ->
                          count), ``labels`` (the commonest: name -> records), ``funnel``
``sources.*.funnel``      rows of ``stage``, ``reason``, ``count``; reason ``""`` is what came through
``left_out``              source -> ``reason``, ``records``: not in the corpus because of its licence
``licences``              rows of ``licence``, ``demands``, ``sources``, ``records``
``files``                 file -> ``lines``, ``bytes``, ``sha256``
``split``                 ``share`` asked for, ``groups``, ``linked`` and ``largest`` (see `splits.Split`),
                          ``near_duplicates`` (pairs; null if they weren't looked for)
``usage``                 ``requests``, ``cached``, ``prompt_tokens``, ``completion_tokens``, ``dollars``,
                          ``seconds``
``versions``              of this tool, Python and the libraries that decide on what is written
``review``                ``judged``, ``wrong``, ``unclear``, ``outdated``, ``error_rate``, ``low``, ``high``,
                          see `review.ErrorRate`; null before anybody has judged a text
``warnings``              sentences: what someone should look at before using the corpus
========================  ==========================================================================

``usage`` and ``versions`` are in no other file than this one and ``report.html``: the rest of the folder is
the same, byte for byte, whenever it is made.
"""

from __future__ import annotations

import platform
from array import array
from collections import Counter, defaultdict
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.output import licences
from data_tools.output.files import reason
from data_tools.output.splits import Split
from data_tools.records import Record

if TYPE_CHECKING:
    from data_tools.job import Job
    from data_tools.store import Kept, Store

STAGES = ("read", "clean", "record", "write", "check")
REPEATED = "text that is in the corpus already"
PENDING = "pending"  # the store's reason for conversations that a later run writes
NONE = "None"  # how a record without a clinical task is counted
_LIBRARIES = ("gmai-xtuner", "numpy", "msgspec", "pillow", "pyarrow", "matplotlib")
_MOST_LABELS = 20
_DISTINCT_LABELS = 20_000  # a source with free text for labels must not fill the memory
_FEW = 0.5  # acceptance below it is worth a look
_LARGE_SET = 0.1  # share of the groups in one linked set that is worth a look


class Tally:
    """Counts while the corpus is written."""

    def __init__(self) -> None:
        self._records: Counter[tuple[str, ...]] = Counter()
        self._conversations: Counter[tuple[str, str, str, str, bool]] = Counter()
        self._rejected: Counter[tuple[str, str]] = Counter()
        self._labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._licences: Counter[tuple[str, str]] = Counter()
        self._sources: dict[str, int] = {}
        self._source_of = array("I")  # of each record
        self._held_out: Counter[str] = Counter()
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._repeated: Counter[str] = Counter()

    def left_out(self, record: Record, refusal: str) -> None:
        self._left_out[record.provenance.source, refusal] += 1

    def record(self, record: Record) -> None:
        source = record.provenance.source
        self._records[
            source,
            record.modality,
            record.source_task,
            record.department,
            record.clinical_task or NONE,
        ] += 1
        self._source_of.append(self._sources.setdefault(source, len(self._sources)))
        self._licences[record.provenance.licence, source] += 1
        labels = self._labels[source]
        for name in {label.name for label in record.labels}:
            if name in labels or len(labels) < _DISTINCT_LABELS:
                labels[name] += 1

    def held_out(self, rows: np.ndarray) -> None:
        """bool ``[records]``, in the order of `record`: which are held out."""
        counts = np.bincount(np.frombuffer(self._source_of, dtype=np.uint32)[rows])
        for source, count in zip(self._sources, counts.tolist(), strict=False):
            self._held_out[source] = count

    def conversation(self, kept: Kept, *, held_out: bool) -> None:
        item = kept.item
        key = (kept.record.provenance.source, item.form, item.kind, item.language, held_out)
        self._conversations[key] += 1

    def repeated(self, kept: Kept) -> None:
        """Count a text without an image that is in the corpus already."""
        self._repeated[kept.record.provenance.source] += 1

    def rejected(self, kept: Kept) -> None:
        self._rejected[kept.record.provenance.source, reason(kept)] += 1

    def summary(
        self,
        store: Store,
        job: Job,
        *,
        split: Split,
        pictures: int,
        near_duplicates: int | None,
        files: dict[str, dict[str, int | str]],
    ) -> dict[str, Any]:
        """Return the values of ``summary.json``, see the module."""
        kinds = _by(self._conversations, 2)
        values: dict[str, Any] = {
            "title": job.title,
            "seed": job.seed,
            "writer": _name_and_model(job.writer),
            "records": {
                "count": self._records.total(),
                "pictures": pictures,
                "held_out": self._held_out.total(),
                **{
                    name: _by(self._records, place)
                    for place, name in enumerate(
                        ("modality", "source_task", "department", "clinical_task"), start=1
                    )
                },
            },
            "conversations": {
                **self._accepted_and_rejected(None),
                "repeated": self._repeated.total(),
                "form": _by(self._conversations, 1),
                "kind": {k: n for k, n in kinds.items() if k and not k.isdigit()},
                "turns": {k: n for k, n in kinds.items() if k.isdigit()},
                "language": _by(self._conversations, 3),
            },
            "sources": self._source_rows(store, job),
            "left_out": {
                source: {"reason": refusal, "records": count}
                for (source, refusal), count in sorted(self._left_out.items())
            },
            "licences": self._licence_rows(),
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

    def _accepted_and_rejected(self, source: str | None) -> dict[str, Any]:
        """Count the conversations of one source, or of all."""
        accepted = held_out = 0
        for (name, _, _, _, is_held_out), count in self._conversations.items():
            if source in (None, name):
                accepted += count
                held_out += count * is_held_out
        rejected = sum(n for (name, _), n in self._rejected.items() if source in (None, name))
        tried = accepted + rejected
        return {
            "count": accepted,
            "held_out": held_out,
            "rejected": rejected,
            "acceptance": round(accepted / tried, 4) if tried else None,
        }

    def _source_rows(self, store: Store, job: Job) -> dict[str, dict[str, Any]]:
        funnel = defaultdict(list)
        for row in store.funnel():
            count = row.count
            if row.stage == "check" and not row.reason:
                count -= self._repeated[row.source]
            funnel[row.source].append({"stage": row.stage, "reason": row.reason, "count": count})
        for name, count in self._repeated.items():
            funnel[name].append({"stage": "check", "reason": REPEATED, "count": count})
        by_source = _by(self._records, 0)
        sources = {}
        left_out = {name for name, _ in self._left_out}
        for source in job.sources:
            if source.name not in funnel.keys() | by_source.keys() | left_out:
                continue  # not asked for in this run
            accepted = self._accepted_and_rejected(source.name)
            reasons = Counter(
                {r: n for (name, r), n in self._rejected.items() if name == source.name}
            )
            sources[source.name] = {
                "dataset": source.dataset or source.name,
                "licence": source.licence,
                "url": source.url,
                "records": by_source.get(source.name, 0),
                "held_out": self._held_out[source.name],
                "conversations": accepted["count"],
                "rejected": accepted["rejected"],
                "acceptance": accepted["acceptance"],
                "reasons": _ordered(reasons),
                "labels": dict(
                    list(_ordered(self._labels.get(source.name, Counter())).items())[:_MOST_LABELS]
                ),
                "funnel": sorted(funnel[source.name], key=_funnel_order),
            }
        return sources

    def _licence_rows(self) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for (name, source), count in sorted(self._licences.items()):
            row = rows.setdefault(
                name,
                {
                    "licence": name,
                    "demands": list(licences.read(name).demands),
                    "sources": [],
                    "records": 0,
                },
            )
            row["sources"].append(source)
            row["records"] += count
        return list(rows.values())


def warnings(summary: dict[str, Any]) -> list[str]:
    """Return sentences on what to look at before using the corpus, and what to do."""
    found = []
    conversations, records, split = summary["conversations"], summary["records"], summary["split"]
    if not conversations["count"]:
        found.append(
            "No conversation was accepted, so there is no mixture.yaml. The funnel of each source says where "
            "they were lost."
        )
    elif conversations["held_out"] == conversations["count"]:
        found.append(
            f"Every conversation is held out: the {split['groups']} group(s) of patients, cases or pictures "
            "are too few for a split or hang together, so there is no mixture.yaml. Set corpus.held_out: 0 "
            "or give the sources a finer group."
        )
    elif split["share"] and not records["held_out"]:
        found.append(
            f"Nothing is held out: none of the {split['groups']} group(s) fell into the share of "
            f"{split['share']:g}. Raise corpus.held_out, or hold out a source of its own."
        )
    if split["largest"] > 10 and split["largest"] > _LARGE_SET * split["groups"]:
        found.append(
            f"{split['largest']:,} of {split['groups']:,} groups hang together by shared or near-identical "
            "pictures and are all on one side. Look for a picture that stands in for a missing one, or "
            "lower corpus.near_duplicates."
        )
    shared = records["count"] - records["pictures"]
    if shared:
        found.append(
            f"{shared:,} record(s) show the same picture as another record, with other labels or "
            "attributes (a file that lies in two class folders, say). Their answers may contradict each "
            "other: look at them."
        )
    pending = sum(
        row["count"]
        for source in summary["sources"].values()
        for row in source["funnel"]
        if row["reason"] == PENDING
    )
    if pending:
        found.append(
            f"{pending:,} conversations are still to be written. Run the command again to go on."
        )
    for name, source in summary["sources"].items():
        if not source["records"] and name not in summary["left_out"]:
            found.append(f"Source {name} gave no record. Its funnel says why.")
        if source["acceptance"] is not None and source["acceptance"] < _FEW:
            commonest = next(iter(source["reasons"]))
            found.append(
                f"Source {name}: {source['acceptance']:.0%} of the answers were accepted; the commonest "
                f"reason of rejection is: {commonest}."
            )
    for row in summary["licences"]:
        asks = [demand for demand in row["demands"] if demand != "attribution"]
        if asks:
            found.append(
                f"Licence {row['licence']} ({', '.join(row['sources'])}): "
                f"{'; '.join(licences.DEMANDS[demand] for demand in asks)}."
            )
    return found


def versions() -> dict[str, str]:
    """Return the versions of this tool, Python and the libraries that decide on what is written."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _name_and_model(options: Any) -> dict[str, str]:
    """Return name and model alone: the other settings may hold addresses that are nobody's business."""
    model = getattr(options, "model", None)
    return {"name": options.name, **({"model": str(model)} if model else {})}


def _by(counts: Counter[Any], place: int) -> dict[str, int]:
    """Sum up over all but one place of the keys, largest first."""
    sums: Counter[str] = Counter()
    for key, count in counts.items():
        sums[key[place]] += count
    return _ordered(sums)


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _funnel_order(row: dict[str, Any]) -> tuple[int, int, str]:
    stage = STAGES.index(row["stage"]) if row["stage"] in STAGES else len(STAGES)
    return (stage, -row["count"] if row["reason"] else -(2**63), row["reason"])


_WIDTH = 100
_NAME = 34
_BAR = 30


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the values of ``summary.json`` as text, at most 100 characters a line but for warnings."""
    records, conversations, usage = summary["records"], summary["conversations"], summary["usage"]
    found = [
        _printable(summary["title"]),
        f"  {records['count']:,} records of {records['pictures']:,} pictures, "
        f"{records['held_out']:,} records held out",
        f"  {conversations['count']:,} conversations, {conversations['held_out']:,} held out; "
        f"{conversations['rejected']:,} rejected ({_percent(conversations['acceptance'])} accepted)",
        "  " + writer(summary),
        f"  {usage['requests']:,} requests, {usage['cached']:,} answered from the cache, "
        f"${usage['dollars']:,.2f}, {duration(usage['seconds'])}",
        "",
        f"{'source':<{_NAME}}{'records':>10}{'conversations':>15}{'rejected':>10}{'accepted':>10}",
    ]
    for name, source in summary["sources"].items():
        found.append(
            f"{_cut(name):<{_NAME}}{source['records']:>10,}{source['conversations']:>15,}"
            f"{source['rejected']:>10,}{_percent(source['acceptance']):>10}"
        )
        found += [
            f"  {_cut(row['stage'] + ': ' + row['reason'], 62):<62}{row['count']:>12,}"
            for row in source["funnel"]
            if row["reason"]
        ]
        if name in summary["left_out"]:
            found.append(f"  left out: {_printable(summary['left_out'][name]['reason'])}")
    for title, counts in (
        ("form", conversations["form"]),
        ("language", conversations["language"]),
        ("modality", records["modality"]),
        ("original task", records["source_task"]),
        ("department", records["department"]),
        ("clinical task", records["clinical_task"]),
    ):
        found += ["", title, *_bars(counts)]
    if summary["warnings"]:
        found += ["", "to look at", *(f"  - {_printable(text)}" for text in summary["warnings"])]
    return found


def writer(summary: dict[str, Any]) -> str:
    """Return who wrote the conversations, such as ``"written by openai (some-model)"``."""
    model = summary["writer"].get("model")
    return f"written by {summary['writer']['name']}" + (f" ({_printable(model)})" if model else "")


def duration(seconds: float) -> str:
    """Return ``"3 s"``, ``"4 min 10 s"``, ``"2 h 5 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bars(counts: dict[str, int]) -> list[str]:
    total, largest = sum(counts.values()), max(counts.values(), default=1)
    return [
        f"  {_cut(name):<{_NAME}}{count:>10,}{count / total:>8.1%}  {'#' * round(_BAR * count / largest)}"
        for name, count in counts.items()
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _cut(text: str, width: int = _NAME - 2) -> str:
    text = _printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _printable(text: str) -> str:
    """Return the text without control characters, which could move the terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)
