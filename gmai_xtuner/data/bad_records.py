# SPDX-License-Identifier: Apache-2.0

"""Bad records of a dataset, reported all at once: as an error for people, as a list for tools.

A build that is refused leaves ``<dataset>-<key>.bad/`` beside the caches::

    bad.jsonl       each bad record: id, where, reason, problem, remedy; its bad images, with a reason each
    error.json      the error, for processes that waited for the same build
    ...             a token cache of the good records, for looking at

Memory does not grow with their number: the error shows the first, the list on disk has all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from gmai_xtuner.core.errors import DataError, ImageError

BAD_LIST = "bad.jsonl"
ERRORS_SHOWN = 20


class BadRecords(DataError):
    """The bad records of one dataset.

    Args:
        problem: the only one, or the first of them with their places and where the list of all is.
        count: how many.
        reasons: short key of a reason -> how many.
        listing: JSON Lines file with all of them.
        rest: folder of a ``TokenCache`` of the good records, for looking at, not for training; ``None``
            if there is none.
        dataset, record, remedy: its name, the only record, and what the user can do.
    """

    def __init__(
        self,
        problem: str,
        *,
        count: int,
        reasons: Mapping[str, int],
        listing: str | Path,
        rest: str | Path | None,
        dataset: str,
        record: str | None = None,
        remedy: str | None = None,
    ) -> None:
        reason = next(iter(reasons)) if len(reasons) == 1 else "bad_records"
        super().__init__(problem, dataset=dataset, record=record, remedy=remedy, reason=reason)
        if count > 1:  # a list: what to do stands below it, not behind its last line
            self.args = (f"dataset {dataset!r}: {problem}\n{remedy}",)
        self.count = count
        self.reasons = dict(reasons)
        self.listing = Path(listing)
        self.rest = None if rest is None else Path(rest)

    def fields(self) -> dict[str, Any]:
        """Return the arguments that make it again, fit for JSON."""
        names = ("problem", "count", "reasons", "dataset", "record", "remedy")
        rest = None if self.rest is None else str(self.rest)
        return {**{n: getattr(self, n) for n in names}, "listing": str(self.listing), "rest": rest}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(BadRecords, **self.fields()), ()


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
        listing, rest = folder / BAD_LIST, folder if kept else None
        remedy = ". ".join(self.remedies)
        record = None
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
        place: dict[str, Any] = {"dataset": dataset, "record": record, "remedy": remedy}
        return BadRecords(
            problem, count=self.count, reasons=reasons, listing=listing, rest=rest, **place
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
    (partial / "error.json").write_text(json.dumps(error.fields()), encoding="utf-8")
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
