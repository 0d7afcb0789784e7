# SPDX-License-Identifier: Apache-2.0

"""Answer text -> the final answer in plain signs, and its words; and the patterns of ``rules.yaml``.

An answer may come with thoughts, tags, a box, JSON or LaTeX around it. :func:`clean` takes off thoughts and
end tokens, and returns what is declared to be the answer: the last tag, JSON field or ``\\boxed``. Where one
sentence, or one object, has different ones, the answer contradicts itself (:func:`agreed`).
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, partial
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

import yaml

Words = tuple[str, ...]
T = TypeVar("T")
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
_AROUND = patterns("around", keys="|".join(_ANSWER_KEYS + TABLES["more_keys"]))
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
    """Return what an answer declares to be its answer, or all of it, without thoughts, tags and emphasis.

    Different things that are declared are joined by "or".
    """
    return " or ".join(declared(answer))


def agreed(answer: str, read: Callable[[str], T | None]) -> T | None:
    """Return what all that an answer declares is read as; None where it contradicts itself.

    Each declaration must be understood, but for fields of JSON that only say more about an answer.
    """
    said = {read(one) for one in declared(answer)}
    first = next(iter(said)) if len(said) == 1 else None
    if first is not None and "{" in answer:
        more = {read(one) for one in declared(answer, briefly=False)}
        return first if more <= {first, None} else None
    return first


def declared(answer: str, *, briefly: bool = True) -> list[str]:
    """Return the different things that an answer declares to be its answer; all of it where it does not.

    ``briefly``: without what only says more about an answer, such as the field ``diagnosis`` beside it.
    """
    text = without_thoughts(plain(answer)).strip()
    found = {one.casefold(): one for one in map(_tidy, reversed(_marked(text, briefly)))}
    return list(found.values())[::-1]


def _tidy(text: str) -> str:
    """Return a text without HTML, LaTeX, emphasis, bullets and quotes, its numbers in figures."""
    text = text.strip()
    if len(text) < 3:
        return text
    if "<" in text:
        text = _AROUND["html"].sub(lambda match: "\n" if "br" in match[0].lower() else "", text)
    if "\\" in text or "$" in text or "^" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    if any(sign in text for sign in "*_`#>"):
        text = _AROUND["emphasis"].sub("", text)
    text = numerals(_AROUND["bullet"].sub("", text)).strip().lstrip(_BULLETS)
    return text[1:-1].strip() if _AROUND["quoted"].fullmatch(text) else text


_Place = tuple[int, int, list[str]]
"""Start, end and contents of a tag, a box or a JSON value."""


def _marked(text: str, briefly: bool) -> list[str]:
    """Return what the last mark holds, and those that one sentence joins to it; the text without a mark.

    What follows a mark and takes it back is returned, too.
    """
    places: list[_Place] = []
    if "<" in text or "[/" in text:
        tags = _AROUND["answer_tag"].finditer(text)
        places += [(one.start(), one.end(), [one[1]]) for one in tags]
    if "{" in text or text.startswith(("[", "```")):
        places += [*_boxes(text), *_fields(text, briefly)]
    said: list[_Place] = []
    for start, end, contents in sorted(places, key=lambda place: place[0]):
        is_within = said and start < said[-1][1]
        denied = _AROUND["mark_denied"].search(text[:start]) or _AROUND["mark_rejected"].match(
            text, end
        )
        if is_within or denied:
            continue
        if said and not _AROUND["mark_apart"].search(text[said[-1][1] : start]):
            contents = said[-1][2] + contents
        said.append((start, end, contents))
    if not said:
        return [text]
    _, end, contents = said[-1]
    rest = [text[end:]] if _AROUND["taken_back"].search(text, end) else []
    return [*(inner for one in contents for inner in _marked(one, briefly)), *rest]


def _boxes(text: str) -> Iterator[_Place]:
    r"""Yield each ``\boxed{}``."""
    for opened in _AROUND["box"].finditer(text):
        depth, end = 1, opened.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield opened.start(), end, [text[opened.end() : end - (not depth)].strip()]


def _fields(text: str, briefly: bool) -> list[_Place]:
    """Return each JSON value that has an answer; where none can be read, all answer fields as one place."""
    found: list[_Place] = []
    end = 0
    for opened in re.finditer(r"[{\[]", text):
        if opened.start() < end or (
            opened[0] == "["
            and _AROUND["prose"].search(text, text.rfind("\n", 0, opened.start()) + 1, opened.end())
        ):
            continue
        value, stop = _json_at(text, opened.start())
        if stop and (said := _answers_of(value, briefly)):
            found.append((opened.start(), stop, said))
        end = max(end, stop)
    fields = [] if found else [*_AROUND["answer_field"].finditer(text)]
    said = ["".join(group or "" for group in one.groups()) for one in fields]
    return [(fields[0].start(), fields[-1].end(), said)] if fields else found


class _Object(list[tuple[Any, Any]]):
    """The fields of an object; a key that is repeated stands twice."""


_JSON = json.JSONDecoder(object_pairs_hook=_Object)


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """Return the object or list that begins at a place, of JSON or Python, and its end; 0 where none does."""
    with suppress(ValueError, RecursionError):
        return _JSON.raw_decode(text, start)
    end = text.rfind("}" if text[start] == "{" else "]") + 1
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        value = _python_value(ast.parse(text[start:end].strip(), mode="eval").body)
        if isinstance(value, list):
            return value, end
    return None, 0


def _python_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Dict):
        names = [ast.literal_eval(one) if one else None for one in node.keys]
        return _Object(zip(names, map(_python_value, node.values), strict=True))
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(one) for one in node.elts]
    return ast.literal_eval(node)


def _answers_of(value: Any, briefly: bool) -> list[str]:
    """Return the answers that a JSON value gives, empty texts among them; an empty list where it has none."""
    if not isinstance(value, _Object):
        several = value if isinstance(value, list) else []
        within = [text for one in several for text in _answers_of(one, briefly)]
        return within or ([] if several or value is None else [str(value)])
    named = [(_AROUND["word_break"].sub("_", str(name)).lower(), one) for name, one in value]
    found: list[str] = []
    for keys in (_ANSWER_KEYS, TABLES["more_keys"]):
        ordered = [one for key in keys for name, one in named if name == key]
        if not (briefly and found):
            found += [text for one in ordered for text in _answers_of(one, briefly) or [""]]
    if found:
        return list(filter(None, found)) if found[0] else [""]
    if value and all(
        isinstance(one, int) and one in (0, 1) for _, one in value
    ):  # {"A": false, "B": true}
        chosen = [str(name) for name, one in value if one]
        return chosen if len(chosen) == 1 else [""]
    if len(value) == 1 and len(str(value[0][0])) == 1:  # {"B": "Lung"}
        return [f"{value[0][0]}. {value[0][1]}"]
    return [
        text for _, one in value if isinstance(one, _Object) for text in _answers_of(one, briefly)
    ]


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
