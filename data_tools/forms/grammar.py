"""Words around labels: articles, lists, counts, places; English and Chinese.

Labels come from anywhere and may be nouns that count (`platelet`), nouns that don't (`edema`), organs
(`spleen`), adjectives (`normal`) or codes. So sentences put them where all of these are right: `classified as
normal`, `3 regions of edema`, `the spleen is visible`, `is any platelet present`. A region is of a thing,
never of an adjective, so that it can take an article.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from data_tools.records import Box

# Modality -> what a picture of it is called; any other is "<name> image".
_PICTURES = {
    "Pathology": "histopathology image",
    "Microscopy": "light microscopy image",
    "Electron microscopy": "electron micrograph",
    "Dermoscopy": "dermoscopic image",
    "Endoscopy": "endoscopic image",
    "Fundus photography": "fundus photograph",
    "Ultrasound": "ultrasound image",
    "Mammography": "mammogram",
    "Clinical photography": "clinical photograph",
    "Fluorescein angiography": "fluorescein angiography image",
}
_VOWELS_OF_LETTERS = frozenset("AEFHILMNORSX")
_CONSONANTS_THAT_LOOK_LIKE_VOWELS = ("uni", "uter", "ure", "uri", "eu", "one", "use")
_DETERMINERS = frozenset(("the", "a", "an", "no", "any", "this", "other", "unspecified"))
_DOWN = ("upper", "", "lower")
_ACROSS = ("left", "middle", "right")
_PLACES_ZH = (("左上部", "上部", "右上部"), ("左侧", "中央", "右侧"), ("左下部", "下部", "右下部"))


def with_article(words: str) -> str:
    """`a` or `an` before words, by sound: an MR image, an X-ray, a uterus, an ulcer."""
    first = words.split(" ", 1)[0].split("-", 1)[0]
    if first.isupper():
        vowel = first[0] in _VOWELS_OF_LETTERS
    else:
        lower = first.lower()
        vowel = lower[:1] in "aeiou" and not lower.startswith(_CONSONANTS_THAT_LOOK_LIKE_VOWELS)
    return f"{'an' if vowel else 'a'} {words}"


def definite(words: str) -> str:
    """`the` before the name of a region; not before one that has a determiner of its own."""
    first = words.split(" ", 1)[0].lower()
    return words if first in _DETERMINERS else f"the {words}"


def denies(words: str) -> bool:
    """Whether a label says that there is nothing, as `no finding` does: it is no finding itself."""
    return words.split(" ", 1)[0].lower() in ("no", "without")


def within(modality: str) -> str:
    """A modality inside a sentence: lower case unless its first word is an abbreviation.

    >>> within("Electron microscopy"), within("X-ray"), within("MR")
    ('electron microscopy', 'X-ray', 'MR')
    """
    first = re.split(r"[\s-]", modality, maxsplit=1)[0]
    plain = len(first) > 1 and first[1:].islower()
    return modality[:1].lower() + modality[1:] if plain else modality


def attribute(name: str, value: str) -> str:
    """A sentence on an attribute; a yes or no is none of its values."""
    if value.strip().lower() in ("yes", "no", "true", "false"):
        return f"{name[:1].upper()}{name[1:]}: {value}."
    return f"The {name} is {value}."


def listed(words: Sequence[str]) -> str:
    """One, `one and two`, `one, two and three`."""
    if len(words) < 2:
        return words[0] if words else ""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def sentence(words: str) -> str:
    """With a capital first letter, unless the first word has capitals of its own, and a full stop."""
    return f"{words[:1].upper()}{words[1:]}."


def picture_of(modality: str) -> str:
    """What a picture of a modality is called in English."""
    return _PICTURES.get(modality) or f"{within(modality)} image"


def thirds(box: Box, width: int, height: int) -> tuple[int, int]:
    """In which third across and down the centre of a box lies, 0 to 2."""
    across = (box[0] + box[2]) * 3 // (2 * width)
    down = (box[1] + box[3]) * 3 // (2 * height)
    return min(across, 2), min(down, 2)


def place(box: Box, width: int, height: int) -> str:
    """Where a box lies in the picture. Of the picture, never of the body: sides may be mirrored."""
    across, down = thirds(box, width, height)
    if across == 1 and down == 1:
        return "the centre of the picture"
    row = _DOWN[down]
    return f"the {row + ' ' if row else ''}{_ACROSS[across]} part of the picture"


def place_zh(box: Box, width: int, height: int) -> str:
    """`place` in Chinese."""
    across, down = thirds(box, width, height)
    return f"图像{_PLACES_ZH[down][across]}"
