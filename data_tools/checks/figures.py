# SPDX-License-Identifier: Apache-2.0

"""Are numbers and sizes those of the annotation, and does a translation keep what was said?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from data_tools.checks.claims import LabelFinder
from data_tools.checks.terms import Hit, Said, words_of
from data_tools.items import Conversation, Item, Problem
from data_tools.records import ANYTHING, Label, Record

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: number for number, word in enumerate(_WORDS)}
_NUMBERS_ZH = {sign: number for number, sign in enumerate("零一二三四五六七八九十")} | {"两": 2}
_NUMBER_ZH = r"(\d+|[一二两三四五六七八九十])\s*[个处枚颗块条根把只片团节]"
_BEFORE_ZH = re.compile(_NUMBER_ZH + r"(?:的?[^\d，。；、！？\n的]{0,5}的?)$")
_AFTER_ZH = re.compile(r"(?:区域)?(?:[，,]?共|有|约|数为)*\s*" + _NUMBER_ZH)
_NOT_COUNTS = frozenset(("grade", "stage", "type", "level", "phase", "class", "of", "least"))
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:%|percent|per cent)")
_LENGTH = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:mm|cm|millimet|centimet|毫米|厘米|公分)(?![a-z]*\d)")
_WIDTH, _HEIGHT = re.compile(r"width|wide|宽"), re.compile(r"height|tall|high|高")
_LARGE, _SMALL = ("large", "huge", "giant", "big"), ("small", "tiny", "minute", "little")
_LARGE_ZH = re.compile("(?:巨大|较大|很大|大)的?$")
_SMALL_ZH = re.compile("(?:微小|较小|很小|小)的?$")


def counts(what: Said, item: Item, record: Record, finder: LabelFinder) -> Iterator[Problem]:
    """Yield a number of a label's regions that isn't the annotation's."""
    there = Counter(label.name for label in record.labels if label.box)
    if item.kind == "counting" and item.focus is not None:
        name = record.labels[item.focus].name
        if what.text.strip().isdigit() and int(what.text) != there[name]:
            yield Problem("number contradicted", f"{what.text} of {name}; there are {there[name]}")
    for hit in finder.find(what):
        count = there[hit.meaning]
        number = (_number_zh if what.chinese else _number)(what, hit)
        if not count or number is None or hit.denied or number == count:
            continue
        if number == 1 and (item.focus is not None or what.chinese):
            continue  # "one nodule" of a region, and 一个 as an article
        yield Problem("number contradicted", f"{number} of {hit.meaning}; there are {count}")
        return


def _number(what: Said, hit: Hit) -> int | None:
    words = what.words
    at = hit.start - 1
    for _ in range(4):
        word = words[at] if at >= 0 else "."
        number = int(word) if word.isdigit() and len(word) < 4 else _NUMBERS.get(word) or None
        if number is not None:
            before = words[at - 1] if at else ""
            is_of = word == "one" and words[at + 1] == "of"
            return None if before in _NOT_COUNTS or is_of else number
        if not word.isalpha() or word in ("and", "or", "with", "a", "an"):
            break
        at -= 1
    after = words[hit.end : hit.end + 2]
    if len(after) == 2 and after[0] in ("(", ":") and after[1].isdigit():
        return int(after[1])
    return None


def _number_zh(what: Said, hit: Hit) -> int | None:
    found = _BEFORE_ZH.search(what.text[max(0, hit.start - 14) : hit.start])
    found = found or _AFTER_ZH.match(what.text[hit.end : hit.end + 10])
    if not found:
        return None
    return int(found[1]) if found[1].isdigit() else _NUMBERS_ZH[found[1]]


def sizes(what: Said, item: Item, record: Record, finder: LabelFinder) -> Iterator[Problem]:
    """Yield shares of the image that are no region's, lengths that nothing says, and "large" for small."""
    labels = record.labels if item.focus is None else (record.labels[item.focus],)
    shares = [_shares(label, record) for label in labels if label.box]
    text = what.text.lower()
    for match in _PERCENT.finditer(text):
        before, after = text[max(0, match.start() - 14) : match.start()], text[match.end() :][:28]
        axis = _axis(before[::-1] if what.chinese else after)
        if axis is not None and shares:
            said = float(match[1]) / 100
            if not any(abs(said - one[axis]) <= max(0.03, 0.15 * one[axis]) for one in shares):
                yield Problem("size contradicted", f"no region spans {match[0]} of that side")
                return
    facts = " ".join(
        (*record.attributes.values(), *(v for one in labels for v in one.attributes.values()))
    )
    for match in _LENGTH.finditer(text):
        if match[1] not in facts:
            yield Problem("size isn't known", f"nothing says {match[0]}")
            return
    for hit in finder.find(what):
        of = [_shares(one, record) for one in labels if one.box and one.name == hit.meaning]
        adjective = _adjective(what, hit)
        if len(of) == 1 and (adjective, True) in ((1, max(of[0]) < 0.12), (-1, min(of[0]) > 0.4)):
            yield Problem("size contradicted", f"it calls {hit.meaning} large or small")
            return


def _shares(label: Label, record: Record) -> tuple[float, float]:
    x1, y1, x2, y2 = label.box or (0, 0, 0, 0)
    return (x2 - x1) / record.width, (y2 - y1) / record.height


def _axis(text: str) -> int | None:
    """Return which side a share is of, by the word that comes first: 0 for the width, 1 for the height."""
    found = [
        (match.start(), axis)
        for axis, word in enumerate((_WIDTH, _HEIGHT))
        if (match := word.search(text))
    ]
    return min(found)[1] if found else None


def _adjective(what: Said, hit: Hit) -> int:
    """Return 1 for a large label, -1 for a small one, else 0."""
    if what.chinese:
        before = what.text[max(0, hit.start - 4) : hit.start]
        return bool(_LARGE_ZH.search(before)) - bool(_SMALL_ZH.search(before))
    word = what.words[hit.start - 1] if hit.start else ""
    return (word in _LARGE) - (word in _SMALL)


def perceived(
    conversation: Conversation, item: Item, record: Record, finder: LabelFinder
) -> Iterator[Problem]:
    """Yield a question on a label, with an answer in one word, that the annotation answers otherwise."""
    if item.form != "perception":
        return
    question, answer = conversation[0].text, conversation[1].text.strip()
    own = set(record.names)
    uncertain = set(record.incomplete) - own

    def named(text: str) -> set[str]:
        chinese = item.language == "zh"
        return {hit.meaning for hit in finder.find(Said.of(text, chinese=chinese))}

    if item.kind in ("detection", "counting", "localisation") and item.focus is not None:
        if record.labels[item.focus].name not in (found := named(question)) and found:
            yield Problem("another label claimed", f"it asks for {', '.join(sorted(found))}")
    elif item.kind == "yes_no" and (found := named(question)) and not found & uncertain:
        if ANYTHING not in uncertain and (answer in ("Yes", "是")) != bool(found & own):
            yield Problem("wrong answer", f"{answer} to {', '.join(sorted(found))}")
    elif item.kind == "multiple_choice":
        options = dict(line.split(". ", 1) for line in question.splitlines() if line[1:3] == ". ")
        if options and not named(options.get(answer, "")) & own:
            yield Problem("wrong answer", f"{answer} is none of {', '.join(sorted(own))}")


# --- translations ---------------------------------------------------------------------------------

_FIGURES = re.compile(r"\d+(?:[.,]\d+)*")
_POLARITY_EN = re.compile(r"^\s*(yes|no)\b", re.IGNORECASE)
_POLARITY_ZH = re.compile(r"^\s*(?:(?P<no>不|否|没有|无|未)|(?P<yes>是|有|对|能|可以))")
# Numbers that English has words for and Chinese writes as digits, and the other way round.
_COUNTED_ZH = re.compile(r"([零一二两三四五六七八九十])(?=[个处枚颗只条块例张])")


def translation(
    conversation: Conversation, original: Conversation, finder: LabelFinder
) -> Iterator[Problem]:
    """Yield what the Chinese ``conversation`` lost or changed of the English ``original``."""
    if len(conversation) != len(original):
        yield Problem("translation has other turns", f"{len(conversation)}, not {len(original)}")
        return
    for number, (made, first) in enumerate(zip(conversation, original, strict=True), 1):
        before, after = _numbers_en(first.text), _numbers_zh(made.text)
        if before != after:
            lost = sorted((before - after).elements())
            added = sorted((after - before).elements())
            yield Problem(
                "translation changes a number",
                f"turn {number}: lost {', '.join(lost) or 'none'}, added {', '.join(added) or 'none'}",
            )
            return
        labels_before = _labels(finder, first.text, chinese=False)
        labels_after = _labels(finder, made.text, chinese=True)
        if labels_before != labels_after:
            differ = ", ".join(sorted({name for name, _ in labels_before ^ labels_after}))
            yield Problem("translation changes a finding", f"turn {number}: {differ}")
            return
        english, chinese = _POLARITY_EN.match(first.text), _POLARITY_ZH.match(made.text)
        if english and chinese and (english[1].lower() == "yes") != bool(chinese["yes"]):
            yield Problem("translation turns yes into no", f"turn {number}")
            return


def _labels(finder: LabelFinder, text: str, *, chinese: bool) -> set[tuple[str, bool]]:
    return {(hit.meaning, hit.denied) for hit in finder.find(Said.of(text, chinese=chinese))}


def _numbers_en(text: str) -> Counter[str]:
    words = (word for word in words_of(text) if word in _NUMBERS and word != "one")
    return Counter(_FIGURES.findall(text)) + Counter(str(_NUMBERS[word]) for word in words)


def _numbers_zh(text: str) -> Counter[str]:
    signs = (sign for sign in _COUNTED_ZH.findall(text) if sign != "一")
    return Counter(_FIGURES.findall(text)) + Counter(str(_NUMBERS_ZH[sign]) for sign in signs)
