"""Captions of the picture as a whole."""

from __future__ import annotations

from data_tools.forms.teller import Teller, about_image
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

_ASKED = (
    "Describe this image.",
    "What does this medical image show?",
    "Write a caption for this image.",
    "Summarise this image.",
    "Please describe what this image shows.",
    "Give a short description of this image.",
)
_ASKED_ZH = (
    "请描述这张图像。",
    "这张医学图像显示了什么？",
    "请为这张图像写一段说明。",
    "请概括这张图像。",
    "请简要描述图像内容。",
)


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """Kind of picture, attributes, findings and where they lie."""
    teller = Teller(item, record, context, taxonomy)
    question = teller.pick(_ASKED, _ASKED_ZH)
    return about_image(
        question, teller.joined(teller.what(), *teller.attributes(), teller.findings())
    )
