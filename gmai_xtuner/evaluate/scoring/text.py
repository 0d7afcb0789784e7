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
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, partial
from math import isclose
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
_JSON = json.JSONDecoder()
_LATEX = [(re.compile(pattern), plainly) for pattern, plainly in TABLES["latex"].items()]
_BULLETS = " •·✅✔☑👉➡→\ufe0f"
_SIGNS = str.maketrans({sign: text for text, signs in TABLES["signs"].items() for sign in signs})


def plain(text: str) -> str:
    """Return a text with the plain form of each sign: dashes, quotes, full width, fractions, spaces."""
    if text.isascii():
        return text
    plainly = partial(unicodedata.normalize, "NFKC")
    text = _AROUND["superscript"].sub(lambda match: f"^{plainly(match[0])}", text)
    text = re.sub(r"\u2212\s+(?=[\d.])", "-", _AROUND["mixed_fraction"].sub(" ", text))
    text = plainly(text).translate(_SIGNS)
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
        text = _AROUND["end_token"].sub("", text)
    return own[1] if (own := _AROUND["goes_on"].match(text)) else text


def clean(answer: str) -> str:
    """Return what an answer declares to be its answer, or all of it, without thoughts, tags and emphasis."""
    text = without_thoughts(plain(answer)).strip()
    if len(text) < 3:
        return text
    if "<" in text or "[/" in text:
        if tagged := _AROUND["answer_tag"].findall(text):
            text = tagged[-1]
        text = _AROUND["html"].sub(lambda match: "\n" if "br" in match[0].lower() else "", text)
    if "{" in text:
        text = _boxed(text)
    if "{" in text or text.startswith(("[", "```")):
        text = _from_json(text)
    if "\\" in text or "$" in text or "^" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    if any(sign in text for sign in "*_`#>"):
        text = _AROUND["emphasis"].sub("", text)
    text = numerals(_AROUND["bullet"].sub("", text)).strip().lstrip(_BULLETS)
    return text[1:-1].strip() if _AROUND["quoted"].fullmatch(text) else text


def _boxed(text: str) -> str:
    r"""Return the content of the last ``\boxed{}`` that is not denied; the text itself without one.

    Boxes that are joined by "or" are returned together.
    """
    found: list[tuple[int, int, str]] = []
    for opened in _AROUND["box"].finditer(text):
        depth, end = 1, opened.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not _AROUND["box_denied"].match(text, end):
            found.append((opened.start(), end, text[opened.end() : end - (not depth)].strip()))
    if not found:
        return text
    *_, (start, _, content) = found
    joined = len(found) > 1 and _AROUND["box_joined"].fullmatch(text[found[-2][1] : start])
    return f"{found[-2][2]} or {content}" if joined and found[-2][2] != content else content


def _from_json(text: str) -> str:
    """Return the answer field of the last JSON value that has one; the text itself where there is none.

    Values without a word between them are returned together.
    """
    found: list[str] = []
    end = 0
    for opened in re.finditer(r"[{\[]", text):
        if opened.start() < end:
            continue
        value, stop = _json_at(text, opened.start())
        if stop and (said := _answer_of(value)) is not None:
            apart = re.search(r"\w", text[end : opened.start()])
            found = [said] if apart else [*found, said]
        end = max(end, stop)
    if found:
        return " or ".join(dict.fromkeys(found))
    fields = _AROUND["answer_field"].findall(text)
    return "".join(fields[-1]) if fields else text


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """Return the object or list that begins at a place, of JSON or Python, and its end; 0 where none does."""
    with suppress(ValueError, RecursionError):
        return _JSON.raw_decode(text, start)
    end = text.rfind("}" if text[start] == "{" else "]") + 1
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        value = ast.literal_eval(text[start:end])
        if isinstance(value, dict | list):
            return value, end
    return None, 0


def _answer_of(value: Any) -> str | None:
    """Return the answer that a JSON value gives; empty where it gives several, None where it has none."""
    if isinstance(value, list | tuple):
        found = [_answer_of(one) for one in value]
        return found[0] if len(found) == 1 else ""
    if not isinstance(value, dict):
        return None if value is None else str(value)
    fields = {_AROUND["word_break"].sub("_", str(name)).lower(): one for name, one in value.items()}
    for key in _ANSWER_KEYS:
        if key in fields:
            return _answer_of(fields[key]) or ""
    if value and all(isinstance(one, bool) for one in value.values()):  # {"A": false, "B": true}
        chosen = [str(name) for name, one in value.items() if one]
        return chosen[0] if len(chosen) == 1 else ""
    if len(value) == 1 and len(name := str(next(iter(value)))) == 1:  # {"B": "Lung"}
        return f"{name}. {value[name]}"
    within = [_answer_of(one) for one in value.values() if isinstance(one, dict)]
    found = [one for one in within if one is not None]
    return found[0] if len(found) == 1 else None


# Words

CHINESE = "㐀-鿿豈-﫿"
# A number keeps its sign, point, fraction, exponent and range; a unit that is written onto it is a word of
# its own, other letters are not (3rd, 2D). Words are split at hyphens. A Chinese sign is a word.
_PATTERNS = patterns("words", chinese=CHINESE, part="|".join(TABLES["parts"]))
_ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = {word: str(number) for number, word in enumerate(TABLES["small_numbers"])}
_SAME_WORD = TABLES["same_word"] | NUMBER_WORDS
_PHRASES = [
    (re.compile(pattern, re.IGNORECASE), sign) for pattern, sign in TABLES["phrases"].items()
]
_SPELLING = [(re.compile(pattern), letters) for pattern, letters in TABLES["spelling"].items()]
_UNIT_NAMES = TABLES["unit_names"]
_UNIT_SIZES: dict[str, tuple[str, float]] = TABLES["unit_sizes"]


def spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each word in lower case, 2.0 as 2 and two as 2, with its start and end; without articles."""
    for match in _PATTERNS["word"].finditer(text.lower()):
        word = match[0]
        if word[0].isdigit() or word[0] in "-.":
            word = _number_word(word)
        if word not in _ARTICLES or (word == "a" and _is_label(text, match.start(), match.end())):
            yield _SAME_WORD.get(word, word), match.start(), match.end()


def _is_label(text: str, start: int, end: int) -> bool:
    """Tell "vitamin A" and "is it A?" from "a mass"."""
    behind = text[end:].lstrip()
    labelled = _PATTERNS["labels"].search(text[:start].lower())
    return labelled is not None or not behind[:1].isalnum()


def numerals(text: str) -> str:
    """Return a text with its numbers, ranges and bounds in figures: "minus five", "between 2 and 4"."""
    text = _PATTERNS["fraction"].sub(_fraction, _PATTERNS["counted"].sub(_counted, text))
    if "per cent" in text or "percent" in text or " than " in text or any(map(str.isdigit, text)):
        for pattern, replacement in _PHRASES:
            text = pattern.sub(replacement, text)
    return text


def _counted(match: re.Match[str]) -> str:
    """Read "minus two thousand and five"; a small number alone stays a word."""
    sign = "-" if match["sign"] else ""
    said = re.findall(r"[a-z]+", match["number"].lower())
    if len(said) == 1 and said[0] not in {**TABLES["tens"], **TABLES["scales"]} and not sign:
        return match[0]
    total = part = 0
    for word in said:
        scale = TABLES["scales"].get(word)
        if scale == 100:
            part = max(part, 1) * scale
        elif scale:
            total, part = total + max(part, 1) * scale, 0
        elif word not in ("and", "a"):
            part += TABLES["tens"].get(word) or int(NUMBER_WORDS[word])
    return f"{sign}{total + part}"


def _fraction(match: re.Match[str]) -> str:
    below = match["below"] or match["among"] or match["part"].lower()
    numbers = (match["above"] or "1", str(TABLES["parts"].get(below, below)))
    return "/".join(NUMBER_WORDS.get(one.lower(), one) for one in numbers)


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
    text = numerals(plain(text).lower())
    return tuple(word for word, _, _ in spans(text)) or tuple(_PATTERNS["word"].findall(text))


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """Return a word without what differs between British, American, singular and plural."""
    word = word.removesuffix("'s")  # Hodgkin's, Crohn's
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


@lru_cache(maxsize=1 << 12)
def quantity(text: str) -> tuple[float, str] | None:
    """Return the number that a text is, and its unit: ``"1/2"``, ``".5 mg"``, ``"50 percent"``, ``"2e3"``.

    None for anything else, e.g. a text with two numbers.
    """
    text = numerals(plain(text).lower()).strip().rstrip(".。")
    text = re.sub(r"^- (?=[\d.])", "-", text).removeprefix("a ")
    text = f"1/{TABLES['parts'][text]}" if text in TABLES["parts"] else text
    text = re.sub(r"(?<=\d) (?=\d{3}\b)", "", re.sub(r"^10\^\{?([+-]?\d+)\}?$", r"1e\1", text))
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
    return value, stem(match["unit"])


def same_quantity(said: str, gold: str) -> bool:
    """Tell whether two texts are the same number, in whatever units; one unit may be left out."""
    one, two = quantity(said), quantity(gold)
    if one is None or two is None:
        return False
    (a, unit), (b, other) = one, two
    if unit != other and unit and other:
        (kind, factor), (other_kind, other_factor) = (
            _UNIT_SIZES.get(name, (name, 1.0)) for name in (unit, other)
        )
        return kind == other_kind and isclose(a * factor, b * other_factor)
    if "%" in (unit, other) and unit != other:  # 50 % is 0.5; "75" where 75 % is meant
        share, plainly = (a, b) if unit == "%" else (b, a)
        return isclose(share / 100, plainly) or (abs(plainly) > 1 and isclose(share, plainly))
    return isclose(a, b)
