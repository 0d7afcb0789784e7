# SPDX-License-Identifier: Apache-2.0

"""Did a translation keep what was said: labels, numbers, boxes, yes and no?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from data_tools.checks.claims import LabelFinder
from data_tools.checks.terms import Said, words_of
from data_tools.items import Conversation, Problem

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_POLARITY_EN = re.compile(r"^\s*(yes|no)\b", re.IGNORECASE)
_POLARITY_ZH = re.compile(r"^\s*(?:(?P<no>不|否|没有|无|未)|(?P<yes>是|有|对|能|可以))")
# Numbers that English has words for and Chinese writes as digits, and the other way round.
_ENGLISH = "zero one two three four five six seven eight nine ten"
_SMALL = {word: str(number) for number, word in enumerate(_ENGLISH.split(" "))}
_SMALL_ZH = {char: str(number) for number, char in enumerate("零一二三四五六七八九十")} | {
    "两": "2"
}
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
    what = Said((text,), text, text, words_of(text), chinese)
    return {(hit.meaning, hit.denied) for hit in finder.find(what)}


def _numbers_en(text: str) -> Counter[str]:
    words = Counter(_SMALL[word] for word in words_of(text) if word in _SMALL and word != "one")
    return Counter(_NUMBER.findall(text)) + words


def _numbers_zh(text: str) -> Counter[str]:
    counted = Counter(_SMALL_ZH[char] for char in _COUNTED_ZH.findall(text) if char != "一")
    return Counter(_NUMBER.findall(text)) + counted
