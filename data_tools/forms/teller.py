"""What a record says, in the words of one language: the stock of sentences that all forms draw from."""

from __future__ import annotations

from data_tools.forms.coordinates import write_box
from data_tools.forms.grammar import (
    attribute,
    definite,
    denies,
    listed,
    picture_of,
    place,
    place_zh,
    sentence,
    with_article,
    within,
)
from data_tools.items import IMAGE, Item, SourceContext, Turn
from data_tools.records import Box, Label, Record
from data_tools.taxonomy import Taxonomy
from gmai_xtuner.core.rng import Rng

# Attributes that a caption tells; more would be a table.
MAX_ATTRIBUTES = 3
# Regions of one label whose places are told one by one.
MAX_PLACES = 3


class Teller:
    """A record in one language.

    Args:
        item: gives language and seed.
        record, context, taxonomy: what is known and what it is called.
    """

    __slots__ = ("chinese", "context", "dice", "item", "record", "taxonomy")

    def __init__(
        self, item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy
    ) -> None:
        self.item, self.record, self.context, self.taxonomy = item, record, context, taxonomy
        self.chinese = item.language == "zh"
        self.dice = Rng(item.seed)

    def pick(self, english: tuple[str, ...], chinese: tuple[str, ...]) -> str:
        """One of the wordings of the item's language."""
        return self.dice.pick(chinese if self.chinese else english)

    def name(self, label: str) -> str:
        """A label in the item's language."""
        return self.context.chinese[label] if self.chinese else label

    def names(self, labels: tuple[str, ...]) -> str:
        """Labels as a list."""
        if self.chinese:
            return "、".join(self.context.chinese[label] for label in labels)
        return listed(labels)

    def modality(self) -> str:
        """The modality's name."""
        return self._term(self.record.modality)

    def modality_within(self) -> str:
        """The modality's name inside a sentence."""
        return self.modality() if self.chinese else within(self.record.modality)

    def department(self) -> str:
        """The department's name."""
        return self._term(self.record.department)

    def picture(self) -> str:
        """`a CT image`, `CT图像`."""
        if self.chinese:
            return f"{self.modality()}图像"
        return with_article(picture_of(self.record.modality))

    def place(self, box: Box) -> str:
        """`the upper left part of the picture`."""
        return (place_zh if self.chinese else place)(box, self.record.width, self.record.height)

    def box(self, box: Box) -> str:
        """Its coordinates as text."""
        return write_box(box, width=self.record.width, height=self.record.height)

    def whole(self) -> tuple[str, ...]:
        """Labels of the picture as a whole, each once."""
        return tuple(dict.fromkeys(label.name for label in self.record.labels if label.box is None))

    def regions(self) -> dict[str, list[Label]]:
        """Regions by label, each in reading order: by thirds downwards, then across."""
        found: dict[str, list[Label]] = {}
        for label in self.record.labels:
            if label.box is not None:
                found.setdefault(label.name, []).append(label)
        return found

    def what(self) -> str:
        """A sentence on what kind of picture it is."""
        return self.pick(
            ("This is {}.", "The image is {}.", "Shown is {}."), ("这是一幅{}。", "该图为{}。")
        ).format(self.picture())

    def classified(self) -> str:
        """A sentence on the labels of the picture as a whole; empty without any."""
        names = self.whole()
        if not names:
            return ""
        said = self.names(names)
        if self.chinese:
            return self.dice.pick(("其类别为{}。", "图像归类为{}。", "所见为{}。")).format(said)
        if len(names) > 1:
            return self.dice.pick(("The findings are {}.", "It is classified as {}.")).format(said)
        if denies(said):
            return self.dice.pick(("It shows {}.", "It is classified as {}.")).format(said)
        return self.dice.pick(
            ("It is classified as {}.", "The finding is {}.", "Its class is {}.")
        ).format(said)

    def identified(self, several: str) -> str:
        """An English sentence that lists the labels: ``several`` with them, or what shows none."""
        names = self.names(self.record.names)
        if len(self.record.names) == 1 and denies(names):
            return f"It shows {names}."
        return several.format(names)

    def located(self) -> list[str]:
        """Sentences on the regions, one for each label; empty without any."""
        return [self.located_one(name, found) for name, found in self.regions().items()]

    def located_one(self, label: str, found: list[Label]) -> str:
        """A sentence on the regions of one label: how many and where."""
        name = self.name(label)
        places = [self.place(region.box) for region in found if region.box]
        if label in self.record.incomplete:
            return self._some(name, list(dict.fromkeys(places)))
        if len(found) == 1:
            if self.chinese:
                return f"{places[0]}可见{name}。"
            return self.dice.pick(("{0} is visible in {1}.", "In {1} lies {2}.")).format(
                sentence(definite(name))[:-1], places[0], definite(name)
            )
        where = list(dict.fromkeys(places))
        many = len(where) > MAX_PLACES
        if self.chinese:
            if many:
                return f"可见{len(found)}处{name}，分布于图像多处。"
            return f"可见{len(found)}处{name}，位于{'、'.join(where)}。"
        if many:
            return f"{len(found)} regions of {name} are visible, spread over the picture."
        return f"{len(found)} regions of {name} are visible, in {listed(where)}."

    def _some(self, name: str, places: list[str]) -> str:
        """Of regions that aren't all known: neither how many there are nor that there is no other."""
        if self.chinese:
            if len(places) <= MAX_PLACES:
                return f"{'、'.join(places)}可见{name}。"
            return f"图像多处可见{name}。"
        if len(places) <= MAX_PLACES:
            return sentence(f"{name} is seen in {listed(places)}")
        return sentence(f"{name} is seen in many parts of the picture")

    def where(self, label: str) -> str:
        """The subject and verb of an English question on where a label's regions lie."""
        if label in self.record.incomplete:
            return f"is {label} seen"
        if len(self.regions()[label]) == 1:
            return f"is {definite(label)}"
        return f"are the regions of {label}"

    def one_region(self, label: str) -> str:
        """What one region shows, in English: `the spleen`, `one of the 3 regions of colonic gland`."""
        if label in self.record.incomplete:
            return f"a region of {label}"
        count = len(self.regions()[label])
        return definite(label) if count == 1 else f"one of the {count} regions of {label}"

    def attributes(self) -> list[str]:
        """Sentences on the attributes of the picture; in English, as their words are."""
        if self.chinese:
            return []
        if not self.record.attributes:
            return []
        own = {name.lower() for name in self.record.names}
        values = [(n, v) for n, v in self.record.attributes.items() if v.lower() not in own]
        return [attribute(name, value) for name, value in values[:MAX_ATTRIBUTES]]

    def findings(self) -> str:
        """All of it, without what kind of picture it is."""
        parts = [part for part in (self.classified(), *self.located()) if part]
        return ("" if self.chinese else " ").join(parts)

    def joined(self, *parts: str) -> str:
        """Sentences side by side."""
        return ("" if self.chinese else " ").join(part for part in parts if part)

    def _term(self, name: str) -> str:
        if self.chinese:
            return self.taxonomy.terms(name).chinese or name
        return name


def about_image(question: str, answer: str) -> tuple[Turn, Turn]:
    """A question on the picture with its answer."""
    return Turn("human", f"{IMAGE}\n{question}"), Turn("gpt", answer)


def without_image(question: str, answer: str) -> tuple[Turn, Turn]:
    """A question that goes on, or one without a picture."""
    return Turn("human", question), Turn("gpt", answer)
