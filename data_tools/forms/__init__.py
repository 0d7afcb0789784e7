"""Which conversations are made of a record; one file for each form says how they are worded."""

from __future__ import annotations

from data_tools.forms import perception
from data_tools.forms.options import MakeOptions
from data_tools.items import FORMS, Item, SourceContext
from data_tools.records import Record
from gmai_xtuner.core.rng import Rng, seed_of

__all__ = ["FORM_VERSIONS", "MakeOptions", "plan"]

FORM_VERSIONS = {
    "caption": 1,
    "region_caption": 1,
    "instruction": 1,
    "dialogue": 1,
    "perception": 1,
    "text_single": 1,
    "text_multi": 1,
}
"""Version of each form: raise it with any change of its sentences or of what they say.

Conversations of an older version are written anew by the next run of a job; those of the same version stay.
"""


def plan(record: Record, context: SourceContext, make: MakeOptions, *, seed: int) -> list[Item]:
    """The items of a record, in the order of `items.FORMS`.

    They depend on ``record``, ``context``, ``make`` and ``seed`` alone, and each item's own seed on its
    id and ``seed``: a record more or less elsewhere changes nothing here.

    Args:
        record: what they are made of.
        context: of its source.
        make: how many of each form.
        seed: of the job.
    """
    dice = Rng(seed_of(record.id, seed))
    can_be_chinese = all(name in context.chinese for name in record.names)
    items = []
    for form in FORMS:
        number = dice.number(getattr(make, form))
        if not number:
            continue
        if form == "region_caption":
            boxed = [at for at, label in enumerate(record.labels) if label.box is not None]
            focuses: list[int | None] = list(dice.sample(boxed, min(number, make.max_regions)))
        else:
            focuses = [None] * number
        drawn: set[str] = set()
        for at, focus in enumerate(focuses):
            language = "zh" if dice.share() < make.chinese and can_be_chinese else "en"
            kind = ""
            if form in ("dialogue", "text_multi"):
                fewest, most = make.dialogue_turns
                kind = str(fewest + dice.below(most - fewest + 1))
            elif form == "perception":
                able = perception.kinds(record, context, make, chinese=language == "zh")
                able = [name for name in able if name not in drawn]
                if not able:
                    break
                kind = _weighted(able, make, dice)
                drawn.add(kind)
                focus = perception.focus_of(kind, record, make, dice)
            suffix = kind if form == "perception" else str(at) if at else ""
            item_id = f"{record.id}#{form}{'-' + suffix if suffix else ''}"
            items.append(Item(item_id, form, language, kind, focus, seed_of(item_id, seed)))
    return items


def _weighted(kinds: list[str], make: MakeOptions, dice: Rng) -> str:
    weights = [make.perception_kinds[kind] for kind in kinds]
    left = dice.share() * sum(weights)
    for kind, weight in zip(kinds, weights, strict=True):
        left -= weight
        if left < 0:
            return kind
    return kinds[-1]
