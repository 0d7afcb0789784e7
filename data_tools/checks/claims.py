# SPDX-License-Identifier: Apache-2.0

"""Does an answer say of the image what the expert's annotation says: labels, modality, side, boxes?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from data_tools.checks.terms import WORDS, Hit, Said, TermFinder, words_of
from data_tools.forms.coordinates import read_boxes, write_box
from data_tools.items import Item, Problem, SourceContext
from data_tools.lexicon import SIDE_KEYS, spoken
from data_tools.records import Label, Record
from data_tools.taxonomy import Taxonomy

# --- labels ---------------------------------------------------------------------------------------

_ADJECTIVES, _WHOLE = frozenset(WORDS["adjectives"]), frozenset(WORDS["whole"])
_NAMING = ("caption", "region_caption", "instruction", "dialogue", "text_single", "text_multi")


class LabelFinder:
    """Finds the labels of a set in all their names: vocabulary, synonyms, Chinese names."""

    def __init__(self, context: SourceContext) -> None:
        terms: dict[str, str] = {}
        for name in context.vocabulary:
            chinese = context.chinese.get(name)
            for other in (*context.synonyms.get(name, ()), *([chinese] if chinese else ())):
                terms.setdefault(other, name)
        terms.update((said, name) for name in context.vocabulary for said in (spoken(name), name))
        # The other side of a label is another label, whether or not the set has it.
        mirrored = {mirror(said): mirror(said) for said in terms if mirror(said) != said}
        terms = mirrored | terms
        self._finder = TermFinder(terms)
        self._words = {name: tuple(words_of(name)) for name in terms.values()}

    def find(self, what: Said) -> list[Hit]:
        """Return the labels of the set in what was said."""
        if what.chinese:
            return self._finder.find_chinese(what.text)
        return [hit for hit in self._finder.find(what.words) if self._is_claim(hit, what.words)]

    def covers(self, longer: str, shorter: str) -> bool:
        """Return whether naming ``longer`` names ``shorter`` as well, as "lung nodule" does "nodule"."""
        outer, inner = self._words[longer], self._words[shorter]
        return any(
            outer[at : at + len(inner)] == inner for at in range(len(outer) - len(inner) + 1)
        )

    @staticmethod
    def _is_claim(hit: Hit, words: list[str]) -> bool:
        if hit.end - hit.start > 1 or words[hit.start] not in _ADJECTIVES or hit.end >= len(words):
            return True
        following = words[hit.end]
        return following in _WHOLE or not following.isalnum()


def mirror(text: str) -> str:
    """Return a text with its sides exchanged."""
    words = [_OPPOSITE.get(word, word) for word in text.split(" ")]
    return " ".join(words).translate(_OPPOSITE_ZH)


_OPPOSITE = {"left": "right", "right": "left"}
_OPPOSITE_ZH = str.maketrans("左右", "右左")


def agreement(what: Said, item: Item, record: Record, finder: LabelFinder) -> Iterator[Problem]:
    """Yield problems with what an answer names.

    A form of sentences has to name a label of the record, that of its region if it is about one. No
    other label of the set may be claimed; a perceived "no" in `perception` is a denial and no claim.
    """
    own = set(record.names)
    wanted = {record.labels[item.focus].name} if item.focus is not None else own
    hits = finder.find(what)
    claimed = {hit.meaning for hit in hits if not hit.denied}
    if item.form in _NAMING and not (wanted & claimed):
        named = sorted(wanted)
        if wanted & {hit.meaning for hit in hits}:
            yield Problem("label denied", f"it denies {', '.join(named)}, which is there")
        else:
            yield Problem("label not named", f"it has to name {' or '.join(named)}")
    foreign = sorted(
        name
        # What was left out of the record is in the image all the same.
        for name in claimed - own - set(record.incomplete)
        if not any(finder.covers(label, name) for label in own)
    )
    if foreign:
        told = f"it claims {', '.join(foreign)}, which is not among the findings"
        yield Problem("another label claimed", told)


# --- modality -------------------------------------------------------------------------------------

_BESIDE = ("CT", "MR", "PET", "SPECT")
_AMBIGUOUS = frozenset(WORDS["ambiguous"])
_ELSEWHERE = (tuple(".!?\n;"), WORDS["elsewhere"]), (tuple("。；！？\n"), WORDS["elsewhere_zh"])


class ModalityFinder:
    """Finds the modalities of a taxonomy in all their names."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        terms: dict[str, str] = {}
        for name in taxonomy.names("modalities"):
            known = taxonomy.terms(name)
            for other in (name, *known.synonyms, known.chinese, *known.chinese_synonyms):
                if other and other.lower() not in _AMBIGUOUS:
                    terms.setdefault(other, name)
        for name in taxonomy.names("departments"):  # "Laboratory Medicine and Pathology" is none
            neutral = filter(None, (name, taxonomy.terms(name).chinese))
            terms = dict.fromkeys(neutral, "") | terms
        self._finder = TermFinder(terms)
        self.compatible = {
            name: {name, *WORDS["also"].get(name, ())} for name in taxonomy.names("modalities")
        }

    def claims(self, what: Said) -> Iterator[str]:
        """Yield the modalities that are said of the image itself."""
        said: str | list[str] = what.text if what.chinese else what.words
        find = self._finder.find_chinese if what.chinese else self._finder.find
        ends, elsewhere = _ELSEWHERE[what.chinese]
        for hit in find(said):  # type: ignore[arg-type]
            first = last = hit.start
            while first and said[first - 1] not in ends:
                first -= 1
            while last < len(said) and said[last] not in ends:
                last += 1
            here = not any(word in said[first:last] for word in elsewhere)
            if hit.meaning and not hit.denied and here:
                yield hit.meaning


def modality(what: Said, record: Record, finder: ModalityFinder) -> Iterator[Problem]:
    """Yield a claim of another modality than the record's that can't be another name for it."""
    compatible, claims = finder.compatible[record.modality], list(finder.claims(what))
    if record.modality in _BESIDE and record.modality not in claims:
        compatible = {record.modality}  # CT angiography is CT, and an angiography alone is none
    for claimed in claims:
        if claimed not in compatible:
            yield Problem("another modality claimed", f"it says {claimed}; it is {record.modality}")
            return


# --- side of the body -----------------------------------------------------------------------------

_SIDES = dict.fromkeys(("left", "l", "左", "左侧"), "left")
_SIDES |= dict.fromkeys(("right", "r", "右", "右侧"), "right")
_POSITION_BEFORE = frozenset(WORDS["position_before"])
_POSITION_BETWEEN = _POSITION_BEFORE.union(WORDS["position_between"])
_POSITION_ZH = re.compile(
    r"(?:图像|图片|画面|影像|视野|图中|图)的?[中最偏]?[上下]?[左右][上下]?[侧边方半部角]*|[左右][上下](?:[方角部]|象限)?|[上下中][左右]"
)


def side(what: Said, item: Item, record: Record, finder: LabelFinder) -> Iterator[Problem]:
    """Yield a side that isn't the annotation's, in an answer about a record with exactly one side.

    "The upper left of the image" is a position and says nothing of the body. Beside the right side, the wrong
    one counts where a clause says it of a label, of the patient or of the image: the other lung may be clear.
    """
    labels = record.labels if item.focus is None else (record.labels[item.focus],)
    known = {
        _SIDES[value.strip().lower()]
        for attributes in (record.attributes, *(label.attributes for label in labels))
        for key, value in attributes.items()
        if key in SIDE_KEYS and value.strip().lower() in _SIDES
    }
    if len(known) != 1:
        return
    (right_one,) = known
    wrong = _OPPOSITE[right_one]
    named = {mirror(name) for name in record.names if mirror(name) != name}
    every: set[str] = set()
    for clause in re.split(r"[.;!?\n。；！？，]", what.text):
        said = sides_of(clause)
        every |= said
        part = Said.of(clause, chinese=what.chinese)
        hits = {hit.meaning for hit in finder.find(part) if not hit.denied} - named
        if said == {wrong} and (hits or _OF_THE_IMAGE.search(part.plain)):
            yield Problem("side contradicted", f"it says {wrong}; it is {right_one}")
            return
    if every == {wrong}:
        yield Problem("side contradicted", f"it says {wrong}; it is {right_one}")


_OF_THE_IMAGE = re.compile(r"patient|image of|\b(radio|mammo|photo)gra(ph|m)\b|患者|图像$|片$")


def sides_of(text: str) -> set[str]:
    """Return the sides of the body that a text names."""
    words = words_of(text)
    found = {word for at, word in enumerate(words) if word in _OPPOSITE and _is_body(words, at)}
    plain_zh = "" if text.isascii() else _POSITION_ZH.sub("", text)
    return found | {side for sign, side in (("左", "left"), ("右", "right")) if sign in plain_zh}


def _is_body(words: list[str], at: int) -> bool:
    """Return whether the word at an index names a side of the body."""
    if at and (words[at - 1] in _POSITION_BEFORE or words[at - 2 : at] == ["to", "the"]):
        return False
    for word in words[at + 1 : at + 9]:
        if word.removesuffix("s") in WORDS["image"]:
            return False
        if word not in _POSITION_BETWEEN:
            break
    return True


# --- coordinates ----------------------------------------------------------------------------------


def boxes(what: Said, item: Item, record: Record) -> Iterator[Problem]:
    """Yield four numbers in brackets that are no box, or no box of the record (or of the item's region)."""
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
