# SPDX-License-Identifier: Apache-2.0

"""What kind of thing a label names, and which labels say that there is nothing.

The words are data, ``lexicon.yaml``; their numbers (vertebra, vertebrae) are those of the library inflect.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import inflect
import yaml

from data_tools.records import ANYTHING

DENIALS = ("no", "without")
NORMAL = frozenset(("normal", "healthy", "unremarkable", "negative"))
"""Labels that say of an image as a whole that nothing is wrong in it."""
_ANY_FINDING = frozenset((
    "finding", "abnormality", "abnormalitie", "anomaly", "disease", "pathology", "lesion", "change",
    "abnormal finding", "significant finding", "acute finding", "abnormality detected"
))  # fmt: skip
_ENGLISH = inflect.engine()
_SINGULAR_ENDS = ("ss", "us", "is", "as", "ascites")
"""Of words that inflect takes for plurals: uterus, pelvis, pancreas."""


@dataclass(frozen=True, slots=True)
class Noun:
    """What is known of a label's words.

    Args:
        kind: ``anatomy``, ``anatomy_of_many``, ``cell``, ``organism``, ``instrument``, ``finding`` (one that
            counts), ``view``, or "" for all else.
        is_plural: whether the label itself is a plural, such as "vertebrae".
    """

    kind: str
    is_plural: bool

    @property
    def is_anatomy(self) -> bool:
        return self.kind.startswith("anatomy")

    @property
    def counts(self) -> bool:
        """Whether there can be two of it."""
        return self.kind not in ("", "anatomy", "view") and not self.is_plural


@cache
def _entries() -> dict[tuple[str, ...], Noun]:
    """Return the words of each entry, in both numbers, with what they are."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for singular, plural in content["plurals"].items():
        _ENGLISH.defnoun(singular, plural)
    found: dict[tuple[str, ...], Noun] = {}
    for kind, rows in content["kinds"].items():
        for name in (name for row in rows for name in (row if isinstance(row, list) else [row])):
            found[tuple(plural_of(name).split())] = Noun(kind, True)
            found[tuple(name.split())] = Noun(kind, name in ("forceps", "scissors"))
    return found


@lru_cache(maxsize=4096)
def noun(label: str) -> Noun:
    """Return what kind of thing a label is: by its last words, or by those before ``of``.

    >>> noun("head of the pancreas").kind, noun("left vertebrae").is_plural, noun("pneumonia").kind
    ('anatomy', True, '')
    """
    words = label.lower().replace("_", " ").split()
    if "of" in words[1:]:
        words = words[: words.index("of", 1)]
    while len(words) > 1 and (
        words[-1] in ("left", "right") or any(c.isdigit() for c in words[-1])
    ):
        words.pop()  # "kidney left", "vertebra L1"
    entries = _entries()
    for length in (3, 2, 1):
        if found := entries.get(tuple(words[-length:])):
            return found
    last = words[-1] if words else ""
    singular = _ENGLISH.singular_noun(last) if last.isalpha() else False
    return Noun("", last == f"{singular}s" and not last.endswith(_SINGULAR_ENDS))


def plural_of(name: str) -> str:
    """Return the plural of a singular noun, its last word inflected."""
    return str(_ENGLISH.plural_noun(name))


def with_article(words: str) -> str:
    """Put `a` or `an` before words, by sound: an MR image, an X-ray, a uterus, an ulcer."""
    return str(_ENGLISH.a(words))


def number_word(number: int) -> str:
    """Return `two` ... `ten`, and figures from there."""
    return str(_ENGLISH.number_to_words(str(number), threshold=10))


def says_nothing(label: str) -> bool:
    """Return whether a label says that there is nothing, as `no finding` does."""
    return label.split(" ", 1)[0].lower() in DENIALS


def contradicts(label: str, other: str) -> bool:
    """Return whether a label of the image as a whole can't be true beside another one.

    "No finding" denies all, "no nodule" nodules, "normal" every finding; `ANYTHING` is whatever is unknown.
    """
    words, others = label.lower().split(), other.lower().split()
    if words[0] in DENIALS:
        denied = " ".join(words[1:]).removesuffix("s")
        if denied in _ANY_FINDING or not denied:
            return not says_nothing(other) and other.lower() not in NORMAL
        return other == ANYTHING or (others[0] not in DENIALS and denied in other.lower())
    if label.lower() not in NORMAL or says_nothing(other) or others[0] in NORMAL:
        return False
    return other == ANYTHING or not (noun(other).is_anatomy or noun(other).kind in ("cell", "view"))
