# SPDX-License-Identifier: Apache-2.0

"""Yes and no, in English and Chinese: of an answer, and of a gold answer."""

from __future__ import annotations

import re

from gmai_xtuner.evaluate.scoring.mentions import BEFORE
from gmai_xtuner.evaluate.scoring.mentions import RULES as MENTION_RULES
from gmai_xtuner.evaluate.scoring.rules import patterns
from gmai_xtuner.evaluate.scoring.text import clean, stems

YES = "yes"
NO = "no"

_CHINESE = {
    YES: (
        "是", "是的", "对", "对的", "對", "有", "有的", "包含", "可以", "能", "存在", "会", "會",
        "正确", "正確", "肯定", "肯定的",
    ),
    NO: (
        "否", "不", "不是", "不是的", "不对", "不對", "没有", "沒有", "无", "無", "不包含", "不可以", "不能",
        "不存在", "不会", "不會", "错误", "錯誤", "没", "否定", "否定的",
    ),
}  # fmt: skip
_POLARITY = {
    **{word: answer for answer, all_words in _CHINESE.items() for word in all_words},
    "yes": YES,
    "no": NO,
}
# One word that is the whole answer; not what a gold answer of "true" would mean
_WHOLE = {
    **_POLARITY,
    **dict.fromkeys(("yeah", "yep", "y", "true", "correct", "affirmative", "positive", "absolutely"), YES),
    **dict.fromkeys(("nope", "n", "false", "incorrect", "negative", "none"), NO),
}  # fmt: skip
_WORDS = "|".join(sorted(map(re.escape, (*_CHINESE[YES], *_CHINESE[NO])), key=len, reverse=True))
RULES = patterns("yes_no", words=_WORDS)

_SMALL = frozenset(
    stems(
        "is are was were do does did has have had can could there this that it any in of on to image picture "
        "photo scan show shown seen see visible present evidence sign be at for and you here given figure"
    )
)


def yes_or_no(answer: str, question: str = "") -> str | None:
    """Return ``yes`` or ``no``; None where an answer says neither, or both.

    It counts where it is the first word, is declared ("the answer is no") or stands apart within a sentence
    ("Based on the image, yes, ..."). "There is no effusion" says no where it denies what ``question`` asks
    in the question's own words; alone it does not, since it depends on the question.
    """
    text = clean(answer)
    whole = text.strip(" .。!,;:()[]\"'").lower()
    if whole in _WHOLE:
        return _WHOLE[whole]
    open_text = RULES["either"].sub("§", text)
    said = _said(open_text)
    if len(said) > 1 and (last := [*RULES["corrected"].finditer(open_text)]):
        said = _said(open_text[last[-1].end() :].lstrip(" ,:"))
    if said:
        return said.pop() if len(said) == 1 else None
    return None if open_text != text else _restated(text, question)


def _said(text: str) -> set[str]:
    found = [RULES["first"].match(text), *RULES["declared"].finditer(text)]
    found += [
        match
        for match in RULES["within"].finditer(text)
        if not BEFORE["condition"].search(text[: match.start(1)].rpartition(".")[2])
    ]
    said = {match[1].lower() for match in found if match}
    chinese = (RULES["chinese_first"].match(text), *RULES["chinese_declared"].finditer(text))
    return said | {_POLARITY[match[1]] for match in chinese if match}


def _restated(text: str, question: str) -> str | None:
    """Read one sentence that says of all the question's words that it is so, or that it is not."""
    asked = set(stems(question)) - _SMALL
    sentences = [part for part in RULES["sentence"].split(text) if part.strip()]
    if not (asked and sentences and RULES["asks"].match(question) and RULES["stated"].match(text)):
        return None
    first = sentences[0]
    denials = [match[0].lower() for match in RULES["denies"].finditer(first)]
    stated = [word for word in stems(first) if word not in _SMALL]
    fits = asked <= set(stated) and len(stated) <= len(asked) + 3 + len(denials)
    if (
        not fits
        or len(sentences) > 2
        or RULES["hedge"].search(text)
        or MENTION_RULES["refusal"].search(text)
    ):
        return None
    if len(denials) > 1 or any(word in asked for word in stems(" ".join(denials))):
        return None
    return NO if denials else YES


def polarity(gold: str) -> str | None:
    """Return ``yes`` or ``no`` of a gold answer, in English or Chinese; None for any other."""
    return _POLARITY.get(gold.strip().strip(".。").lower())
