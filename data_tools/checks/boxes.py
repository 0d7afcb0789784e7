"""Are coordinates in an answer those of the record?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_tools.checks.said import Said
from data_tools.forms.coordinates import read_boxes, write_box
from data_tools.items import Item, Problem
from data_tools.records import Label, Record


def boxes(what: Said, item: Item, record: Record) -> Iterator[Problem]:
    """Four numbers in brackets that are no box, or no box of the record (or of the item's region)."""
    if "[" not in what.text:
        return
    size = {"width": record.width, "height": record.height}
    labels: Sequence[Label] = record.labels
    if item.focus is not None:
        focus = labels[item.focus]
        # A detection lists every region of its label.
        every = item.kind == "detection"
        labels = [label for label in labels if label.name == focus.name] if every else [focus]
    known = {write_box(label.box, **size) for label in labels if label.box}
    try:
        said_boxes = read_boxes(what.text, **size)
    except ValueError as error:
        yield Problem("coordinates make no box", str(error))
        return
    for box in said_boxes:
        if write_box(box, **size) not in known:
            yield Problem("coordinates are not the region's", f"{list(box)} in pixels")
            return
