# SPDX-License-Identifier: Apache-2.0

"""Does a conversation say what the expert's annotation says, and nothing against it?

Every check is a generator of `Problem`s. They find what can be found by words: that the label is named, and
that no other label of the set, modality, side or box is claimed. They don't understand the text;
`tests/data_tools/checks` measures on hard sentences how often they are wrong.
"""

from __future__ import annotations

from functools import lru_cache

from data_tools.checks.claims import LabelFinder, ModalityFinder, agreement, boxes, modality, side
from data_tools.checks.figures import counts, perceived, sizes
from data_tools.checks.terms import said
from data_tools.checks.translation import translation
from data_tools.checks.wording import (
    CheckOptions,
    language,
    leaks,
    length,
    refusal,
    repetition,
    turns,
)
from data_tools.items import Conversation, Item, Problem, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

__all__ = ["CHECK_VERSION", "CheckOptions", "check", "check_translation"]

CHECK_VERSION = 2
"""Raise it with any change of what the checks accept: conversations are then checked anew."""


def check(
    conversation: Conversation,
    item: Item,
    record: Record,
    context: SourceContext,
    taxonomy: Taxonomy,
    options: CheckOptions,
    *,
    grounded: bool = True,
) -> list[Problem]:
    """Return what is wrong with a conversation; empty if it is accepted.

    Args:
        conversation: as it would go into the corpus.
        item: what was asked for.
        record: what is known of the image.
        context: of the record's source.
        taxonomy: the job's.
        options: which checks, and their bounds.
        grounded: False for answers that were asked for without the annotation: then only the checks that
            need none decide, so that the two corpora of the comparison differ in nothing else.
    """
    problems = list(turns(conversation, item))
    if problems:
        return problems
    what = said(conversation, chinese=item.language == "zh")
    problems += length(what, item, options)
    problems += language(what, item, options)
    problems += repetition(what)
    problems += refusal(what, options)
    if options.leaks:
        problems += leaks(what, options)
    if not grounded:
        return problems
    finder = _labels(_Same(context))
    if options.agreement:
        problems += agreement(what, item, record, finder)
        if item.form == "perception":
            problems += perceived(conversation, item, record, finder)
    if options.figures:
        problems += counts(what, item, record, finder)
        problems += sizes(what, item, record, finder)
    if options.modality:
        problems += modality(what, record, _modalities(_Same(taxonomy)))
    if options.side:
        problems += side(what, item, record, finder)
    if options.boxes:
        problems += boxes(what, item, record)
    return problems


def check_translation(
    conversation: Conversation, original: Conversation, context: SourceContext
) -> list[Problem]:
    """Return what a Chinese translation lost or changed of the English original."""
    return list(translation(conversation, original, _labels(_Same(context))))


class _Same:
    """Makes an object that holds a mapping a cache key, by identity; keeps it alive meanwhile."""

    __slots__ = ("of",)

    def __init__(self, of: object) -> None:
        self.of = of

    def __hash__(self) -> int:
        return id(self.of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of


@lru_cache(maxsize=64)
def _labels(context: _Same) -> LabelFinder:
    assert isinstance(context.of, SourceContext)
    return LabelFinder(context.of)


@lru_cache(maxsize=4)
def _modalities(taxonomy: _Same) -> ModalityFinder:
    assert isinstance(taxonomy.of, Taxonomy)
    return ModalityFinder(taxonomy.of)
