# SPDX-License-Identifier: Apache-2.0

"""What kind of thing a label names, and which labels say that there is nothing.

The words are data, ``lexicon.yaml``; their numbers (vertebra, vertebrae) are those of the library inflect.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import chain, permutations
from pathlib import Path

import typeguard
import yaml

from data_tools.records import ANYTHING

_typechecked, typeguard.typechecked = typeguard.typechecked, lambda method: method  # type: ignore[assignment]
import inflect  # noqa: E402 - it would have each of its methods compiled anew with checks, for 1.4 s a process

typeguard.typechecked = _typechecked

DENIALS = ("no", "without")
SIDES = ("left", "right")
_ONES = frozenset((*SIDES, "first", "second", "third", "fourth", "fifth"))
_DETERMINERS = frozenset(("the", "a", "an", "no", "any", "this", "other", "unspecified"))
_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NORMAL = frozenset(_WORDS["normal"])
"""Labels that say of an image as a whole that nothing is wrong in it."""
ADJECTIVES = NORMAL.union(_WORDS["adjectives"])
"""Labels that are no nouns: an image is classified as one, and doesn't show one."""
SIDE_KEYS = ("side", "laterality")
"""Attributes whose value is a side of the body."""
_ALTERED, _PAIRS = frozenset(_WORDS["altered"]), frozenset(_WORDS["pairs"])
_ENGLISH = inflect.engine()
for _singular, _plural in _WORDS["plurals"].items():
    _ENGLISH.defnoun(_singular, _plural)
_SIGNS = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # each may be a word
_A_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")
_SINGULAR_ENDS = ("ss", "us", "is", "as", "ascites")
"""Of words that inflect takes for plurals: uterus, pelvis, pancreas."""


@dataclass(frozen=True, slots=True)
class Noun:
    """What is known of a label's words.

    ``kind`` is ``anatomy``, ``anatomy_of_many``, ``anatomy_mass``, ``cell``, ``organism``, ``instrument``,
    ``finding`` (one that counts), ``condition`` (one at most), ``view``, or "" for all else. ``singular``
    is the entry of ``lexicon.yaml``, if any. ``is_one``: there is one of it at most, as its words hold a side
    or a number ("left kidney").
    """

    kind: str
    is_plural: bool
    singular: str = ""
    is_one: bool = False

    @property
    def is_anatomy(self) -> bool:
        return self.kind.startswith("anatomy")

    @property
    def is_thing(self) -> bool:
        """Whether it is something that is shown, and no finding: an organ, a cell, an instrument."""
        return self.is_anatomy or self.kind in ("cell", "organism", "instrument")

    @property
    def counts(self) -> bool:
        """Whether there can be two of it."""
        single = not self.is_plural or self.singular in _PAIRS
        return single and self.kind not in ("", "anatomy", "anatomy_mass", "condition", "view")


@cache
def _entries() -> dict[tuple[str, ...], Noun]:
    """Return the words of each entry, in both numbers, with what they are."""
    found: dict[tuple[str, ...], Noun] = {}
    for kind, rows in _WORDS["kinds"].items():
        for name in (name for row in rows for name in (row if isinstance(row, list) else [row])):
            found[tuple(plural_of(name).split())] = Noun(kind, True, name)
            plural = name in _WORDS["always_plural"] or name in _PAIRS
            found[tuple(name.split())] = Noun(kind, plural, name)
    return found


@lru_cache(maxsize=4096)
def noun(label: str) -> Noun:
    """Return what kind of thing a label is: by its last words, or by those before ``of``.

    >>> noun("head of the pancreas").kind, noun("left vertebrae").is_plural, noun("pneumonia").kind
    ('anatomy', True, '')
    """
    words = spoken(label).lower().split()
    if "of" in words[1:]:
        words = words[: words.index("of", 1)]
    is_one = not _ONES.isdisjoint(words) or any(map(_has_digit, words))
    is_numbered = len(words) > 1 and _has_digit(words[-1])
    while len(words) > 1 and (words[-1] in SIDES or _has_digit(words[-1])):
        words.pop()  # "rib 9"
    entries = _entries()
    for length in (3, 2, 1):
        if found := entries.get(tuple(words[-length:])):
            if found.is_anatomy and len(words) > length and words[0] in _ALTERED:
                one = is_one or found.kind != "anatomy_of_many"
                return replace(found, kind="finding", is_one=one)
            return replace(found, is_one=is_one if found.is_anatomy else is_numbered)
    last = words[-1] if words else ""
    singular = _ENGLISH.singular_noun(last) if last.isalpha() else False
    return Noun("", last == f"{singular}s" and not last.endswith(_SINGULAR_ENDS))


def spoken(label: str) -> str:
    """Return a label as one says it.

    >>> spoken("kidney_left"), spoken("rib_left_9"), spoken("vertebrae_L1")
    ('left kidney', 'left rib 9', 'L1 vertebra')
    """
    words = label.replace("_", " ").split()
    code = [words.pop()] if len(words) > 1 and _has_digit(words[-1]) else []
    if len(words) > 1 and words[-1].lower() in SIDES:
        words.insert(0, words.pop().lower())
    if code and code[0][0].isalpha() and words[-1].lower() in ("vertebra", "vertebrae"):
        return " ".join((*words[:-1], *code, "vertebra"))
    return " ".join(words + code)


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def unit(name: str) -> str:
    """Return what one of a thing is: a pair of forceps."""
    return f"pair of {name}" if noun(name).singular in _PAIRS else name


def definite(words: str) -> str:
    """Put `the` before words, unless they have a determiner of their own."""
    return words if words.split(" ", 1)[0].lower() in _DETERMINERS else f"the {words}"


@lru_cache(maxsize=4096)
def indefinite(label: str, *, several: bool = False) -> str:
    """Return what an image shows, as it is spoken, in a form that says no more than the label.

    With ``several``, two or more of it, a noun that counts has its plural.

    >>> [indefinite(label) for label in ("spleen", "kidney", "left kidney", "platelet", "edema")]
    ['the spleen', 'a kidney', 'the left kidney', 'a platelet', 'edema']
    """
    found = noun(label)
    first = label.split(" ", 1)[0].lower()
    if first in _DETERMINERS or found.kind == "anatomy_mass":
        return label
    if found.is_anatomy and (found.is_plural or found.is_one or found.kind == "anatomy"):
        return with_article(label) if first in NORMAL else f"the {label}"
    if not found.counts:
        return with_article(label) if found.kind == "view" and not found.is_plural else label
    label = unit(label)
    return plural_of(label) if several and not found.is_one else with_article(label)


@lru_cache(maxsize=4096)
def plural_of(name: str) -> str:
    """Return the plural of a singular noun, its last word inflected."""
    *before, last = name.split(" ")
    if "of" in before:
        return str(_ENGLISH.plural_noun(name))
    return " ".join((*before, str(_ENGLISH.plural_noun(last))))


@lru_cache(maxsize=4096)
def with_article(words: str) -> str:
    """Put `a` or `an` before words, by sound: an MR image, an X-ray, a uterus, an ulcer."""
    return str(_ENGLISH.a(words))


@lru_cache(maxsize=4096)
def number_word(number: int) -> str:
    """Return `two` ... `ten`, and figures from there."""
    return str(_ENGLISH.number_to_words(str(number), threshold=10))


@lru_cache(maxsize=2**15)
def words_of(label: str) -> frozenset[str]:
    """Return the words of a label in the singular, of Chinese and the like each sign.

    One that has all the words of another may be a part of it, or a kind of it: ``kidney_left`` and "kidneys".
    """
    words = _A_WORD.findall(label.lower())
    return frozenset(_ENGLISH.singular_noun(word) or word for word in words)


@lru_cache(maxsize=64)
def kinds_among(labels: tuple[str, ...]) -> dict[str, frozenset[str]]:
    """Return the labels of which others are kinds, or other spellings, with these: polyp, adenomatous polyp.

    A kind has all of its words and the same last one, so that a kidney tumour is no kidney.
    """
    found: dict[str, set[str]] = {}
    words = {label: words_of(label) for label in labels}
    heads = {label: _head(label) for label in labels}
    by_head: dict[frozenset[str], list[str]] = {}
    for label, head in heads.items():
        by_head.setdefault(words_of(" ".join(head)), []).append(label)
    for label, other in chain.from_iterable(permutations(each, 2) for each in by_head.values()):
        if words[other] >= words[label]:
            found.setdefault(label, set()).add(other)
    return {label: frozenset(others) for label, others in found.items()}


def _head(label: str) -> list[str]:
    """Return the last word of a label before a number: a tooth 38 is a tooth."""
    words = spoken(label.split(",")[0]).lower().split()
    while len(words) > 1 and _has_digit(words[-1]):
        words.pop()
    return _A_WORD.findall(" ".join(words))[-1:]


def says_nothing(label: str) -> bool:
    """Return whether a label says that there is nothing, as `no finding` does; "no" alone is a class."""
    words = label.replace("_", " ").lower().split()
    return len(words) > 1 and words[0] in DENIALS


def _denied(label: str) -> str | None:
    """Return what a label denies, "" if it is everything; None if it denies nothing."""
    plain = re.sub(r"[\W_]+", " ", label.lower()).strip()
    found = next(filter(None, (re.fullmatch(each, plain) for each in _WORDS["denials"])), None)
    return None if found is None else found[1].strip().removesuffix("s")


def bounds_nothing(label: str) -> bool:
    """Return whether there is no region that a label can name, as of "no finding" and "normal"."""
    return bool(_denied(label)) or label.lower() in NORMAL.union(_WORDS["normal_signs"])


def is_normal(label: str) -> bool:
    """Return whether a label says of an image, or of what it shows, that nothing is wrong: "normal chest"."""
    first, *others = re.split(r"[\W_]+", label.lower())
    rest = " ".join(others)
    of_it = not rest or noun(rest).is_anatomy or others[-1] in _WORDS["examinations"]
    return (first in NORMAL and of_it) or label.lower().startswith(tuple(_WORDS["normal_signs"]))


def contradicts(label: str, other: str) -> bool:
    """Return whether a label of the image as a whole can't be true beside another one.

    "No finding" denies all, "no nodule" nodules, "normal" every finding; `ANYTHING` is whatever is unknown.
    """
    denied, others = _denied(label), _denied(other)
    if denied is not None:
        if not denied or denied in _WORDS["any_finding"]:
            return others is None and not is_normal(other)
        plain = re.sub(r"[\W_]+", " ", other.lower())
        return other == ANYTHING or (others is None and denied in plain)
    if not is_normal(label) or others is not None or is_normal(other):
        return False
    return other == ANYTHING or not (noun(other).is_anatomy or noun(other).kind in ("cell", "view"))
