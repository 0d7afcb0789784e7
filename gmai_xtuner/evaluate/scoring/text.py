# SPDX-License-Identifier: Apache-2.0

"""Answer text -> the final answer in plain signs, and its words; and the patterns of ``rules.yaml``.

An answer may come with thoughts, tags, a box, JSON or LaTeX around it. :func:`clean` takes off thoughts and
end tokens, and returns what is declared to be the answer: the last tag, JSON field or ``\\boxed``.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

Words = tuple[str, ...]
_FILE = Path(__file__).with_name("rules.yaml")
TABLES: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
"""The sections of ``rules.yaml``."""


def patterns(section: str, **fragments: str) -> dict[str, re.Pattern[str]]:
    """Return name -> compiled pattern of a section of ``rules.yaml``.

    In the file a pattern is a text, or several lines that are joined without a space. ``<<name>>`` stands for
    a fragment of the same section or of the arguments; ``name /i`` has the flags i, m or s.
    """
    found = {}
    for key, value in TABLES[section].items():
        text = value.replace("\n", "")
        while "<<" in text:
            text = re.sub(r"<<(\w+)>>", lambda match: fragments[match[1]], text)
        if key.startswith("<<"):
            fragments[key.strip("<>")] = text
            continue
        name, _, flags = key.partition(" /")
        found[name] = re.compile(f"(?{flags}){text}" if flags else text)
    return found


# What models write around their answers

_THOUGHTS = TABLES["thoughts"]
_OPENED = re.compile("|".join(_THOUGHTS), re.IGNORECASE)
_CLOSED = re.compile("|".join(_THOUGHTS.values()), re.IGNORECASE)
_WHOLE = "|".join(f"{opening}.*?{closing}" for opening, closing in _THOUGHTS.items())
_WHOLE_THOUGHT = re.compile(_WHOLE, re.DOTALL | re.IGNORECASE)
_ANSWER_KEYS = TABLES["answer_keys"]
_AROUND = patterns("around", keys="|".join(_ANSWER_KEYS))
_LATEX = [(re.compile(pattern), plainly) for pattern, plainly in TABLES["latex"].items()]
_BULLETS = " •·✅✔☑👉➡→\ufe0f"
_SIGNS = str.maketrans({sign: text for text, signs in TABLES["signs"].items() for sign in signs})


def plain(text: str) -> str:
    """Return a text with the plain form of each sign: dashes, quotes, full width, fractions, spaces."""
    if text.isascii():
        return text
    plainly = partial(unicodedata.normalize, "NFKC")
    text = _AROUND["superscript"].sub(lambda match: f"^{plainly(match[0])}", text)
    text = plainly(_AROUND["mixed_fraction"].sub(" ", text)).translate(_SIGNS)
    return _AROUND["dash"].sub(_dash, text)


def _dash(match: re.Match[str]) -> str:
    """Read an en dash or em dash: a hyphen within a word or range, a minus before a number, else a break."""
    before, after = match.string[: match.start()], match.string[match.end() :]
    inside = before[-1:].isalnum() and after[:1].isalnum()
    is_minus = after[:1].isdigit() and not before[-1:].strip()
    return "-" if match[0] == "\u2013" and (inside or is_minus) else " - "


def without_thoughts(text: str) -> str:
    """Return what follows the thoughts, or stands before them; thoughts without an end are no answer."""
    text = _AROUND["begin_token"].sub("", text, count=1) if text.lstrip().startswith("<") else text
    if "<" in text or "◁" in text or "[" in text:
        *_, last = [None, *_CLOSED.finditer(text)]
        if last is not None:
            after = text[last.end() :]
            text = after if after.strip() else _CLOSED.sub("", _WHOLE_THOUGHT.sub("", text))
        if opened := _OPENED.search(text):
            text = text[: opened.start()]
        if (end := _AROUND["end_token"].search(text)) and text[: end.start()].strip():
            text = text[: end.start()]
        return _AROUND["end_token"].sub("", text)
    return text


def clean(answer: str) -> str:
    """Return what an answer declares to be its answer, or all of it, without thoughts, tags and emphasis."""
    text = without_thoughts(plain(answer)).strip()
    if len(text) < 3:
        return text
    if "<" in text:
        if tagged := _AROUND["answer_tag"].findall(text):
            text = tagged[-1]
        text = _AROUND["html"].sub(lambda match: "\n" if "br" in match[0].lower() else "", text)
    if "{" in text:
        text = _boxed(text)
        if "{" in text:
            text = _from_json(text)
    if "\\" in text or "$" in text or "^" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    if any(sign in text for sign in "*_`#>"):
        text = _AROUND["emphasis"].sub("", text)
    text = text.strip().lstrip(_BULLETS)
    return text[1:-1].strip() if _AROUND["quoted"].fullmatch(text) else text


def _boxed(text: str) -> str:
    r"""Return the content of the last ``\boxed{}``; the text itself without one."""
    *_, last = [None, *_AROUND["box"].finditer(text)]
    if last is None:
        return text
    depth = 1
    for end in range(last.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[last.end() : end].strip()
    return text[last.end() :].strip()


def _from_json(text: str) -> str:
    """Return the answer field of a JSON object; the text itself where there is none."""
    fenced = _AROUND["fenced"].findall(text)
    inner = fenced[-1] if fenced else text[text.find("{") : text.rfind("}") + 1]
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(inner)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        found = _answer_of(value)
        return text if found is None else found
    fields = _AROUND["answer_field"].findall(text)
    return "".join(fields[-1]) if fields else text


def _answer_of(value: Any) -> str | None:
    """Return the answer that a JSON value gives; empty where it gives several, None where it has none."""
    if isinstance(value, list | tuple):
        found = [_answer_of(one) for one in value]
        return found[0] if len(found) == 1 else ""
    if not isinstance(value, dict):
        return None if value is None else str(value)
    fields = {str(name).strip().lower().replace(" ", "_"): one for name, one in value.items()}
    for key in _ANSWER_KEYS:
        if key in fields:
            return _answer_of(fields[key]) or ""
    if value and all(isinstance(one, bool) for one in value.values()):  # {"A": false, "B": true}
        chosen = [str(name) for name, one in value.items() if one]
        return chosen[0] if len(chosen) == 1 else ""
    if len(value) == 1 and len(name := str(next(iter(value)))) == 1:  # {"B": "Lung"}
        return f"{name}. {value[name]}"
    return None


# Words

CHINESE = "㐀-鿿豈-﫿"
# A number keeps its sign, point, fraction, exponent and range; a unit that is written onto it is a word of
# its own, other letters are not (3rd, 2D). Words are split at hyphens. A Chinese sign is a word.
_PATTERNS = patterns("words", chinese=CHINESE)
_ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = {word: str(number) for number, word in enumerate(TABLES["small_numbers"])}
_SAME_WORD = TABLES["same_word"] | NUMBER_WORDS
_PHRASES = [(re.compile(pattern), sign) for pattern, sign in TABLES["phrases"].items()]
_SPELLING = [(re.compile(pattern), letters) for pattern, letters in TABLES["spelling"].items()]
_UNIT_NAMES = TABLES["unit_names"]


def spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each word in lower case, 2.0 as 2 and two as 2, with its start and end; without articles."""
    for match in _PATTERNS["word"].finditer(text.lower()):
        word = match[0]
        if word[0].isdigit() or word[0] in "-.":
            word = _number_word(word)
        if word not in _ARTICLES:
            yield _SAME_WORD.get(word, word), match.start(), match.end()


def _number_word(word: str) -> str:
    if not _PATTERNS["plain_number"].fullmatch(word):
        return word
    word = word.replace(",", "")
    if "e" in word:
        return word
    sign, digits = ("-", word[1:]) if word[0] == "-" else ("", word)
    whole, _, rest = digits.partition(".")
    rest = rest.rstrip("0")
    return f"{sign}{whole or '0'}{'.' if rest else ''}{rest}"


def words(text: str) -> Words:
    """Return the words of :func:`spans`; articles alone stay, for "A" is an answer."""
    text = plain(text).lower()
    if "per cent" in text or " than " in text or any(map(str.isdigit, text)):
        for pattern, replacement in _PHRASES:
            text = pattern.sub(replacement, text)
    return tuple(word for word, _, _ in spans(text)) or tuple(_PATTERNS["word"].findall(text))


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """Return a word without what differs between British, American, singular and plural."""
    if len(word) > 3 and word.isalpha():
        for pattern, replacement in _SPELLING:
            word = pattern.sub(replacement, word)
    return _UNIT_NAMES.get(word, word)


@lru_cache(maxsize=1 << 12)  # the options of many questions are the same
def stems(text: str) -> Words:
    """Return the words of a text, each as :func:`stem` gives it."""
    return tuple(map(stem, words(text)))


def find(needle: Sequence[str], haystack: Sequence[str]) -> list[int]:
    """Return every place where a sequence of words begins in another."""
    length, needle = len(needle), list(needle)
    return [
        start
        for start in range(len(haystack) - length + 1 if needle else 0)
        if haystack[start] == needle[0] and list(haystack[start : start + length]) == needle
    ]


# Numbers


def quantity(text: str) -> tuple[float, str] | None:
    """Return the number that a text is, and its unit: ``"1/2"``, ``".5 mg"``, ``"50 percent"``, ``"2e3"``.

    A percentage is a share of 1. None for anything else, e.g. a text with two numbers.
    """
    text = re.sub(r"\bper ?cent\b", "%", plain(text).lower()).strip().rstrip(".。")
    text = re.sub(r"^- (?=[\d.])", "-", text)
    text = " ".join(_SAME_WORD.get(word, word) for word in text.split())
    match = _PATTERNS["quantity"].fullmatch(text)
    if match is None or (match["whole"] and not match["below"]):
        return None
    base = _PATTERNS["base"].match(match["number"])
    try:
        value = float(base[0].replace(",", "")) * 10.0 ** int(match["power"] or 0) if base else 0.0
        if match["below"]:
            value = float(Fraction(value) / Fraction(match["below"].replace(",", "")))
        value += float(match["whole"] or 0)
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    unit = match["unit"]
    return (value / 100, "") if unit == "%" else (value, stem(unit))


def same_quantity(said: str, gold: str) -> bool:
    """Tell whether two texts are the same number; a unit that both have must be the same."""
    one, two = quantity(said), quantity(gold)
    if one is None or two is None or (one[1] and two[1] and one[1] != two[1]):
        return False
    return abs(one[0] - two[0]) <= 1e-9 * max(abs(one[0]), abs(two[0]))
