"""Captions of one region: what it is, where it lies, how much of the picture it spans."""

from __future__ import annotations

from data_tools.forms.grammar import attribute
from data_tools.forms.teller import Teller, about_image
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

_ASKED = (
    "Describe the region {} of this image.",
    "What lies in the region {}?",
    "Write a caption for the region {}.",
    "What does the region {} of this image show?",
)
_ASKED_ZH = ("请描述图像中{}区域的内容。", "{}区域内是什么？", "请为{}区域写一段说明。")
# Of the annotator's work, not of what is seen.
_NOTES = ("difficult",)


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """About the label that ``item.focus`` names, which has a box."""
    teller = Teller(item, record, context, taxonomy)
    assert item.focus is not None
    label = record.labels[item.focus]
    assert label.box is not None
    x1, y1, x2, y2 = label.box
    across, down = _percent(x2 - x1, record.width), _percent(y2 - y1, record.height)
    question = teller.pick(_ASKED, _ASKED_ZH).format(teller.box(label.box))
    place = teller.place(label.box)
    name = teller.name(label.name) if teller.chinese else teller.one_region(label.name)
    shows = teller.pick(
        ("This region, in {0}, shows {1}.", "The region lies in {0} and shows {1}."),
        ("该区域位于{0}，显示{1}。", "此区域在{0}，为{1}。"),
    ).format(place, name)
    spans = (
        f"其宽约占图像的{across}，高约占{down}。"
        if teller.chinese
        else f"It spans about {across} of the picture's width and {down} of its height."
    )
    attributes = (
        []
        if teller.chinese
        else [attribute(key, value) for key, value in label.attributes.items() if key not in _NOTES]
    )
    return about_image(question, teller.joined(shows, *attributes, spans))


def _percent(part: int, whole: int) -> str:
    return f"{max(1, (200 * part + whole) // (2 * whole))}%"
