# SPDX-License-Identifier: Apache-2.0

"""Answer text -> the final answer in plain signs, and its words.

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
from functools import lru_cache
from typing import Any

Words = tuple[str, ...]

# What models write around their answers

_THOUGHTS = (
    (r"<think(?:ing)?>", r"</think(?:ing)?>"),  # DeepSeek, Qwen, InternVL
    (r"<thoughts?>", r"</thoughts?>"),
    (r"<reason(?:ing)?>", r"</reason(?:ing)?>"),
    (r"<reflection>", r"</reflection>"),
    (r"<seed:think>", r"</seed:think>"),
    (r"<unused94>", r"<unused95>"),  # MedGemma
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel\|>analysis<\|message\|>", r"<\|channel\|>final<\|message\|>"),  # gpt-oss
)
_OPENED = re.compile("|".join(opening for opening, _ in _THOUGHTS), re.IGNORECASE)
_CLOSED = re.compile("|".join(closing for _, closing in _THOUGHTS), re.IGNORECASE)
_WHOLE_THOUGHT = re.compile(
    "|".join(f"{opening}.*?{closing}" for opening, closing in _THOUGHTS), re.DOTALL | re.IGNORECASE
)
_BEGIN_TOKEN = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|im_start\|>assistant|<\|assistant\|>)\s*"
)
_END_TOKEN = re.compile(
    r"<\|(?:im_end|endoftext|end|eot_id|return|user|im_start)\|>|</s>|<eos>|<end_of_turn>|\[EOS\]"
    r"|<\|end▁of▁sentence\|>"
)
_ANSWER_TAG = re.compile(
    r"(?:<(?:final_?)?answer>|<\|begin_of_(?:box|solution)\|>)(.*?)"
    r"(?:</(?:final_?)?answer>|<\|end_of_(?:box|solution)\|>|$)",
    re.DOTALL | re.IGNORECASE,
)
_FENCED = re.compile(r"```(?:json)?\s*(\{.*?\})\s*```", re.DOTALL)
_ANSWER_KEYS = (
    "final_answer", "answer", "correct_answer", "predicted_answer", "prediction", "choice", "option",
    "selected_option", "answer_choice", "answer_letter", "letter", "selection", "diagnosis", "答案",
)  # fmt: skip
_ANSWER_FIELD = re.compile(
    rf"[\"'](?:{'|'.join(_ANSWER_KEYS)})[\"']\s*:\s*(?:\"([^\"]*)\"|'([^']*)'|([\w.+-]+))",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\f?boxed\s*\{")
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (
        re.compile(
            r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathit|bm|bf|rm|operatorname)\s*"
            r"\{((?:[^{}]|\{[^{}]*\})*)\}"
        ),
        r"\1",
    ),
    (re.compile(r"\\(?:bf|rm|it)\b\s*|\\[,;:! ]|\\(?:left|right)\b|\\[()\[\]]|\$"), " "),
    (re.compile(r"\\([%&#_])"), r"\1"),
    (re.compile(r"\\?\^\s*\{?\\circ\}?|\\degree"), "°"),
    (re.compile(r"\\(?:times|cdot)\b"), "x"),
    (re.compile(r"(?<=[A-Za-z])\^\{?(-?\d+)\}?"), r"\1"),
)
_HTML = re.compile(r"</?(?:b|i|u|em|strong|p|br|span|div|code|sub|sup)\s*/?>", re.IGNORECASE)
_EMPHASIS = re.compile(
    r"\*\*|__|`+|^\s*#+\s*|^\s*>\s+|(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])", re.MULTILINE
)
_BULLETS = " •·✅✔☑👉➡→\ufe0f"
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|「[^「」]*」|『[^『』]*』")

_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2212\ufe63\uff0d\ufe58", "-"),
        **dict.fromkeys("‘’‛ʼ′`´", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
        "\u2044": "/",
        "\u2215": "/",
        "µ": "μ",
    }
)
_DASH = re.compile(r"[\u2013\u2014\u2015]+")
_SUPERSCRIPT = re.compile(r"(?<=\d)[⁺⁻]?[⁰¹²³⁴-⁹]+")
_MIXED_FRACTION = re.compile(r"(?<=\d)\s*(?=[¼-¾⅐-⅞])")


def plain(text: str) -> str:
    """Return a text with the plain form of each sign: dashes, quotes, full width, fractions, spaces."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFKC", _MIXED_FRACTION.sub(" ", text)).translate(_SIGNS)
    return _DASH.sub(_dash, text)


def _dash(match: re.Match[str]) -> str:
    """Read an en dash or em dash: a hyphen within a word or range, a minus before a number, else a break."""
    before, after = match.string[: match.start()], match.string[match.end() :]
    inside = before[-1:].isalnum() and after[:1].isalnum()
    is_minus = after[:1].isdigit() and not before[-1:].strip()
    return "-" if match[0] == "\u2013" and (inside or is_minus) else " - "


def without_thoughts(text: str) -> str:
    """Return what follows the thoughts, or stands before them; thoughts without an end are no answer."""
    text = _BEGIN_TOKEN.sub("", text, count=1) if text.lstrip().startswith("<") else text
    if "<" in text or "◁" in text or "[" in text:
        *_, last = [None, *_CLOSED.finditer(text)]
        if last is not None:
            after = text[last.end() :]
            text = after if after.strip() else _CLOSED.sub("", _WHOLE_THOUGHT.sub("", text))
        if opened := _OPENED.search(text):
            text = text[: opened.start()]
        if (end := _END_TOKEN.search(text)) and text[: end.start()].strip():
            text = text[: end.start()]
        return _END_TOKEN.sub("", text)
    return text


def clean(answer: str) -> str:
    """Return what an answer declares to be its answer, or all of it, without thoughts, tags and emphasis."""
    text = without_thoughts(plain(answer)).strip()
    if len(text) < 3:
        return text
    if "<" in text:
        if tagged := _ANSWER_TAG.findall(text):
            text = tagged[-1]
        text = _HTML.sub(lambda match: "\n" if "br" in match[0].lower() else "", text)
    if "{" in text:
        text = _boxed(text)
        if "{" in text:
            text = _from_json(text)
    if "\\" in text or "$" in text or "^" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    if any(sign in text for sign in "*_`#>"):
        text = _EMPHASIS.sub("", text)
    text = text.strip().lstrip(_BULLETS)
    return text[1:-1].strip() if _QUOTED.fullmatch(text) else text


def _boxed(text: str) -> str:
    r"""Return the content of the last ``\boxed{}``; the text itself without one."""
    *_, last = [None, *_BOX.finditer(text)]
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
    fenced = _FENCED.findall(text)
    inner = fenced[-1] if fenced else text[text.find("{") : text.rfind("}") + 1]
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(inner)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        found = _answer_of(value)
        return text if found is None else found
    fields = _ANSWER_FIELD.findall(text)
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
_UNITS = (
    "mg|kg|g|mcg|ug|μg|ng|ml|dl|l|cm|mm|μm|um|nm|m|mmhg|hz|khz|mhz|kv|kev|mev|bpm|iu|meq|mmol|mol|gy|mgy|sv|msv|t|"
    "ms|s|min|h|ci|mci|bq|mbq|weeks?|days?|months?|years?|hours?|minutes?"
)
# A number keeps its sign, point, fraction, exponent and range; a unit that is written onto it is a word of
# its own, other letters are not (3rd, 2D). Words are split at hyphens. A Chinese sign is a word.
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_WORD = re.compile(
    rf"(?<![\w.])-?(?:{_NUMBER})(?:e[+-]?\d+(?![^\W_]))?(?:/(?:{_NUMBER})|-(?:{_NUMBER}))?"
    rf"(?:(?=(?:{_UNITS})(?![^\W_{CHINESE}]))|\+(?![\w])|[^\W_{CHINESE}]*)"
    rf"|(?<=[\d])(?:{_UNITS})(?![^\W_{CHINESE}])"
    rf"|[{CHINESE}]|[^\W_{CHINESE}]{{1,3}}[+-](?![\w+-])|"
    rf"[^\W_{CHINESE}]+(?:'[^\W_{CHINESE}]+)*|%|[<>]=?|[≤≥]"
)
_PLAIN_NUMBER = re.compile(rf"-?(?:{_NUMBER})(?:e[+-]?\d+)?")
_ARTICLES = frozenset({"a", "an", "the"})
_SMALL_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_SAME_WORD = {
    **{word: str(number) for number, word in enumerate(_SMALL_NUMBERS)},
    "percent": "%",
    "≤": "<=",
    "≥": ">=",
}
_PHRASES = (
    (re.compile(r"\bper cent\b"), "%"),
    (re.compile(r"\b(?:less|fewer|lower|smaller|shorter) than (?=-?[\d.])"), "<"),
    (re.compile(r"\b(?:more|greater|higher|larger|longer) than (?=-?[\d.])"), ">"),
    (re.compile(r"(?<=\d) ?(?:to|-) ?(?=\d)"), "-"),
)
_DIGIT = re.compile(r"\d")
_SPELLING = (
    (re.compile(r"[ao]e"), "e"),  # anaemia, oedema
    (re.compile(r"(?<=..)our$"), "or"),
    (re.compile(r"(?<=..)ies$"), "y"),
    (re.compile(r"(?<=[a-z]{3})(?<![sui])s$"), ""),
)

_UNIT_NAMES = {
    "tesla": "t", "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm",
    "milligram": "mg", "gram": "g", "kilogram": "kg", "milliliter": "ml", "millilitre": "ml", "liter": "l",
    "litre": "l",
}  # fmt: skip


def spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each word in lower case, 2.0 as 2 and two as 2, with its start and end; without articles."""
    for match in _WORD.finditer(text.lower()):
        word = match[0]
        if word[0].isdigit() or word[0] in "-.":
            word = _number_word(word)
        if word not in _ARTICLES:
            yield _SAME_WORD.get(word, word), match.start(), match.end()


def _number_word(word: str) -> str:
    if not _PLAIN_NUMBER.fullmatch(word):
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
    if "per cent" in text or " than " in text or _DIGIT.search(text):
        for pattern, replacement in _PHRASES:
            text = pattern.sub(replacement, text)
    return tuple(word for word, _, _ in spans(text)) or tuple(_WORD.findall(text))


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
    if not needle:
        return []
    return [
        start
        for start in range(len(haystack) - length + 1)
        if haystack[start] == needle[0] and list(haystack[start : start + length]) == needle
    ]


# Numbers

_QUANTITY = re.compile(
    rf"(?:(?P<whole>-?\d+) )?(?P<number>-?(?:{_NUMBER})(?:\s*(?:e|"
    rf"[x×*]\s*10\^?\{{?)\s*(?P<power>[+-]?\d+)\}}?)?)"
    rf"(?:\s*/\s*(?P<below>{_NUMBER}))?\s*(?P<unit>%|[^\W\d_]*)",
)


def quantity(text: str) -> tuple[float, str] | None:
    """Return the number that a text is, and its unit: ``"1/2"``, ``".5 mg"``, ``"50 percent"``, ``"2e3"``.

    A percentage is a share of 1. None for anything else, e.g. a text with two numbers.
    """
    text = re.sub(r"\bper ?cent\b", "%", plain(text).lower()).strip().rstrip(".。")
    text = re.sub(r"^- (?=[\d.])", "-", text)
    text = " ".join(_SAME_WORD.get(word, word) for word in text.split())
    match = _QUANTITY.fullmatch(text)
    if match is None or (match["whole"] and not match["below"]):
        return None
    base = re.match(rf"-?(?:{_NUMBER})", match["number"])
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
