"""The writer that asks no model: sentences from the annotation alone. It needs no key and no network."""

from __future__ import annotations

from data_tools.forms import caption, dialogue, instruction, perception, region_caption, text
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

_WRITERS = {
    "caption": caption.write,
    "region_caption": region_caption.write,
    "instruction": instruction.write,
    "dialogue": dialogue.write,
    "perception": perception.write,
    "text_single": text.write,
    "text_multi": text.write,
}


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """The conversation that an item asks for; the same one whenever it is asked."""
    return _WRITERS[item.form](item, record, context, taxonomy)
