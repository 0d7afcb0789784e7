# SPDX-License-Identifier: Apache-2.0

"""One conversation to be made of a record, and the conversation that was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_tools.lexicon import kinds_among
from data_tools.records import ANYTHING, Record

# Form -> the corpus file that it goes to. The paper's sub-datasets: GMAI-MM-Caption, -Instruct, -Percept,
# GMAI-Text-Single, -Multi (arXiv 2411.14522, table 1).
FILES = {
    "caption": "caption.jsonl",
    "region_caption": "caption.jsonl",
    "instruction": "instruct.jsonl",
    "dialogue": "instruct.jsonl",
    "perception": "percept.jsonl",
    "text_single": "text_single.jsonl",
    "text_multi": "text_multi.jsonl",
}
FORMS = tuple(FILES)
TEXT_FORMS = ("text_single", "text_multi")
LANGUAGES = ("en", "zh")
IMAGE = "<image>"


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation to be made; ``id`` is the record's with what is made of it: ``<record id>#caption``.

    ``kind`` is ``classification``, ``detection``, ``yes_no``, ``multiple_choice``, ... of perception, the
    number of questions of ``dialogue`` and ``text_multi``, else "". ``focus`` is the index of the record's
    label that it is about, None: the whole image. ``seed``, of every random choice in writing it, depends on
    the job's seed and ``id`` alone.
    """

    id: str
    form: str
    language: str
    kind: str = ""
    focus: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SourceContext:
    """Facts of the set that a record comes from; the same object for all of its records.

    ``vocabulary``, sorted, is every label name of the set: what a wrong answer could claim. ``synonyms`` and
    ``chinese`` are further names of labels. Of ``known`` labels all is annotated in every image;
    ``by_image``: an image's own ``examined`` counts too.
    """

    source: str
    dataset: str
    vocabulary: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    chinese: Mapping[str, str] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    by_image: bool = True

    def known_in(self, record: Record) -> frozenset[str]:
        """Return the labels of which all in an image is annotated: they may be counted, or denied.

        A name of which another one is a kind, that is there or may be, is not among them.
        """
        if ANYTHING in record.incomplete:
            return frozenset()
        examined = record.examined if self.by_image else ()
        if ANYTHING in examined:
            examined = self.vocabulary
        known = frozenset((*self.known, *examined)).difference(record.incomplete)
        there = {*record.names, *record.incomplete}
        for name, kinds in kinds_among(self.vocabulary).items():
            if kinds & there or not kinds <= known:
                known -= {name}
        # What is said of an image as a whole may be of other regions than those with a box.
        return known - {label.name for label in record.labels if label.box is None}.intersection(
            label.name for label in record.labels if label.box is not None
        )


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation that is to be written, with everything that is known."""

    item: Item
    record: Record
    context: SourceContext


@dataclass(frozen=True, slots=True)
class Turn:
    """``speaker`` is ``"human"`` or ``"gpt"``, as in LLaVA's files."""

    speaker: str
    text: str


Conversation = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason why a conversation is not accepted, in the same words for all of the kind.

    ``detail`` is particular to this one; it is handed to the model when it is asked again.
    """

    reason: str
    detail: str = ""
