# SPDX-License-Identifier: Apache-2.0

"""Captions, instructions, dialogues and texts without an image, in the words of the template writer."""

from __future__ import annotations

from data_tools.forms.language import Teller, about_image, without_image
from data_tools.items import Conversation
from data_tools.records import Record

_NOTES = ("difficult",)
"""Attributes of the annotator's work, not of what is seen."""
_OF_THINGS = ("Organ Recognition", "Blood Vessels", "Bone", "Cell", "Microorganism", "Muscle",
              "Nervous Tissue", "Surgical Instrument")  # fmt: skip
"""Clinical tasks whose labels are things that are seen, not what was concluded from them."""


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
            question = teller.say("instruction.report")
            answer = teller.joined(teller.what(), *teller.attributes(), teller.findings())
        case "list":
            question = teller.say("instruction.list")
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
    more = [(say("dialogue.findings"), teller.found("dialogue"))]
    least = len(more)
    for label, boxes in teller.regions().items():
        question = say("dialogue.where", where=teller.counted("where", label))
        more.append((question, teller.located(label, boxes)))
        if len(boxes) > 1 and label in teller.known:
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


def text(teller: Teller) -> Conversation:
    """Ask without an image: the question holds the facts that its answer puts into words.

    It teaches the language of records, not new medicine. One question, or as many as ``item.kind`` says
    where the form is ``text_multi``.
    """
    item, record = teller.item, teller.record
    kind = "text.shown" if _is_shown(record) else "text.result"
    facts = {
        "image": teller.image(),
        "names": teller.shown(record.names),
        "modality": teller.modality(),
        "department": teller.department(),
    }
    has_department = record.department != "None"
    said = teller.say(f"{kind}.said", **facts)
    with_department = teller.joined(said, teller.say("text.department_is", **facts))
    if item.form == "text_single" and has_department and teller.rng.below(2):
        return without_image(teller.say(f"{kind}.full", **facts), with_department)
    turns = [*without_image(teller.say(f"{kind}.line", **facts), said)]
    if item.form == "text_single":
        return tuple(turns)
    more = [
        (teller.say("text.modality"), teller.say("text.modality_is", **facts)),
        (teller.say(f"{kind}.ask"), teller.say(f"{kind}.answer", **facts)),
    ]
    if has_department:
        more.insert(1, (teller.say("text.department", **facts), with_department))
    for pair in more[: max(1, int(item.kind or "3") - 1)]:
        turns += without_image(*pair)
    return tuple(turns)


def _is_shown(record: Record) -> bool:
    """Return whether the labels are things that are seen."""
    if record.clinical_task is not None:
        return record.clinical_task.startswith(_OF_THINGS)
    return all(label.box is not None for label in record.labels)
