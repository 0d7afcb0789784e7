# SPDX-License-Identifier: Apache-2.0

"""Visual perception: questions that the labels alone answer, made without any model.

GMAI-MM-Percept of GMAI-VL (arXiv 2411.14522, table 1). `kinds` says which questions a record can answer,
`perception` asks one of them.
"""

from __future__ import annotations

from collections import Counter

from data_tools.forms.conversations import KINDS
from data_tools.forms.coordinates import thirds
from data_tools.forms.language import Language, Teller, about_image
from data_tools.forms.options import MakeOptions
from data_tools.items import Conversation, SourceContext
from data_tools.lexicon import noun
from data_tools.records import Box, Record
from gmai_xtuner.core.rng import Rng

LETTERS = "ABCD"
_OF_ALL = frozenset(("no", "normal", "without", "negative", "healthy"))
"""First words of labels that are about the image as a whole."""


def kinds(
    record: Record, context: SourceContext, options: MakeOptions, language: Language
) -> list[str]:
    """Return the kinds of questions that this record can answer, in a fixed order."""
    counts = _counts(record)
    able = []
    if any(label.box is None for label in record.labels):
        able.append("classification")
    if counts:
        able.append("region")
        # "Every", "how many" and "where" ask for all regions of a label.
        known = context.known_in(record)
        complete = [count for name, count in counts.items() if name in known]
        if complete:
            able.append("counting")
        if any(count <= options.max_boxes for count in complete):
            able.append("detection")
        if 1 in complete:
            able.append("localisation")
    if absent(record, context, language):
        able += ["yes_no", "multiple_choice"]
    able.append("modality")
    if record.department != "None":
        able.append("department")
    return [kind for kind in able if options.perception_kinds.get(kind, 0) > 0]


def absent(record: Record, context: SourceContext, language: Language) -> list[str]:
    """Return labels of the set that this image is known to lack, and that aren't part of one that it has."""
    known = context.known_in(record)
    own = (*record.names, *record.incomplete)
    words = [set(name.lower().split()) for name in own]
    return [
        name
        for name in context.vocabulary
        if name in known
        and name not in own
        and language.can_name(name, context)
        and not any(_overlap(set(name.lower().split()), known) for known in words)
    ]


def focus_of(
    kind: str, record: Record, context: SourceContext, options: MakeOptions, rng: Rng
) -> int | None:
    """Draw the label that a question of this kind is about; None for kinds that need none."""
    if kind not in ("region", "localisation", "detection", "counting"):
        return None
    counts, known = _counts(record), context.known_in(record)
    fits = [
        at
        for at, label in enumerate(record.labels)
        if label.box is not None
        and (kind == "region" or label.name in known)
        and (kind != "localisation" or counts[label.name] == 1)
        and (kind != "detection" or counts[label.name] <= options.max_boxes)
    ]
    if kind in ("detection", "counting"):
        # By label, not by region: a rare label is asked for as often as a frequent one.
        name = rng.pick(list(dict.fromkeys(record.labels[at].name for at in fits)))
        return next(at for at in fits if record.labels[at].name == name)
    return rng.pick(fits)


def perception(teller: Teller) -> Conversation:
    """Ask the question of ``item.kind`` and answer it."""
    match teller.item.kind:
        case "classification":
            kind = KINDS[teller.topic(teller.whole())]
            said = teller.shown if kind == "things" else teller.names
            pair = teller.say(f"perception.classification.{kind}"), str(said(teller.whole()))
        case "modality":
            pair = teller.say("perception.modality"), str(teller.modality())
        case "department":
            pair = teller.say("perception.department"), teller.department()
        case "yes_no":
            pair = _yes_no(teller)
        case "multiple_choice":
            pair = _multiple_choice(teller)
        case _:
            pair = _about_region(teller)
    return about_image(*pair)


def _about_region(teller: Teller) -> tuple[str, str]:
    label, box = teller.focus()
    name = teller.name(label.name)
    kind = teller.item.kind
    same = teller.regions()[label.name]
    # Of an organ that a body has once, "every" is no word.
    one = kind == "detection" and len(same) == 1 and noun(label.name).is_anatomy
    question = teller.say(
        f"perception.{kind}{'_of_one' if one else ''}",
        **teller.things(label.name),
        box=teller.box(box),
    )
    match kind:
        case "detection":
            record = teller.record
            same = sorted(same, key=lambda box: _reading_order(box, record.width, record.height))
            answer = ", ".join(map(teller.box, same))
        case "localisation":
            answer = teller.say("perception.place", place=teller.place(box))
        case "counting":
            answer = str(len(same))
        case _:
            answer = str(name)
    return question, answer


def _yes_no(teller: Teller) -> tuple[str, str]:
    whole = teller.whole()
    yes = teller.rng.below(2) == 0
    others = absent(teller.record, teller.context, teller.language)
    label = teller.rng.pick((whole or teller.record.names) if yes else others)
    topic = teller.topic((label,))
    # Of a set of regions with images of none: "any no finding" is no question.
    if topic == "things" or (not whole and label.lower().split(" ", 1)[0] not in _OF_ALL):
        key = "perception.is_there"
    else:
        key = f"perception.is_{'finding' if topic == 'findings' else 'class'}"
    question = teller.say(key, name=teller.name(label))
    return question, teller.say("perception.yes" if yes else "perception.no")


def _multiple_choice(teller: Teller) -> tuple[str, str]:
    right = teller.rng.pick(teller.whole() or teller.record.names)
    others = absent(teller.record, teller.context, teller.language)
    choices: list[str] = []
    for name in teller.rng.sample(others, len(others)):
        words = set(name.lower().split())
        # Of two names one of which holds the other's words both could be right.
        if not any(_overlap(words, set(other.lower().split())) for other in choices):
            choices.append(name)
    del choices[len(LETTERS) - 1 :]
    at = teller.rng.below(len(choices) + 1)
    choices.insert(at, right)
    lines = [
        f"{letter}. {teller.name(choice)}" for letter, choice in zip(LETTERS, choices, strict=False)
    ]
    question = teller.say("perception.multiple_choice")
    return "\n".join([question, *lines, teller.say("perception.letter")]), LETTERS[at]


def _counts(record: Record) -> Counter[str]:
    """Return the number of regions of each label."""
    return Counter(label.name for label in record.labels if label.box is not None)


def _overlap(words: set[str], other: set[str]) -> bool:
    return words <= other or other <= words


def _reading_order(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    across, down = thirds(box, width, height)
    return down, across, box[1], box[0]
