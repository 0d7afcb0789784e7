# SPDX-License-Identifier: Apache-2.0

"""Does a conversation say what the expert's annotation says, and nothing against it?

Every check is a generator of `Problem`s. They find what can be found by words: that the label is named, and
that no other label of the set, modality, side or box is claimed. They don't understand the text;
`tests/data_tools/checks` measures on hard sentences how often they are wrong.

Here are those that read no annotation: is it a conversation in the item's language that neither refuses nor
speaks of its instructions?
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from data_tools.checks.claims import LabelFinder, ModalityFinder, agreement, boxes, modality, side
from data_tools.checks.figures import counts, perceived, sizes, translation
from data_tools.checks.terms import WORDS, Said, said
from data_tools.items import IMAGE, TEXT_FORMS, Conversation, Item, Problem, SourceContext, Task
from data_tools.options import CheckOptions
from data_tools.taxonomy import Taxonomy

__all__ = ["CHECK_VERSION", "CheckOptions", "check", "check_translation"]

CHECK_VERSION = 3
"""Raise it with any change of what the checks accept: conversations are then checked anew."""

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LETTERS = re.compile(r"[A-Za-z]+|[\u3400-\u9fff]")
_SENTENCE = re.compile(r"[^.。!！?？\n]{24,}[.。!！?？\n]")
# Forms whose answers are sentences; of perception a letter may be enough.
_SENTENCES = ("caption", "region_caption", "instruction", "dialogue", *TEXT_FORMS)
LEAKS, REFUSALS = tuple(WORDS["leaks"]), tuple(WORDS["refusals"])
# A text without Chinese has none of the Chinese phrases; most texts have none.
_ENGLISH = [tuple(filter(str.isascii, phrases)) for phrases in (REFUSALS, LEAKS)]


def check(
    conversation: Conversation,
    task: Task,
    taxonomy: Taxonomy,
    options: CheckOptions,
    *,
    grounded: bool = True,
) -> list[Problem]:
    """Return what is wrong with a conversation; empty if it is accepted.

    ``grounded`` is False for answers that were asked for without the annotation: then only the checks that
    need none decide, so that the two corpora of the comparison differ in nothing else.
    """
    item, record = task.item, task.record
    problems = list(turns(conversation, item))
    if problems:
        return problems
    what = said(conversation, chinese=item.language == "zh")
    problems += length(what, item, options)
    problems += language(what, item, options)
    problems += repetition(what)
    problems += phrases(what, options)
    if not grounded:
        return problems
    finder = _labels(task.context)
    for wanted, found in (
        (options.agreement, agreement(what, item, record, finder)),
        (options.agreement, perceived(conversation, item, record, finder)),
        (options.figures, counts(what, item, record, finder)),
        (options.figures, sizes(what, item, record, finder)),
        (options.modality, modality(what, record, _modalities(taxonomy))),
        (options.side, side(what, item, record, finder)),
        (options.boxes, boxes(what, item, record)),
    ):
        problems += found if wanted else ()
    return problems


def check_translation(
    conversation: Conversation, original: Conversation, context: SourceContext
) -> list[Problem]:
    """Return what a Chinese translation lost or changed of the English original."""
    return list(translation(conversation, original, _labels(context)))


# What is derived from a vocabulary is kept for as long as it is the same object.
_labels = lru_cache(maxsize=64)(LabelFinder)
_modalities = lru_cache(maxsize=4)(ModalityFinder)


def turns(conversation: Conversation, item: Item) -> Iterator[Problem]:
    """Want human and gpt in turn, nothing empty, one image mark at the head or none in a text form."""
    if not conversation or len(conversation) % 2:
        yield Problem("turns don't alternate", f"{len(conversation)} turns; give an answer to each")
        return
    for number, turn in enumerate(conversation):
        if turn.speaker != ("human", "gpt")[number % 2]:
            yield Problem("turns don't alternate", f"turn {number + 1} is of {turn.speaker!r}")
            return
        if not turn.text.strip() or turn.text.strip() == IMAGE:
            yield Problem("empty turn", f"turn {number + 1} says nothing")
    marks = sum(turn.text.count(IMAGE) for turn in conversation)
    expected = 0 if item.form in TEXT_FORMS else 1
    if marks != expected:
        yield Problem("wrong number of image marks", f"{marks} of {IMAGE} instead of {expected}")
    elif expected and not conversation[0].text.startswith(IMAGE):
        yield Problem("image mark isn't first", f"{IMAGE} stands in the middle of a turn")


def length(what: Said, item: Item, options: CheckOptions) -> Iterator[Problem]:
    """Want lengths within the bounds; Chinese characters count as words."""
    numbers = list(map(_number_of_words, what.answers))
    least, most = options.min_words, options.max_words
    if item.form in _SENTENCES and sum(numbers) < least:
        yield Problem("answer too short", f"{sum(numbers)} words, at least {least} wanted")
    if max(numbers, default=0) > most:
        yield Problem("answer too long", f"{max(numbers)} words, at most {most} wanted")


def language(what: Said, item: Item, options: CheckOptions) -> Iterator[Problem]:
    """Want the item's language; a name or an option letter in another is none of it."""
    if what.text.isascii() and (item.language == "en" or item.form == "perception"):
        return
    letters = _LETTERS.findall(what.text)
    if not letters or (item.form == "perception" and len(letters) < 4):
        return
    chinese = sum(1 for letter in letters if letter >= "\u3400") / len(letters)
    share = chinese if item.language == "zh" else 1 - chinese
    if share < options.language_share:
        name = {"en": "English", "zh": "Chinese"}[item.language]
        yield Problem("wrong language", f"only {share:.0%} of it is {name}; write {name}")


def repetition(what: Said) -> Iterator[Problem]:
    """Want no sentence twice within one answer."""
    for answer in what.answers:
        if len(answer) < 48:
            continue
        sentences = [sentence.strip().lower() for sentence in _SENTENCE.findall(answer)]
        if len(set(sentences)) < len(sentences):
            again = next(sentence for sentence in sentences if sentences.count(sentence) > 1)
            yield Problem("sentence repeated", again[:120])
            return


def _number_of_words(text: str) -> int:
    if text.isascii():
        return text.count(" ") + 1
    return len(_CHINESE.findall(text)) + len(_CHINESE.sub(" ", text).split())


def phrases(what: Said, options: CheckOptions) -> Iterator[Problem]:
    """Yield the first phrase of a model that won't answer, and the first that speaks of the annotation."""
    refusals, leaks = _ENGLISH if what.plain.isascii() else (REFUSALS, LEAKS)
    allowed = [other.lower() for other in options.allowed_phrases]
    for unwanted, reason, advice in (
        (refusals, "the model refused", ""),
        ((*leaks, *options.further_leaks), "speaks of the annotation", "; don't mention it"),
    ):
        for phrase in map(str.lower, unwanted if unwanted is refusals or options.leaks else ()):
            if phrase in what.plain and not any(phrase in other for other in allowed):
                yield Problem(reason, f"it says {phrase!r}{advice}")
                break
