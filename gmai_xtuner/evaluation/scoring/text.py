"""Answer text -> what is compared: without markup, as words, and where one text stands in another."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_THOUGHTS = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\$?\\boxed\{(?:\\text\{)?([^{}]*)\}?\}\$?")
_EMPHASIS = re.compile(r"\*\*|__|`|^#+\s*|^>\s*", re.MULTILINE)

# A number keeps its point, comma and minus; a word its apostrophe and inner hyphen; a Chinese sign is a word.
_WORD = re.compile(
    r"(?<![\w.])-?\d+(?:,\d{3})+(?:\.\d+)?(?![\w])"
    r"|(?<![\w.])-?\d+(?:\.\d+)?(?![\w])"
    r"|[㐀-鿿豈-﫿]"
    r"|[^\W㐀-鿿豈-﫿_]+(?:['-][^\W㐀-鿿豈-﫿_]+)*"
    r"|%"
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}

_NEGATIONS = frozenset(
    {
        "no", "not", "never", "without", "isn't", "aren't", "wasn't", "weren't", "doesn't", "don't", "didn't",
        "cannot", "can't", "neither", "nor", "excluding", "excludes", "excluded", "except", "unlikely", "isnt",
        "doesnt", "dont", "cant",
    }
)  # fmt: skip
_NEGATING_PHRASES = (
    ("rather", "than"),
    ("instead", "of"),
    ("rule", "out"),
    ("rules", "out"),
    ("ruled", "out"),
)
_CHINESE_NEGATIONS = frozenset("不没非无未否")
_BREAKS = re.compile(r"[.;:!?。；：！？\n]|,\s*(?:but|and|it|this|there)\b|，")
_REACH = 4
"""A negation reaches so many words ahead in its own part of a sentence: "is not a type of liver"."""


def clean(answer: str) -> str:
    """An answer without thoughts, tags, boxes and emphasis; full-width letters as plain ones."""
    text = unicodedata.normalize("NFKC", answer)
    text = _THOUGHTS.sub("", text)
    if tagged := _ANSWER_TAG.findall(text):
        text = tagged[-1]
    text = _BOXED.sub(r"\1", text)
    return _EMPHASIS.sub("", text).strip()


def words(text: str) -> tuple[str, ...]:
    """Words in lower case. "T2" is one, "2.5" is one, each Chinese sign is one; 1,000 is 1000 and 2.0 is 2."""
    return tuple(
        _plain_number(match[0])
        for match in _WORD.finditer(unicodedata.normalize("NFKC", text).lower())
    )


def normalised(text: str) -> tuple[str, ...]:
    """Words without articles, number words as digits; where only articles stand they stay ("A" is an answer)."""
    found = tuple(NUMBER_WORDS.get(word, word) for word in words(text))
    return tuple(word for word in found if word not in _ARTICLES) or found


def find(needle: Sequence[str], haystack: Sequence[str]) -> list[int]:
    """Where a sequence of words begins in another, every time."""
    if not needle:
        return []
    length = len(needle)
    needle = tuple(needle)
    return [
        start
        for start in range(len(haystack) - length + 1)
        if tuple(haystack[start : start + length]) == needle
    ]


class Mentions:
    """An answer's words, and which of them stand under a negation.

    Args:
        text: the answer, cleaned.
    """

    def __init__(self, text: str) -> None:
        self.words: list[str] = []
        self.negated: list[bool] = []
        for part in _BREAKS.split(text):
            found = [NUMBER_WORDS.get(word, word) for word in words(part)]
            self.words += found
            self.negated += _negated(found)
            # nothing matches across the end of a part
            self.words.append("\n")
            self.negated.append(False)

    def of(self, needle: Sequence[str]) -> list[tuple[int, int, bool]]:
        """(start, end, negated) of every time that the words stand in the answer; Chinese ones as a whole word."""
        needle = tuple(needle)
        return [
            (start, start + len(needle), self.negated[start])
            for start in find(needle, self.words)
            if self._whole(start, start + len(needle))
        ]

    def _whole(self, start: int, end: int) -> bool:
        """Chinese has no spaces: a term must not go on in a neighbouring sign, but for the small words."""
        before = self.words[start - 1] if start else "\n"
        after = self.words[end] if end < len(self.words) else "\n"
        left = not (_is_chinese(self.words[start]) and _is_chinese(before)) or before in _BEFORE
        right = not (_is_chinese(self.words[end - 1]) and _is_chinese(after)) or after in _AFTER
        return left and right


_BEFORE = frozenset("是为在有选和或与不没非无的了")
_AFTER = frozenset("的了吗吧呢和或与是在里中上内")


def _negated(found: Sequence[str]) -> list[bool]:
    """Which words of one part of a sentence a negation reaches."""
    under = [False] * len(found)
    for place, word in enumerate(found):
        end = place + 1
        if any(tuple(found[place : place + 2]) == phrase for phrase in _NEGATING_PHRASES):
            end = place + 2
        elif word not in _NEGATIONS and word not in _CHINESE_NEGATIONS:
            continue
        for reached in range(end, min(end + _REACH, len(found))):
            under[reached] = True
    return under


def _is_chinese(word: str) -> bool:
    return len(word) == 1 and "㐀" <= word <= "﫿"


def _plain_number(word: str) -> str:
    plain = word.replace(",", "")
    if _NUMBER.fullmatch(plain):
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    return word
