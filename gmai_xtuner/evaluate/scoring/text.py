"""Answer text -> what is compared: plain text, words, where words are mentioned, and yes or no."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_THOUGHTS = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_UNFINISHED = re.compile(r"<think(?:ing)?>.*$", re.DOTALL | re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\$?\\boxed\{(?:\\text\{)?([^{}]*)\}?\}\$?")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|‘[^‘’]*’|“[^“”]*”|「[^「」]*」")
_EMPHASIS = re.compile(r"\*\*|__|`|^#+\s*|^>\s*", re.MULTILINE)

_CHINESE = "㐀-鿿豈-﫿"
# A number keeps its point, comma, minus and what is written onto it (2.5e3, 3mm); a word its apostrophe and
# inner hyphen; a Chinese sign is a word.
_WORD = re.compile(
    rf"(?<![\w.])-?\d+(?:,\d{{3}})+(?:\.\d+)?(?!\w)|(?<![\w.])-?\d+(?:\.\d+)?[^\W_{_CHINESE}]*|[{_CHINESE}]"
    rf"|[^\W_{_CHINESE}]+(?:['-][^\W_{_CHINESE}]+)*|%"
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
        "cannot", "can't", "neither", "nor", "excluding", "excludes", "excluded", "except", "unlikely",
        "isnt", "doesnt", "dont", "cant",
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
_BREAKS = re.compile(
    r"\.(?!\d)|[;:!?。\n]|\b(?:but|however|although)\b"
    r"|,\s*(?:but|and|it|this|there|the|rather|instead|so)\b|,(?=\s*[㐀-鿿])"
)
_REACH = 4
"""A negation reaches so many words ahead in its own part of a sentence: "is not a type of liver"."""


def clean(answer: str) -> str:
    """Return an answer without thoughts, tags, boxes and emphasis; full-width letters as plain ones.

    Thoughts that have no end are no answer: the model was stopped while it thought.
    """
    text = unicodedata.normalize("NFKC", answer)
    text = _UNFINISHED.sub("", _THOUGHTS.sub("", text))
    if tagged := _ANSWER_TAG.findall(text):
        text = tagged[-1]
    text = _BOXED.sub(r"\1", text)
    text = _EMPHASIS.sub("", text).strip()
    return text[1:-1].strip() if _QUOTED.fullmatch(text) else text


def words(text: str) -> tuple[str, ...]:
    """Return words in lower case: "T2" and "2.5" are one, so is each Chinese sign; 2.0 is 2."""
    return tuple(
        _plain_number(match[0])
        for match in _WORD.finditer(unicodedata.normalize("NFKC", text).lower())
    )


def normalised(text: str) -> tuple[str, ...]:
    """Return words without articles, number words as digits; articles alone stay, for "A" is an answer."""
    found = tuple(NUMBER_WORDS.get(word, word) for word in words(text))
    return tuple(word for word in found if word not in _ARTICLES) or found


def find(needle: Sequence[str], haystack: Sequence[str]) -> list[int]:
    """Return every place where a sequence of words begins in another."""
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
    """An answer's words without articles, and which of them stand under a negation.

    Args:
        text: the answer, cleaned.
    """

    def __init__(self, text: str) -> None:
        self._words: list[str] = []
        self._negator: list[int | None] = []
        self._part: list[int] = []
        for number, part in enumerate(_BREAKS.split(text)):
            found = [NUMBER_WORDS.get(word, word) for word in words(part) if word not in _ARTICLES]
            self._negator += _negators(found, len(self._words))
            self._words += found
            self._part += [number] * len(found)

    def of(self, needle: Sequence[str]) -> list[tuple[int, int, int | None]]:
        """Return start, end and place of the negation wherever the words stand; Chinese ones as a whole."""
        length = len(needle)
        return [
            (start, start + length, self._negator[start])
            for start in find(needle, self._words)
            if self._whole(start, start + length)
        ]

    def _whole(self, start: int, end: int) -> bool:
        """Chinese has no spaces: a term must not go on in a neighbouring sign, but for small words."""
        return self._ends(start, start - 1, _BEFORE) and self._ends(end - 1, end, _AFTER)

    def _ends(self, inside: int, outside: int, small: frozenset[str]) -> bool:
        if not 0 <= outside < len(self._words) or self._part[inside] != self._part[outside]:
            return True
        neighbour = self._words[outside]
        both = _is_chinese(self._words[inside]) and _is_chinese(neighbour)
        return not both or neighbour in small


_BEFORE = frozenset("是为在有选和或与不没非无的了")
_AFTER = frozenset("的了吗吧呢和或与是在里中上内")


def _negators(found: Sequence[str], offset: int) -> list[int | None]:
    """Return where the negation that reaches each word of a part of a sentence stands, from offset on."""
    by: list[int | None] = [None] * len(found)
    for place, word in enumerate(found):
        end = place + 1
        if tuple(found[place : place + 2]) in _NEGATING_PHRASES:
            end = place + 2
        elif word not in _NEGATIONS and word not in _CHINESE_NEGATIONS:
            continue
        for reached in range(end, min(end + _REACH, len(found))):
            by[reached] = offset + place
    return by


def _is_chinese(word: str) -> bool:
    return len(word) == 1 and "㐀" <= word <= "﫿"


def _plain_number(word: str) -> str:
    plain = word.replace(",", "")
    if _NUMBER.fullmatch(plain):
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    return word


# Yes and no, in English and Chinese

YES = "yes"
NO = "no"

_CHINESE_YES_NO = {
    YES: ("是", "是的", "对", "对的", "有", "有的", "包含", "可以", "能", "存在", "会", "正确"),
    NO: (
        "否", "不", "不是", "不是的", "不对", "没有", "无", "不包含", "不可以", "不能", "不存在", "不会",
        "错误",
    ),
}  # fmt: skip
_POLARITY = {
    **{word: answer for answer, all_words in _CHINESE_YES_NO.items() for word in all_words},
    "yes": YES,
    "no": NO,
}
_CHINESE_FIRST = re.compile(
    r"(不是的|不是|不包含|不可以|不存在|没有|是的|对的|包含|可以|存在|是|否|对|有|不)(?:[,，。.;；!！\s]|$)"
)
_CHINESE_DECLARED = re.compile(r"答案(?:是|为|[:：])+[\"'“]?(不是|没有|是的|是|否|对|有)")
# "No abnormality is seen" is a finding; whether it means no depends on the question
_SAID = (
    r"(yes\b|no\b(?=\W*$|\s*[.,;:!?\n)\]\"']|\s+(?:it|this|there|the|that|they|these|those|not)\b))"
    r"(?!\s*(?:,?\s*(?:and|or)\s+(?:yes|no))|/)"
)
_FIRST = re.compile(rf"\W*{_SAID}", re.IGNORECASE)
_DECLARED = re.compile(
    rf"\banswer(?:\s+(?:is|would\s+be|should\s+be)|\s*:)\s*(?:that\s+)?[\"'(\[]*{_SAID}",
    re.IGNORECASE,
)


def yes_or_no(answer: str) -> str | None:
    """Return ``yes`` or ``no``; None where an answer says neither, or both.

    It counts if it is the answer's first word or is declared ("the answer is no"), and the other does not
    come first elsewhere ("Yes. ... The answer is no."). "There is no effusion" is no answer: whether it
    means yes depends on the question; so does "No effusion is seen".
    """
    text = clean(answer)
    said = {match[1].lower() for match in (_FIRST.match(text), *_DECLARED.finditer(text)) if match}
    said |= {
        _POLARITY[match[1]]
        for match in (_CHINESE_FIRST.match(text), *_CHINESE_DECLARED.finditer(text))
        if match
    }
    if len(said) == 1:
        return said.pop()
    return None


def polarity(gold: str) -> str | None:
    """Return ``yes`` or ``no`` of a gold answer, in English or Chinese; None for any other."""
    return _POLARITY.get(gold.strip().strip(".。").lower())
