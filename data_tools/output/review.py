# SPDX-License-Identifier: Apache-2.0

"""A blinded page on which people judge a sample of a corpus, and the error rate that their verdicts give.

The page shows image, questions and answers, in random order: neither source nor annotation nor writer. Only
boxes that a text itself names are drawn. The browser saves the verdicts as a JSON file, which
``generate.py --verdicts`` takes in; from then on card and report state the error rate.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import msgspec

from data_tools.forms.coordinates import SCALE, read_boxes
from data_tools.items import TEXT_FORMS
from data_tools.output import templates
from data_tools.output.report import thumbnail
from data_tools.store import Store, StoredConversation
from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.files import replace_text

VERDICTS = ".work/verdicts.json"
WHAT = ("finding or organ", "side", "place", "number", "modality", "size", "wording", "other")
RANK = ("right", "unclear", "wrong")
"""Verdicts, the one that counts of two on the same text last."""


class Verdict(msgspec.Struct, forbid_unknown_fields=True):
    """One person's verdict on one conversation."""

    key: str
    verdict: str
    what: str = ""
    note: str = ""


class VerdictFile(msgspec.Struct, forbid_unknown_fields=True):
    """What the page saves."""

    reviewer: str
    verdicts: list[Verdict]


def stratum(kept: StoredConversation) -> tuple[str, str, str, str]:
    """Return form, modality, language and source."""
    record = kept.record
    return kept.item.form, record.modality, kept.item.language, record.provenance.source


def key_of(kept: StoredConversation) -> str:
    """Return what a conversation is called on the page; another one once its text changes."""
    texts = [turn.text for turn in kept.conversation or ()]
    return hashlib.blake2b("\0".join([kept.item.id, *texts]).encode(), digest_size=12).hexdigest()


def sample(store: Store, count: int) -> list[StoredConversation]:
    """Return about ``count`` accepted conversations: one of each stratum, the rest by their sizes."""
    sizes: Counter[Any] = Counter()
    best: defaultdict[Any, list[Any]] = defaultdict(list)
    for kept in store.accepted():
        of = stratum(kept)
        sizes[of] += 1
        entry = (key_of(kept), kept.row, kept)
        (heapq.heappush if len(best[of]) < count else heapq.heappushpop)(best[of], entry)
    wanted = {of: 1 for of, _ in sizes.most_common(count)}
    left, total = count - len(wanted), sizes.total()
    shares = {of: left * sizes[of] / max(total, 1) for of in wanted}
    for of in sorted(wanted, key=lambda of: (int(shares[of]) - shares[of], of)):
        more = int(shares[of]) + (sum(map(int, shares.values())) + sum(wanted.values()) < count)
        wanted[of] += min(more, sizes[of] - 1)
    chosen = [kept for of, number in wanted.items() for _, _, kept in best[of][-number:]]
    random.Random(0).shuffle(chosen)
    return chosen


def write(store: Store, folder: Path, *, title: str, count: int) -> Path:
    """Write ``review.html`` into the corpus folder; a `CorpusError` if the store has no conversation."""
    chosen = sample(store, count)
    if not chosen:
        raise CorpusError(f"{folder}: there is nothing to review yet; run the job first.")
    script = Path(__file__).with_name("review.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    entries = [_entry(kept, folder) for kept in chosen]
    template = templates(html=True).get_template("output/review.html.j2")
    page = template.render(title=title, entries=entries, what=WHAT, digest=digest)
    replace_text(folder / "review.html", page.replace("/*script*/", script))
    return folder / "review.html"


def _entry(kept: StoredConversation, folder: Path) -> dict[str, Any]:
    turns = kept.conversation or ()
    text = "" if kept.item.form in TEXT_FORMS else "\n".join(turn.text for turn in turns)
    return {
        "key": key_of(kept),
        "turns": [(turn.speaker, turn.text.removeprefix("<image>\n")) for turn in turns],
        "picture": thumbnail(folder, kept),
        "boxes": read_boxes(text, width=SCALE, height=SCALE),
    }


def take(folder: Path, files: list[Path]) -> int:
    """Add the verdicts of files to those of the corpus; of two on one text the stricter counts.

    Returns how many texts have a verdict now. A `CorpusError` if a file can't be read, or is none that the
    page saves.
    """
    found = _known(folder)
    for file in files:
        try:
            given = msgspec.json.decode(file.read_bytes(), type=VerdictFile)
            for one in given.verdicts:
                found[one.key] = max(found.get(one.key, "right"), one.verdict, key=RANK.index)
        except (OSError, msgspec.DecodeError, ValueError) as error:
            raise CorpusError(
                f"{file}: expected the file that review.html saves ({error}). Nothing was taken in."
            ) from error
    replace_text(folder / VERDICTS, json.dumps(found, indent=1, sort_keys=True))
    return len(found)


def _known(folder: Path) -> dict[str, str]:
    path = folder / VERDICTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class ErrorRate:
    """Matches verdicts with the conversations of a corpus as they pass by."""

    def __init__(self, folder: Path) -> None:
        self._verdicts = _known(folder)
        self._sizes: Counter[Any] = Counter()
        self._found: defaultdict[Any, Counter[str]] = defaultdict(Counter)

    def add(self, kept: StoredConversation) -> str | None:
        """Take one conversation of the corpus; return what was judged of it."""
        if not self._verdicts:
            return None
        of = stratum(kept)
        self._sizes[of] += 1
        if verdict := self._verdicts.get(key_of(kept)):
            self._found[of][verdict] += 1
        return verdict

    def summary(self) -> dict[str, Any] | None:
        """Return the error rate with its 95 % interval; None without a verdict.

        ``judged`` texts were right or wrong, ``outdated`` verdicts are on texts that have changed since.
        Strata weigh as in the corpus; the interval is Wilson's, with Kish's effective number.
        """
        counts = sum(self._found.values(), Counter())
        judged = {of: n for of, c in self._found.items() if (n := c["right"] + c["wrong"])}
        if not judged:
            return None
        weights = {of: self._sizes[of] / n for of, n in judged.items()}
        total = sum(weights[of] * n for of, n in judged.items())
        rate = sum(weights[of] * self._found[of]["wrong"] for of in judged) / total
        number = total**2 / sum(weights[of] ** 2 * n for of, n in judged.items())
        low, high = wilson(rate, number)
        return {
            "judged": sum(judged.values()),
            "wrong": counts["wrong"],
            "unclear": counts["unclear"],
            "outdated": len(self._verdicts) - counts.total(),
            "error_rate": round(rate, 5),
            "low": round(low, 5),
            "high": round(high, 5),
        }


def wilson(rate: float, number: float, *, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``number`` trials (Wilson, JASA 22, 1927)."""
    middle = (rate + z * z / (2 * number)) / (1 + z * z / number)
    half = (
        z * math.sqrt(rate * (1 - rate) / number + (z / (2 * number)) ** 2) / (1 + z * z / number)
    )
    return max(0.0, middle - half), min(1.0, middle + half)
