# SPDX-License-Identifier: Apache-2.0

"""Finding terms in running text, as claims or as denials.

English is read word by word: a term is a run of words, the longest one wins (`lung nodule` before
`nodule`), and its last word may be in the plural. Chinese has no words to go by: the longest term at a
place wins.

A term is denied when a word of denial stands before it in the same clause (`no evidence of pneumonia`,
`rather than a cyst`) or a phrase of denial follows at once (`pneumonia is not seen`, `fracture was ruled
out`). The list is in the spirit of NegEx (Chapman et al. 2001, doi 10.1006/jbin.2001.1029), with clauses in
place of its window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_tools.items import Conversation
from data_tools.lexicon import plural_of

_WORDS = re.compile(r"[a-z0-9]+|[.;:!?,()\n]")
_CJK = re.compile(r"[\u3400-\u9fff]")
_CLAUSE_ENDS = frozenset(".;:!?,()\n")
WORDS: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
)
"""Words that the checks read by."""
_TURNS = frozenset(WORDS["turns"])
_DENIALS = frozenset(WORDS["denials"])
_DENYING_PHRASES, _DENIED_AFTER, _NOT_DENIALS = (
    tuple(tuple(phrase.split()) for phrase in WORDS[key])
    for key in ("denying_phrases", "denied_after", "not_denials")
)
# Without any of these words nothing is denied: of each phrase the word that is its own.
_DENYING_WORDS = _DENIALS.union(
    (next(word for word in phrase if word not in ("in", "as")) for phrase in _DENYING_PHRASES),
    ("absent", "excluded", "ruled", "unlikely", "not", "isn", "aren", "cannot"),
)
_DENIALS_ZH = re.compile(
    r"未见|未发现|未显示|未累及|没有|无明显|不存在|不是|并非|而非|不同于|区别于|排除|不支持|不符合|不考虑"
    r"|无(?![法论])|非"
)
_DENIED_AFTER_ZH = re.compile(r"(?:的)?(?:不存在|未见|被排除|已排除|缺如|阴性|可能性小|可能性不大)")
_CLAUSE_ENDS_ZH = "。；！？;!?\n，,"


@dataclass(frozen=True, slots=True)
class Hit:
    """A term that was found: what it means, its words or characters, and whether it is denied."""

    meaning: str
    start: int
    end: int
    denied: bool


def words_of(text: str) -> list[str]:
    """Return lower-case words and the marks that end clauses, in their order."""
    return _WORDS.findall(text.lower())


def is_chinese(text: str) -> bool:
    """Return whether any Chinese character is in it."""
    return _CJK.search(text) is not None


@dataclass(frozen=True, slots=True)
class Said:
    """A conversation as the checks read it: the texts of its answers, split into words once.

    ``plain`` is all of the text in lower case, with single spaces and straight apostrophes; ``words`` are its
    `words_of`; ``chinese`` says how it is to be read.
    """

    answers: tuple[str, ...]
    text: str
    plain: str
    words: list[str]
    chinese: bool

    @classmethod
    def of(cls, *answers: str, chinese: bool) -> Said:
        """Read answers in one of the two languages."""
        text = "\n".join(answers)
        plain = " ".join(text.lower().replace("’", "'").split())
        return cls(answers, text, plain, words_of(text), chinese)


def said(conversation: Conversation, *, chinese: bool) -> Said:
    """Read the answers of a conversation."""
    return Said.of(*(turn.text for turn in conversation if turn.speaker == "gpt"), chinese=chinese)


class TermFinder:
    """Finds the terms of a vocabulary: spoken form -> what it means."""

    def __init__(self, terms: Mapping[str, str]) -> None:
        self._by_first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        self._meanings: dict[str, str] = {}
        for spoken, meaning in terms.items():
            self._meanings.setdefault(spoken.lower(), meaning)
            if is_chinese(spoken):
                continue
            words = tuple(word for word in words_of(spoken) if word not in _CLAUSE_ENDS)
            if not words:
                continue
            for last in _numbers(words[-1]):
                form = (*words[:-1], last)
                self._by_first.setdefault(form[0], []).append((form, meaning))
        for forms in self._by_first.values():
            forms.sort(key=lambda form: -len(form[0]))
        self._by_character: dict[str, list[str]] = {}
        for spoken in sorted(self._meanings, key=len, reverse=True):
            self._by_character.setdefault(spoken[0], []).append(spoken)

    def find(self, words: list[str]) -> list[Hit]:
        """Find all terms of an English text, by its `words_of`; ``start`` and ``end`` count words."""
        hits = []
        by_first = self._by_first
        denying = not _DENYING_WORDS.isdisjoint(words)
        free = 0  # words before it belong to a term already
        for at in [at for at, word in enumerate(words) if word in by_first]:
            if at < free:
                continue
            for form, meaning in by_first[words[at]]:
                end = at + len(form)
                if len(form) == 1 or tuple(words[at:end]) == form:
                    hits.append(Hit(meaning, at, end, denying and _denied(words, at, end)))
                    free = end
                    break
        return hits

    def find_chinese(self, text: str) -> list[Hit]:
        """Find all terms of a Chinese text, English ones too; ``start`` and ``end`` count characters."""
        hits = []
        lower = text.lower()
        free = 0  # characters before it belong to a term already
        by_character = self._by_character
        for at in [at for at, character in enumerate(lower) if character in by_character]:
            if at < free:
                continue
            for spoken in by_character[lower[at]]:
                if lower.startswith(spoken, at) and _is_whole(lower, at, spoken):
                    free = at + len(spoken)
                    hits.append(Hit(self._meanings[spoken], at, free, _denied_zh(lower, at, free)))
                    break
        return hits


def _is_whole(text: str, at: int, spoken: str) -> bool:
    """Return whether a term does not begin or end within an English word; a Chinese one never does."""
    if not spoken.isascii():
        return True
    end = at + len(spoken)
    before, after = text[at - 1 : at] if at else "", text[end : end + 1]
    return not (before.isascii() and before.isalnum()) and not (after.isascii() and after.isalnum())


def _numbers(word: str) -> Iterable[str]:
    """Return a word and its plural forms, English and Latin."""
    forms = {word, word + "s"} | ({plural_of(word)} if len(word) > 2 else set())  # "he": "they"
    if word.endswith("s") and not word.endswith("ss") and len(word) > 4:
        forms.add(word[:-1])
    for singular, plural in (("us", "i"), ("is", "es"), ("um", "a"), ("a", "ae"), ("oma", "omata")):
        if word.endswith(singular) and len(word) > len(singular) + 2:
            forms.add(word[: -len(singular)] + plural)
    return forms


def _denied(words: list[str], start: int, end: int) -> bool:
    after = tuple(words[end : end + 4])
    for phrase in _DENIED_AFTER:
        begins, rest = after[: len(phrase)] == phrase, after[len(phrase) :]
        if begins and rest[:1] not in (("only",), ("just",)):
            return True
    at = start - 1
    while at >= 0:
        word = words[at]
        if word in _CLAUSE_ENDS:
            # An enumeration goes on behind a comma as long as nothing but short items stand between.
            if word != "," or not _is_enumeration(words, at, start):
                return False
        elif word in _TURNS:
            # "instead of" and "instead" mean opposite things.
            return word == "instead" and words[at + 1 : at + 2] == ["of"]
        elif word in _DENIALS:
            if tuple(words[at : at + 2]) not in _NOT_DENIALS:
                return True
        else:
            for phrase in _DENYING_PHRASES:
                first = max(0, at - len(phrase) + 1)
                if phrase[-1] == word and tuple(words[first : at + 1]) == phrase:
                    return True
        at -= 1
    return False


def _is_enumeration(words: list[str], comma: int, start: int) -> bool:
    """Return whether a comma begins an item of a list: "no cyst, solid nodule or mass"."""
    between = words[comma + 1 : start]
    verbs = ("is", "are", "shows", "show", "has", "there", "with", "was", "were", "suggests",
             "consistent")  # fmt: skip
    return len(between) <= 6 and not any(word in verbs for word in between)


def _denied_zh(text: str, start: int, end: int) -> bool:
    if _DENIED_AFTER_ZH.match(text, end):
        return True
    begin = 1 + max(text.rfind(mark, 0, start) for mark in _CLAUSE_ENDS_ZH)
    return _DENIALS_ZH.search(text, begin, start) is not None
