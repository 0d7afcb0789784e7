# SPDX-License-Identifier: Apache-2.0

"""Captions, instructions, dialogues and texts without an image, in the words of the template writer."""

from __future__ import annotations

from data_tools.forms.language import Teller, about_image, without_image
from data_tools.items import Conversation
from data_tools.lexicon import spoken

_NOTES = ("difficult",)
"""Attributes of the annotator's work, not of what is seen."""


def caption(teller: Teller) -> Conversation:
    """Say kind of image, attributes, findings and where they lie."""
    return about_image(
        teller.say("caption.ask"),
        teller.joined(teller.what(), *teller.attributes(), teller.findings()),
    )


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
        across=_percent(box[2] - box[0], teller.record.width),
        down=_percent(box[3] - box[1], teller.record.height),
    )
    return about_image(question, teller.joined(shows, *attributes, spans))


def _percent(part: int, whole: int) -> str:
    return f"{max(1, (200 * part + whole) // (2 * whole))}%"


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
            question = teller.say(f"instruction.report.{_kind(teller)}")
            answer = teller.joined(teller.what(), *teller.attributes(), teller.findings())
        case "list":
            question = teller.say(f"instruction.list.{_kind(teller)}")
            answer = teller.found("instruction")
        case "where":
            name = teller.rng.pick(list(regions))
            question = teller.say("instruction.where", where=teller.counted("where", name))
            answer = teller.located(name, regions[name])
        case _:
            question = teller.say("instruction.department")
            belongs = teller.say("instruction.belongs", department=teller.department())
            answer = teller.joined(belongs, teller.what(), teller.findings())
    return about_image(question, answer)


def dialogue(teller: Teller) -> Conversation:
    """Ask as many questions as ``item.kind`` says, or as many as the record can answer."""
    say, record = teller.say, teller.record
    what = teller.what()
    first = say("dialogue.what"), what
    more = [(say(f"dialogue.asks.{_kind(teller)}"), teller.found("dialogue"))]
    least = len(more)
    for label, boxes in teller.regions().items():
        question = say("dialogue.where", where=teller.counted("where", label))
        more.append((question, teller.located(label, boxes)))
        if len(boxes) > 1 and label in teller.known:  # of one it is said already
            things = teller.things(label)
            more.append((say("dialogue.many", **things), say("dialogue.count", **things)))
    if record.department != "None":
        concerns = say("dialogue.concerns", department=teller.department())
        more.append((say("dialogue.department"), concerns))
    more.append((say("dialogue.sum"), teller.joined(what, teller.findings())))
    turns = [*about_image(*first)]
    for pair in more[: max(least, int(teller.item.kind or "3") - 1)]:
        turns += without_image(*pair)
    return tuple(turns)


def _kind(teller: Teller) -> str:
    """Return what a question on a record asks for: findings, things or the class."""
    return KINDS[teller.topic(teller.record.names)] if teller.whole() else "things"


KINDS = {
    "nothing": "findings",
    "findings": "findings",
    "things": "things",
    "view": "class",
    "class": "class",
}
"""Topic of labels (`language.Teller.topic`) -> what is asked for."""


def text(teller: Teller) -> Conversation:
    """Ask without an image: for the department, for another name, or what a line of a report says.

    It teaches the language of records, not new medicine. One question, or as many as ``item.kind`` says
    where the form is ``text_multi``.
    """
    item, record, say = teller.item, teller.record, teller.say
    kind = _kind(teller)
    names = teller.names(record.names) if kind == "class" else teller.shown(record.names)
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
    about = "department_class" if kind == "class" else "department"
    if item.form == "text_single":
        able = [
            "read",
            *([about] if has_department else []),
            *(["term"] if facts["chinese"] else []),
        ]
        if synonyms := teller.context.synonyms.get(label):
            facts["synonym"] = teller.rng.pick(synonyms)
            able.append("synonym")
        asked = teller.rng.pick(able)
        answer = f"read_is.{kind}" if asked == "read" else f"{asked}_is"
        return without_image(say(f"text.{asked}", **facts), say(f"text.{answer}", **facts))
    more = [(say("text.asks"), teller.found("dialogue"))]
    if has_department:
        more.append((say("text.concerned"), say("text.concerned_is", **facts)))
    if facts["chinese"]:
        more.append((say("text.term", **facts), say("text.term_is", **facts)))
    turns = [*without_image(say("text.quote", **facts), say("text.modality_is", **facts))]
    for pair in more[: max(1, int(item.kind or "3") - 1)]:
        turns += without_image(*pair)
    return tuple(turns)
