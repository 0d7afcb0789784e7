# SPDX-License-Identifier: Apache-2.0

"""Sentences of the template writer: what a record says, in the words of one language.

The sentences are data, one file a language (``en.yaml``, ``zh.yaml``); forms ask for them by key and never by
language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from data_tools.forms.coordinates import place_of, write_box
from data_tools.items import IMAGE, Conversation, SourceContext, Task, Turn
from data_tools.lexicon import (
    ADJECTIVES,
    SIDE_KEYS,
    definite,
    indefinite,
    noun,
    number_word,
    plural_of,
    says_nothing,
    spoken,
    unit,
    with_article,
)
from data_tools.records import Box, Label
from data_tools.taxonomy import Taxonomy
from gmai_xtuner.core.rng import Rng

MAX_ATTRIBUTES = 3
"""Attributes that a caption names; more would be a table."""
MAX_PLACES = 3
"""Regions of one label whose places are named one by one."""
KINDS = {"nothing": "findings", "view": "class"}
KINDS |= {kind: kind for kind in ("findings", "things", "class")}
"""Topic of labels (`Teller.topic`) -> what is said or asked where a language has nothing for the topic."""


def inside(modality: str) -> str:
    """Return a modality as it stands inside a sentence: lower case unless it begins with an abbreviation.

    >>> inside("Electron microscopy"), inside("X-ray"), inside("MR")
    ('electron microscopy', 'X-ray', 'MR')
    """
    first = re.split(r"[\s-]", modality, maxsplit=1)[0]
    plain = len(first) > 1 and first[1:].islower()
    return modality[:1].lower() + modality[1:] if plain else modality


def capital(words: str) -> str:
    """Return words with a capital first letter."""
    return words[:1].upper() + words[1:]


_GRAMMAR: dict[str, Callable[[str], str]] = {
    "the": definite,
    "The": lambda words: capital(definite(words)),
    "Cap": capital,
    "a": with_article,
    "A": lambda words: capital(with_article(words)),
    "inside": inside,
    "some": indefinite,
}


class Word(str):
    """Words that a sentence can ask for in a grammatical form: ``{name:the}``."""

    __slots__ = ()

    def __format__(self, form: str) -> str:
        return _GRAMMAR[form](self) if form else str(self)


@dataclass(frozen=True, slots=True)
class Language:
    """What a language file holds; ``sentences`` by dotted key, a tuple if one of them is to be drawn.

    Args:
        translated: whether labels and terms are said by their names in this language.
        space, separator, last: between sentences, between items of a list, before the last one.
        places, extents: key of `coordinates.place_of` -> small and large places; ``part`` and ``parts`` make
            noun phrases of one and of several small ones.
        regions: one and several regions of a label whose boxes are ``things``, or parts of what is
            ``counted`` or is not (``mass``).
        image, images: what an image is called, of any modality and of some; ``described`` with its plane
            or ``views``, and with the part of the body that it is ``of``.
        planes, views, parts_of_body, sides: words for codes.
        organs: modality -> the organ that a side of the image is one of.
        measures: what stands between a number and what is counted -> kinds or entries of the lexicon.
        two: "2" before a measure.
    """

    translated: bool
    space: str
    separator: str
    last: str
    places: Mapping[str, str]
    part: str
    parts: str
    extents: Mapping[str, str]
    regions: Mapping[str, Sequence[str]]
    image: str
    images: Mapping[str, str]
    described: Mapping[str, str]
    planes: Mapping[str, str]
    views: Mapping[str, str]
    parts_of_body: Mapping[str, str]
    sides: Mapping[str, str]
    organs: Mapping[str, str]
    measures: Mapping[str, Sequence[str]]
    two: str
    sentences: Mapping[str, str | tuple[str, ...]]

    def can_name(self, label: str, context: SourceContext) -> bool:
        """Return whether a label has a name in this language."""
        return not self.translated or label in context.chinese

    def listed(self, words: Sequence[str]) -> str:
        """Return `one`, `one and two`, `one, two and three`."""
        if len(words) < 2:
            return words[0] if words else ""
        return f"{self.separator.join(words[:-1])}{self.last}{words[-1]}"

    def where(self, boxes: Sequence[Box], width: int, height: int) -> str:
        """Return where boxes lie: `the upper left and central parts of the image`."""
        keys = dict.fromkeys(place_of(box, width, height) for box in boxes)
        small = [self.places[key] for key in keys if key in self.places]
        if len(small) > 1 and self.parts:
            small = [self.parts.format(places=self.listed(small))]
        else:
            small = [self.part.format(places=place) for place in small]
        return self.listed([*small, *(self.extents[key] for key in keys if key in self.extents)])

    def measure(self, label: str) -> str:
        """Return the word between a number and a label."""
        found = noun(label)
        for names in ((found.singular, *label.split()[-1:]), (found.kind,)):
            for measure, of in self.measures.items():
                if not set(of).isdisjoint(names):
                    return measure
        return next(iter(self.measures), "")


@lru_cache
def language(code: str) -> Language:
    """Read a language file: ``en`` or ``zh``."""
    text = Path(__file__).with_name(f"{code}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    return Language(**values | {"sentences": dict(_flat(values["sentences"]))})


def _flat(values: Any, key: str = "") -> Iterator[tuple[str, str | tuple[str, ...]]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _flat(value, f"{key}.{name}" if key else name)
    else:
        yield key, tuple(values) if isinstance(values, list) else values


class Teller:
    """Says what a record holds, in the item's language and with the item's seed.

    ``known`` are labels of which all is annotated in this image: they may be counted, or denied.
    """

    __slots__ = ("context", "item", "known", "language", "record", "rng", "taxonomy")

    def __init__(self, task: Task, taxonomy: Taxonomy) -> None:
        self.item, self.record, self.context = task.item, task.record, task.context
        self.taxonomy, self.language = taxonomy, language(self.item.language)
        self.rng = Rng(self.item.seed)
        self.known = self.context.known_in(self.record)

    def say(self, key: str, **values: object) -> str:
        """Return a sentence; one of several wordings is drawn."""
        said = self.language.sentences[key]
        text = said if isinstance(said, str) else self.rng.pick(said)
        return text.format_map(values) if values else text

    def joined(self, *sentences: str) -> str:
        """Return sentences one after the other, without empty ones."""
        return self.language.space.join(filter(None, sentences))

    # Words

    def name(self, label: str) -> Word:
        return Word(self.context.chinese[label] if self.language.translated else spoken(label))

    def names(self, labels: Sequence[str]) -> Word:
        return Word(self.language.listed([self.name(label) for label in labels]))

    def modality(self) -> Word:
        return Word(self._term(self.record.modality))

    def department(self) -> str:
        return self._term(self.record.department)

    def image(self, *, subject: bool = True) -> Word:
        """Return what the image is called, with ``subject`` by its only label too: `MR image of the head`."""
        return Word(self._described(self.subject if subject else "")[0])

    def _described(self, subject: str) -> tuple[str, tuple[str, ...]]:
        """Return what the image is called, and the attributes that this says.

        A part of the body that is known goes before ``subject``, a label.
        """
        language, record = self.language, self.record
        given = record.attributes
        kind = language.images.get(record.modality) or language.image.format(
            modality=self.modality()
        )
        view = language.views.get(given.get("view", "").upper(), "")
        about = view or language.planes.get(str(record.provenance.part.get("axis")), "")
        said = ["view"] if view else []
        key, side = self._side()
        if found := self._part_of_body(self._body()):
            part, english = found
            said.append("body part")
            if side and noun(english).kind == "anatomy_of_many":
                said.append(key)
                side = side[:1] if len(part) == 1 else side  # 左眼, but 左侧股骨
                part = language.described["side"].format(side=side, part=part)
            of = part if language.translated else indefinite(part)
            return language.described["of"].format(about=about, kind=kind, part=of), tuple(said)
        if subject:
            of = self.name(subject)
            of = of if language.translated else Word(indefinite(of))
            return language.described["of"].format(about=about, kind=kind, part=of), tuple(said)
        return language.described["plain"].format(about=about, kind=kind), tuple(said)

    def _side(self) -> tuple[str, str]:
        """Return the attribute that says the side of the body, and the side's word; empty if not known."""
        given = self.record.attributes
        key = next((name for name in SIDE_KEYS if name in given), "")
        return key, self.language.sides.get(given.get(key, "").lower(), "")

    def _body(self) -> str:
        """Return the part of the body: the one given, or the one of a pair that the modality is of."""
        given = self.record.attributes.get("body part", "").lower()
        of_pair = self.language.organs.get(self.record.modality, "") if self._side()[1] else ""
        return given or of_pair

    def _part_of_body(self, text: str) -> tuple[str, str] | None:
        """Return a part of the body in this language and in English; None if it is not known."""
        own = self.language.parts_of_body.get(text.replace(" ", ""))
        english = language("en").parts_of_body.get(text.replace(" ", ""), text)
        if not own and not self.language.translated and text and noun(english).is_anatomy:
            own = english
        return (own, english) if own else None

    def place(self, box: Box) -> str:
        return self.language.where([box], self.record.width, self.record.height)

    def box(self, box: Box) -> str:
        return write_box(box, width=self.record.width, height=self.record.height)

    def _term(self, name: str) -> str:
        return (self.language.translated and self.taxonomy.terms(name).chinese) or name

    # Labels

    def focus(self) -> tuple[Label, Box]:
        """Return the region that the item is about."""
        assert self.item.focus is not None
        label = self.record.labels[self.item.focus]
        assert label.box is not None
        return label, label.box

    def whole(self) -> tuple[str, ...]:
        """Return the labels of the image as a whole, each once."""
        return tuple(dict.fromkeys(label.name for label in self.record.labels if label.box is None))

    def regions(self) -> dict[str, list[Box]]:
        """Return the boxes of each label."""
        found: dict[str, list[Box]] = {}
        for label in self.record.labels:
            if label.box is not None:
                found.setdefault(label.name, []).append(label.box)
        return found

    def counted(self, key: str, label: str, **values: object) -> str:
        """Say something of a label's regions.

        Three wordings stand under ``key``: ``one``, ``several``, and ``some`` if not all regions are known.
        """
        how = "one" if len(self.regions()[label]) == 1 else "several"
        # What a region shows says nothing of others; "where is it" asks for all of them.
        if label not in self.known and (how == "several" or key == "where"):
            how = "some"
        return self.say(f"{key}.{how}", **self.placeholders(label), **values)

    def placeholders(self, label: str) -> dict[str, object]:
        """Return the values for the placeholders of a sentence about a label's regions.

        A box of what can be counted is one of it, "nine red blood cells" (``things`` of `Language.regions`);
        a mask of it is a region (``counted``), and so is each box or mask of all else (``mass``).
        """
        found, of_label = noun(label), [one for one in self.record.labels if one.name == label]
        count = sum(one.box is not None for one in of_label)
        counts = found.counts and not found.is_one
        drawn = any(one.area is not None for one in of_label)
        how = "things" if counts and not drawn else "counted" if counts else "mass"
        name = self.name(label)
        # A lesion's mask may fall into pieces, a cell's doesn't.
        several = count > 1 and counts and (not drawn or found.kind == "cell")
        translated = self.language.translated
        single, some = (
            name if translated else Word(indefinite(name, several=more))
            for more in (False, several)
        )
        one = Word(unit(name))
        words = {"one": one, "many": plural_of(one) if how == "things" else name, "some": some}
        region, regions = (text.format(**words) for text in self.language.regions[how])
        if how == "counted" and count > 1 and not several and not translated:
            some, several = Word(regions), True  # of how many kidneys, or ribs, isn't known
        number: object = number_word(count)
        if translated:
            number = self.language.two if count == 2 else count
        return {
            "name": name,
            "some": some,
            "single": single,
            "be": "are" if several or (found.is_plural and not found.counts) else "is",
            "is": "are" if found.is_plural else "is",
            "count": Word(number),
            "region": Word(region),
            "regions": regions,
            "measure": self.language.measure(label if how == "things" else ""),
        }

    # Sentences

    @property
    def subject(self) -> str:
        """The label that is said by what the image is called; empty if there is none."""
        whole, part = self.whole(), self._body()
        alone = len(whole) == 1 and noun(whole[0]).is_anatomy and part in ("", whole[0].lower())
        return whole[0] if alone and (not part or self._part_of_body(part)) else ""

    def topic(self, labels: Sequence[str]) -> str:
        """Return what labels of an image as a whole are: ``nothing``, things, findings, view or class."""
        nouns = [noun(label) for label in labels]
        if len(labels) == 1 and says_nothing(labels[0]):
            return "nothing"
        if not ADJECTIVES.isdisjoint(label.lower().split()[-1] for label in labels):
            return "class"
        if all(found.is_thing for found in nouns):
            return "things"
        if all(found.kind == "view" for found in nouns):
            return "view"
        named = self.record.clinical_task in (None, "Disease Diagnosis")
        diagnosed = self.record.clinical_task == "Disease Diagnosis"
        are_named = ("finding", "condition") if named else ()
        if all(one.kind in are_named or (not one.kind and diagnosed) for one in nouns):
            return "findings"
        return "class"

    def what(self) -> str:
        """Say what kind of image it is."""
        return self.say("what", image=self.image())

    def classified(self, names: Sequence[str]) -> str:
        """Say labels of the image as a whole; empty without any."""
        if not names:
            return ""
        topic = self.topic(names)
        said = self.names(names) if topic == "class" else self.shown(names)
        if topic == "findings" and len(names) > 1:
            return self.say("classified.several", names=said)
        return self.by_topic("classified", topic, names=said)

    def by_topic(self, key: str, topic: str, **values: object) -> str:
        """Say what depends on what labels are, and of a class on the clinical task."""
        asked = [f"{key}.{name}" for name in (topic, KINDS[topic])]
        if topic == "class":
            asked.insert(0, f"{key}.{self.record.clinical_task}")
        return self.say(next(name for name in asked if name in self.language.sentences), **values)

    def shown(self, labels: Sequence[str]) -> Word:
        """Name labels as what an image shows: `the spleen, a kidney and platelets`."""
        return Word(
            self.language.listed([str(self.placeholders(label)["some"]) for label in labels])
        )

    def found(self, form: str) -> str:
        """Name all labels, in the words of a form."""
        regions = list(self.regions())
        whole = [name for name in self.whole() if name not in regions]
        listed = self.say(f"{form}.found", names=self.shown(regions)) if regions else ""
        return self.joined(self.classified(whole), listed)

    def located(self, label: str, boxes: Sequence[Box]) -> str:
        """Say how many regions a label has and where they lie."""
        size = self.record.width, self.record.height
        many = len({place_of(box, *size) for box in boxes}) > MAX_PLACES
        if label not in self.known:
            how = "some_many" if many else "some"
        else:
            how = "one" if len(boxes) == 1 else "many" if many else "several"
        places = self.language.where(boxes, *size)
        return self.say(f"located.{how}", **self.placeholders(label), places=places)

    def findings(self) -> str:
        """Say everything but what `what` has said."""
        regions, size = self.regions(), (self.record.width, self.record.height)
        whole = [name for name in self.whole() if name not in regions and name != self.subject]
        together: dict[tuple[str, str], list[str]] = {}
        for label, boxes in regions.items():
            first, *others = {place_of(box, *size) for box in boxes}
            alone = others or (len(boxes) > 1 and label in self.known)
            together.setdefault(("", label) if alone else ("at", first), []).append(label)
        said = []
        for first, *others in together.values():
            if not others:
                said.append(self.located(first, regions[first]))
                continue
            place = self.place(regions[first][0])
            names = self.shown((first, *others))
            said.append(self.say("located.together", names=names, places=place))
        return self.joined(self.classified(whole), *said)

    def attributes(self) -> list[str]:
        """Say the attributes of the image that neither its labels nor what it is called say."""
        own = {name.lower() for name in self.record.names}
        said = self._described("")[1]
        values = [
            (name, value)
            for name, value in self.record.attributes.items()
            if value.lower() not in own and name not in said
        ]
        return [self.attribute(name, value) for name, value in values[:MAX_ATTRIBUTES]]

    def attribute(self, name: str, value: str) -> str:
        """Say an attribute; yes or no is none of its values but a flag."""
        value = value.strip()
        if name in SIDE_KEYS:
            side = self.language.sides.get(value.lower())
            return self.say("attribute.side", side=side) if side else ""
        flag = value.lower() in ("yes", "no", "true", "false")
        key = f"attribute.{'flag' if flag else name if name == 'sex' else 'value'}"
        return self.say(key, attribute=Word(name), value=value)


def exchange(*pairs: tuple[str, str], image: bool = True) -> Conversation:
    """Return questions with their answers, the first of them on the image."""
    turns: list[Turn] = []
    for question, answer in pairs:
        mark = f"{IMAGE}\n" if image and not turns else ""
        turns += [Turn("human", f"{mark}{question}"), Turn("gpt", answer)]
    return tuple(turns)
