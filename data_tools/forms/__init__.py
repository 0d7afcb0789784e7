# SPDX-License-Identifier: Apache-2.0

"""Conversations of a record: which ones are made, and the template writer that words them.

The template writer asks no model: its sentences come from the annotation alone, without key or network.
"""

from __future__ import annotations

from data_tools.forms import conversations
from data_tools.forms.language import Teller, language
from data_tools.items import FORMS, Conversation, Item, SourceContext, Task
from data_tools.options import MakeOptions
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy
from gmai_xtuner.core.rng import Rng, seed_of

__all__ = ["FORM_VERSIONS", "MakeOptions", "plan", "write"]

FORM_VERSIONS = dict.fromkeys(FORMS, 7) | dict.fromkeys(("caption", "instruction", "dialogue"), 6)
"""Version of each form: raise it with any change of its sentences or of what they say.

Conversations of an older version are written anew by the next run of a job; those of the same version stay.
"""
_WRITERS = {
    "caption": conversations.caption,
    "region_caption": conversations.region_caption,
    "instruction": conversations.instruction,
    "dialogue": conversations.dialogue,
    "perception": conversations.perception,
    "text_single": conversations.text,
    "text_multi": conversations.text,
}


def write(task: Task, taxonomy: Taxonomy) -> Conversation:
    """Write the conversation that a task asks for from the annotation; always the same one."""
    return _WRITERS[task.item.form](Teller(task, taxonomy))


def plan(record: Record, context: SourceContext, make: MakeOptions, *, seed: int) -> list[Item]:
    """Return the items of a record, in the order of `items.FORMS`.

    They depend on the arguments alone, and each item's own seed on its id and the job's ``seed``: a record
    more or less elsewhere changes nothing here.
    """
    rng = Rng(seed_of(record.id, seed))
    can_be_chinese = all(name in context.chinese for name in record.names)
    items = []
    for form in FORMS:
        number = rng.number(getattr(make, form))
        if not number:
            continue
        if form == "region_caption":
            boxed = [at for at, label in enumerate(record.labels) if label.box is not None]
            focuses: list[int | None] = list(rng.sample(boxed, min(number, make.max_regions)))
        else:
            focuses = [None] * number
        drawn: set[str] = set()
        for at, focus in enumerate(focuses):
            code = "zh" if rng.share() < make.chinese and can_be_chinese else "en"
            kind = ""
            if form in ("dialogue", "text_multi"):
                fewest, most = make.dialogue_turns
                kind = str(fewest + rng.below(most - fewest + 1))
            elif form == "perception":
                able = conversations.kinds(record, context, make, language(code))
                able = [name for name in able if name not in drawn]
                if not able:
                    break
                kind = _weighted(able, make, rng)
                drawn.add(kind)
                focus = conversations.focus_of(kind, record, context, make, rng)
            suffix = kind if form == "perception" else str(at) if at else ""
            item_id = f"{record.id}#{form}{'-' + suffix if suffix else ''}"
            items.append(Item(item_id, form, code, kind, focus, seed_of(item_id, seed)))
    return items


def _weighted(kinds: list[str], make: MakeOptions, rng: Rng) -> str:
    weights = [make.perception_kinds[kind] for kind in kinds]
    left = rng.share() * sum(weights)
    for kind, weight in zip(kinds, weights, strict=True):
        left -= weight
        if left < 0:
            return kind
    return kinds[-1]
