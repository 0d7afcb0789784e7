# SPDX-License-Identifier: Apache-2.0

"""The conversations of each form, in the words of the template writer.

Visual perception is GMAI-MM-Percept of GMAI-VL (arXiv 2411.14522, table 1): questions that the labels alone
answer. `kinds` says which of them a record can answer, `perception` asks one.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

from data_tools.forms.coordinates import thirds
from data_tools.forms.language import Language, Teller, exchange
from data_tools.items import Conversation, SourceContext
from data_tools.lexicon import ADJECTIVES, noun, spoken, words_of
from data_tools.options import MakeOptions
from data_tools.records import Box, Record
from gmai_xtuner.core.rng import Rng

_NOTES = ("difficult", "occluded", "truncated")
"""Attributes of the annotator's work, not of what is seen."""


def caption(teller: Teller) -> Conversation:
    """Say kind of image, attributes, findings and where they lie."""
    question = teller.say("caption.ask")
    answer = teller.joined(teller.what(), *teller.attributes(), teller.findings())
    return exchange((question, answer))


def region_caption(teller: Teller) -> Conversation:
    """Describe the region that the item's focus names."""
    label, box = teller.focus()
    question = teller.say("region_caption.ask", box=teller.box(box))
    shows = teller.say(
        "region_caption.shows",
        place=teller.place(box),
        region=teller.counted("region_of", label.name),
    )
    attributes = [
        teller.attribute(*each) for each in label.attributes.items() if each[0] not in _NOTES
    ]
    spans = teller.say(
        "region_caption.spans",
        across=_share(teller, box[2] - box[0], teller.record.width),
        down=_share(teller, box[3] - box[1], teller.record.height),
    )
    return exchange((question, teller.joined(shows, *attributes, spans)))


def _share(teller: Teller, part: int, whole: int) -> str:
    percent = min(99, max(1, (200 * part + whole) // (2 * whole)))
    return teller.say(f"share.{'whole' if part == whole else 'part'}", percent=percent)


def instruction(teller: Teller) -> Conversation:
    """Make one of the requests that the record can answer."""
    regions = teller.regions()
    kinds = ["report", *(["where"] if regions else [])]
    if not teller.record.incomplete:
        kinds.append("list")
    if teller.record.department != "None":
        kinds.append("department")
    match teller.rng.pick(kinds):
        case "report":
            question = teller.by_topic("instruction.report", _topic(teller))
            answer = teller.joined(teller.what(), *teller.attributes(), teller.findings())
        case "list":
            question = teller.by_topic("instruction.list", _topic(teller))
            answer = teller.found("instruction")
        case "where":
            name = teller.rng.pick(list(regions))
            question = teller.say("instruction.where", where=teller.counted("where", name))
            answer = teller.located(name, regions[name])
        case _:
            question = teller.say("instruction.department")
            belongs = teller.say("instruction.belongs", department=teller.department())
            answer = teller.joined(belongs, teller.what(), teller.findings())
    return exchange((question, answer))


def dialogue(teller: Teller) -> Conversation:
    """Ask as many questions as ``item.kind`` says, or as many as the record can answer."""
    say, record = teller.say, teller.record
    what = teller.what()
    first = say("dialogue.what"), what
    more = [(teller.by_topic("dialogue.asks", _topic(teller)), teller.found("dialogue"))]
    least = len(more)
    for label, boxes in teller.regions().items():
        question = say("dialogue.where", where=teller.counted("where", label))
        more.append((question, teller.located(label, boxes)))
        if len(boxes) > 1 and label in teller.known:  # of one it is said already
            values = teller.placeholders(label)
            more.append((say("dialogue.many", **values), say("dialogue.count", **values)))
    if record.department != "None":
        concerns = say("dialogue.concerns", department=teller.department())
        more.append((say("dialogue.department"), concerns))
    more.append((say("dialogue.sum"), teller.joined(what, teller.findings())))
    return exchange(first, *more[: max(least, int(teller.item.kind or "3") - 1)])


def _topic(teller: Teller) -> str:
    """Return what a question on a record asks for: of regions they are things that are shown."""
    return teller.topic(teller.record.names) if teller.whole() else "things"


def text(teller: Teller) -> Conversation:
    """Ask without an image: for the department, for another name, or what a line of a report says.

    It teaches the language of records, not new medicine. One question, or as many as ``item.kind`` says
    where the form is ``text_multi``.
    """
    item, record, say = teller.item, teller.record, teller.say
    topic = _topic(teller)
    names = teller.names(record.names) if topic == "class" else teller.shown(record.names)
    label = teller.rng.pick(record.names)
    facts = {
        "image": teller.image(subject=False),
        "names": names,
        "department": teller.department(),
        "english": spoken(label),
        "chinese": teller.context.chinese.get(label, ""),
        "report": "",
    }
    facts["report"] = teller.joined(say("what", **facts), teller.found("dialogue"))
    has_department = record.department != "None"
    if item.form == "text_single":
        able = ["read"] + ["department"] * has_department + ["term"] * bool(facts["chinese"])
        if synonyms := teller.context.synonyms.get(label):
            facts["synonym"] = teller.rng.pick(synonyms)
            able.append("synonym")
        asked = teller.rng.pick(able)
        question = say if asked != "department" else partial(teller.by_topic, topic=topic)
        answer = say if asked in ("term", "synonym") else partial(teller.by_topic, topic=topic)
        pair = question(f"text.{asked}", **facts), answer(f"text.{asked}_is", **facts)
        return exchange(pair, image=False)
    more = [(say("text.asks"), teller.found("dialogue"))]
    if has_department:
        more.append((say("text.concerned"), say("text.concerned_is", **facts)))
    if facts["chinese"]:
        more.append((say("text.term", **facts), say("text.term_is", **facts)))
    first = say("text.quote", **facts), say("text.modality_is", **facts)
    return exchange(first, *more[: max(1, int(item.kind or "3") - 1)], image=False)


# --- perception -----------------------------------------------------------------------------------

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
        complete = {name: count for name, count in counts.items() if name in known}
        if any(_countable(name) for name in complete):
            able.append("counting")
        if any(count <= options.max_boxes for count in complete.values()):
            able.append("detection")
        if 1 in complete.values():
            able.append("localisation")
    if absent(record, context, language):
        able += ["yes_no", "multiple_choice"]
    able.append("modality")
    if record.department != "None":
        able.append("department")
    return [kind for kind in able if options.perception_kinds.get(kind, 0) > 0]


def absent(record: Record, context: SourceContext, language: Language) -> list[str]:
    """Return labels of the set that this image is known to lack, and that aren't part of one that it has.

    `SourceContext.known_in` says what was looked for in the image; `pipeline.source_context` what the job
    (``negatives``) and the readers (``examined``) have to say in that.
    """
    known = context.known_in(record)
    own = (*record.names, *record.incomplete)
    own_words = [words for name in own for words in _said(name, context)]
    return [
        name
        for name in context.vocabulary
        if name in known
        and name not in own
        and language.can_name(name, context)
        and not any(_overlap(one, words) for one in _said(name, context) for words in own_words)
    ]


def _said(label: str, context: SourceContext) -> list[frozenset[str]]:
    """Return the words of each name that the job has for a label."""
    return [words_of(name) for name in (label, *context.synonyms.get(label, ()))]


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
        and (kind != "counting" or _countable(label.name))
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
            topic = teller.topic(teller.whole())
            said = teller.shown if topic == "things" else teller.names
            pair = teller.by_topic("perception.classification", topic), str(said(teller.whole()))
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
    return exchange(pair)


def _about_region(teller: Teller) -> tuple[str, str]:
    label, box = teller.focus()
    name = teller.name(label.name)
    kind = teller.item.kind
    same = teller.regions()[label.name]
    # Of what a body has once, "every" is no word.
    found = noun(label.name)
    once = found.is_anatomy or found.is_one or found.kind == "condition"
    one = kind == "detection" and len(same) == 1 and once
    question = teller.say(
        f"perception.{kind}{'_of_one' if one else ''}",
        **teller.placeholders(label.name),
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
    # Of a set of regions with images of none: "any no finding" is no question, nor is "any malignant".
    words = label.lower().split()
    if not whole and words[0] not in _OF_ALL and words[-1] not in ADJECTIVES:
        topic = "things"
    question = teller.by_topic("perception.is", topic, name=teller.name(label))
    return question, teller.say("perception.yes" if yes else "perception.no")


def _multiple_choice(teller: Teller) -> tuple[str, str]:
    right = teller.rng.pick(teller.whole() or teller.record.names)
    others = absent(teller.record, teller.context, teller.language)
    choices: list[str] = []
    taken: list[frozenset[str]] = []
    for name in teller.rng.sample(others, len(others)):
        # Of two names one of which holds the other's words both could be right.
        said = _said(name, teller.context)
        if not any(_overlap(one, other) for one in said for other in taken):
            choices.append(name)
            taken += said
    del choices[len(LETTERS) - 1 :]
    at = teller.rng.below(len(choices) + 1)
    choices.insert(at, right)
    lines = [
        f"{letter}. {teller.name(choice)}" for letter, choice in zip(LETTERS, choices, strict=False)
    ]
    question = teller.say("perception.multiple_choice")
    return "\n".join([question, *lines, teller.say("perception.letter")]), LETTERS[at]


def _countable(label: str) -> bool:
    """Return whether one may ask how many: not of what there is one of, nor of "the ribs" as one map."""
    found = noun(label)
    once = found.is_one or found.kind in ("anatomy", "condition")
    return not once and not (found.is_anatomy and found.is_plural)


def _counts(record: Record) -> Counter[str]:
    """Return the number of regions of each label."""
    return Counter(label.name for label in record.labels if label.box is not None)


def _overlap(words: frozenset[str], other: frozenset[str]) -> bool:
    """Tell whether one name has all the words of the other: "left lung" and "lung"."""
    return words <= other or other <= words


def _reading_order(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    across, down = thirds(box, width, height)
    return down, across, box[1], box[0]
