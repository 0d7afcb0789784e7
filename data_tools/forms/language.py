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

from data_tools.forms.coordinates import thirds, write_box
from data_tools.items import IMAGE, Item, SourceContext, Turn
from data_tools.lexicon import noun, number_word, plural_of, says_nothing, with_article
from data_tools.records import Box, Label, Record
from data_tools.taxonomy import Taxonomy
from gmai_xtuner.core.rng import Rng

MAX_ATTRIBUTES = 3
"""Attributes that a caption names; more would be a table."""
MAX_PLACES = 3
"""Regions of one label whose places are named one by one."""

_DETERMINERS = frozenset(("the", "a", "an", "no", "any", "this", "other", "unspecified"))


def definite(words: str) -> str:
    """Put `the` before the name of a region, unless it has a determiner of its own."""
    first = words.split(" ", 1)[0].lower()
    return words if first in _DETERMINERS else f"the {words}"


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
}


class Word(str):
    """Words that a sentence can ask for in a grammatical form: ``{name:the}``."""

    __slots__ = ()

    def __format__(self, form: str) -> str:
        return _GRAMMAR[form](self) if form else str(self)


@dataclass(frozen=True, slots=True)
class Language:
    """What a language file holds; ``sentences`` by dotted key, a tuple if one of them is to be drawn.

    ``measures`` are the words between a number and what is counted, by the kinds of `lexicon.Noun`.
    """

    translated: bool
    space: str
    separator: str
    last: str
    places: Sequence[Sequence[str]]
    image: str
    images: Mapping[str, str]
    measures: Mapping[str, str]
    sentences: Mapping[str, str | tuple[str, ...]]

    def can_name(self, label: str, context: SourceContext) -> bool:
        """Return whether a label has a name in this language."""
        return not self.translated or label in context.chinese

    def listed(self, words: Sequence[str]) -> str:
        """Return `one`, `one and two`, `one, two and three`."""
        if len(words) < 2:
            return words[0] if words else ""
        return f"{self.separator.join(words[:-1])}{self.last}{words[-1]}"

    def place(self, box: Box, width: int, height: int) -> str:
        """Return where a box lies: `the upper left part of the image`."""
        across, down = thirds(box, width, height)
        return self.places[down][across]


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

    Args:
        item: gives language, focus and seed.
        record, context, taxonomy: what is known and what it is called.
    """

    __slots__ = ("context", "item", "known", "language", "record", "rng", "taxonomy")

    def __init__(
        self, item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy
    ) -> None:
        self.item, self.record, self.context, self.taxonomy = item, record, context, taxonomy
        self.language = language(item.language)
        self.rng = Rng(item.seed)
        self.known = context.known_in(record)

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
        return Word(self.context.chinese[label] if self.language.translated else label)

    def names(self, labels: Sequence[str]) -> str:
        if self.language.translated:
            labels = [self.context.chinese[label] for label in labels]
        return self.language.listed(labels)

    def modality(self) -> Word:
        return Word(self._term(self.record.modality))

    def department(self) -> str:
        return self._term(self.record.department)

    def image(self) -> Word:
        """Return what an image of the modality is called: `CT image`, `mammogram`."""
        language = self.language
        own = language.images.get(self.record.modality)
        return Word(own or language.image.format(modality=self.modality()))

    def place(self, box: Box) -> str:
        return self.language.place(box, self.record.width, self.record.height)

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
        if label not in self.known:
            return self.say(f"{key}.some", **self.things(label), **values)
        how = "one" if len(self.regions()[label]) == 1 else "several"
        return self.say(f"{key}.{how}", **self.things(label), **values)

    def things(self, label: str) -> dict[str, object]:
        """Return the fields of a sentence about a label's regions.

        Boxes of things that count are those things, "nine red blood cells"; all else has regions.
        """
        name, of_label = noun(label), [one for one in self.record.labels if one.name == label]
        count = sum(one.box is not None for one in of_label)
        if name.counts and all(one.area is None for one in of_label):
            region, regions = label, plural_of(label)
        else:
            region, regions = f"region of {label}", f"regions of {label}"
        translated = self.language.translated
        return {
            "name": self.name(label),
            "count": Word(count if translated else number_word(count)),
            "region": Word(region),
            "regions": regions,
            "measure": self.language.measures.get(name.kind, ""),
        }

    # Sentences

    def what(self) -> str:
        """Say what kind of image it is."""
        return self.say("what", image=self.image())

    def classified(self) -> str:
        """Name the labels of the image as a whole; empty without any."""
        names = self.whole()
        if not names:
            return ""
        how = "several" if len(names) > 1 else "nothing" if says_nothing(names[0]) else "one"
        if all(noun(name).is_anatomy for name in names):
            return self.say("classified.anatomy", names=Word(self.shown(names)))
        return self.say(f"classified.{how}", names=self.names(names))

    def shown(self, labels: Sequence[str]) -> str:
        """Name labels as what an image shows: organs with their article."""
        if self.language.translated:
            return self.names(labels)
        return self.language.listed([
            definite(name) if noun(name).is_anatomy else name for name in labels
        ])  # fmt: skip

    def found(self, form: str) -> str:
        """List all labels in the words of a form."""
        names = self.record.names
        how = "nothing" if len(names) == 1 and says_nothing(names[0]) else "some"
        return self.say(f"{form}.found.{how}", names=self.shown(names))

    def located(self, label: str, boxes: Sequence[Box]) -> str:
        """Say how many regions a label has and where they lie."""
        places = list(dict.fromkeys(map(self.place, boxes)))
        many = len(places) > MAX_PLACES
        if label not in self.known:
            how = "some_many" if many else "some"
        else:
            how = "one" if len(boxes) == 1 else "many" if many else "several"
        return self.say(
            f"located.{how}",
            **self.things(label),
            places=self.language.listed(places),
        )

    def findings(self) -> str:
        """Say everything but what kind of image it is."""
        regions = self.regions().items()
        return self.joined(self.classified(), *(self.located(*region) for region in regions))

    def attributes(self) -> list[str]:
        """Say the attributes of the image that are not among its labels."""
        own = {name.lower() for name in self.record.names}
        values = [(n, v) for n, v in self.record.attributes.items() if v.lower() not in own]
        return [self.attribute(name, value) for name, value in values[:MAX_ATTRIBUTES]]

    def attribute(self, name: str, value: str) -> str:
        """Say an attribute; yes or no is none of its values but a flag."""
        flag = value.strip().lower() in ("yes", "no", "true", "false")
        return self.say(
            f"attribute.{'flag' if flag else 'value'}", attribute=Word(name), value=value
        )


def about_image(question: str, answer: str) -> tuple[Turn, Turn]:
    """Return a question on the image with its answer."""
    return Turn("human", f"{IMAGE}\n{question}"), Turn("gpt", answer)


def without_image(question: str, answer: str) -> tuple[Turn, Turn]:
    """Return a further question, or one without an image."""
    return Turn("human", question), Turn("gpt", answer)
