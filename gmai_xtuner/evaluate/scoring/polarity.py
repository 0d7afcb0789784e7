"""Yes and no, in English and Chinese."""

from __future__ import annotations

import re

from gmai_xtuner.evaluate.scoring.text import clean

YES = "yes"
NO = "no"

_CHINESE = {
    YES: ("是", "是的", "对", "对的", "有", "有的", "包含", "可以", "能", "存在", "会", "正确"),
    NO: (
        "否", "不", "不是", "不是的", "不对", "没有", "无", "不包含", "不可以", "不能", "不存在", "不会",
        "错误",
    ),
}  # fmt: skip
_POLARITY = {
    **{word: answer for answer, all_words in _CHINESE.items() for word in all_words},
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
    """``yes`` or ``no``; None where an answer says neither, or both.

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
    """``yes`` or ``no`` of a gold answer, in English or Chinese; None for any other."""
    return _POLARITY.get(gold.strip().strip(".。").lower())
