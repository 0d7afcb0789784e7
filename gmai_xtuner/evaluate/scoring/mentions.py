# SPDX-License-Identifier: Apache-2.0

"""Which of several things an answer names and means; and whether it says yes or no, in English or Chinese.

A mention counts unless a rule of :data:`BEFORE` fits the words before it in its clause, or one of
:data:`AFTER` those behind it: "pneumonia is ruled out", "no pneumonia", "to confirm pneumonia", "a history of
pneumonia", "less likely than pneumonia" and "is it pneumonia?" choose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from operator import eq
from typing import Generic, TypeVar

from gmai_xtuner.evaluate.scoring.text import (
    CHINESE,
    TABLES,
    agreed,
    find,
    patterns,
    spans,
    stem,
    stems,
)

Key = TypeVar("Key", bound=Hashable)
Names = Mapping[Key, Iterable[Sequence[str]]]

OTHER = "§"
"""Stands for another mention in the words around one."""
RULES = patterns("mentions", chinese=CHINESE)
BEFORE = patterns("before", chinese=CHINESE)
ASSERTED = patterns("asserted", chinese=CHINESE)
AFTER = patterns("after", chinese=CHINESE, other=OTHER)

_BEFORE_TERM = (
    "行议議予用做侧側合是为為在有选選和或与與不没非无的了示见見像到于属即断斷虑慮似呈患、"
)
_AFTER_TERM = "表影改的了吗嗎吧呢和或与與是在里中上内內可被较較更最为為未也均都应應及选選项項、"


@dataclass(frozen=True, slots=True)
class Mention(Generic[Key]):
    """A thing that a text names, from one character to another."""

    key: Key
    start: int
    end: int


def mentions(text: str, names: Names[Key]) -> list[Mention[Key]]:
    """Return where the things are named as whole words, the longest name where several overlap.

    Where the words around a name belong to a longer name ("diabetes mellitus" of "diabetes" and "diabetes
    mellitus type 1"), that one is named, too. ``names`` are thing -> the names that it goes by, each as the
    words of :func:`~.text.stems`.
    """
    said, placed = _placed(text)
    places = []
    for key, all_names in names.items():
        for name in all_names:
            for first in find(name, said):
                last = first + len(name)
                span = placed[first][0], placed[last - 1][1]
                around = (said[first - 1] if first else "", said[last] if last < len(said) else "")
                longer = _going_on(name, around, names, text[: span[0]])
                places += [Mention(one, *span) for one in (key, *longer)]
                places += _elided(text, name, span, names)
    found = [one for one in places if _is_whole(text, one.start, one.end)]

    def within(one: Mention[Key], other: Mention[Key]) -> bool:
        is_longer = other.end - other.start > one.end - one.start
        return is_longer and other.start <= one.start and one.end <= other.end

    return [one for one in found if not any(within(one, other) for other in found)]


def _going_on(
    name: Sequence[str], around: tuple[str, str], names: Names[Key], before: str
) -> set[Key]:
    """Return the things of a longer name with this one in it, and a word around it, or another kind."""
    subtype = RULES["subtype"].search(before)
    return {
        key
        for key, longer_names in names.items()
        for longer in longer_names
        if len(longer) > len(name)
        for first in find(name, longer)
        if (first and (longer[first - 1] == around[0] or subtype))
        or (first + len(name) < len(longer) and longer[first + len(name)] == around[1])
    }


def _elided(
    text: str, name: Sequence[str], span: tuple[int, int], names: Names[Key]
) -> list[Mention[Key]]:
    """Return names joined to one that has their common words: "anterior and lateral wall", "type 1 or 2"."""
    found: list[Mention[Key]] = []
    words, placed = _placed(text)
    for step in (-1, 1):  # common words at the end, at the beginning
        places = []
        for one, other in ((one, other) for one, all_names in names.items() for other in all_names):
            common = sum(takewhile(bool, map(eq, name[::step], other[::step])))
            if 0 < common < min(len(name), len(other)):
                rest = other[::step][common:][::step]
                for first in find(rest, words):
                    last = first + len(rest) - 1
                    places.append(Mention(one, placed[first][0], placed[last][1]))
        start, end = span
        for place in sorted(places, key=lambda place: step * place.start):
            gap = text[place.end : start] if step < 0 else text[end : place.start]
            if gap.strip() and RULES["joiner"].fullmatch(gap):
                found.append(place)
                start, end = place.start, place.end
    return found


@lru_cache(maxsize=16)  # the steps look for mentions in the same text
def _placed(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the stems of a text's words, and where each begins and ends."""
    found = list(spans(text))
    return [stem(word) for word, _, _ in found], [(start, end) for _, start, end in found]


def _is_whole(text: str, start: int, end: int) -> bool:
    """Chinese has no spaces: a term must not go on in a neighbouring sign, but for small words."""

    def goes_on(inside: str, outside: str, small: str) -> bool:
        is_chinese = all(map(RULES["chinese_sign"].match, (inside, outside)))
        return is_chinese and outside not in small

    before, after = text[start - 1 : start] if start else "", text[end : end + 1]
    goes_back = goes_on(text[start], before, _BEFORE_TERM)
    return not (goes_back or goes_on(text[end - 1], after, _AFTER_TERM))


def affirmed(text: str, found: Sequence[Mention[Key]]) -> set[Key]:
    """Return the things that are named, by at least one mention, and not denied by any other."""
    denied = {one.key for one in found if cancelled_by(text, one, found)}
    return {one.key for one in found} - denied


def cancelled_by(text: str, one: Mention[Key], others: Sequence[Mention[Key]] = ()) -> str | None:
    """Return the name of the rule by which a mention is not meant; None where it is.

    The own words of all ``others`` ("No pneumonia" as an option) deny nothing else.
    """
    sentence, rest, is_asked = _sentence(text, one, others)
    if is_asked:
        return "question"
    if text[one.start : one.end].lower() == "normal" and (
        RULES["part_is"].search(sentence) or RULES["part_of"].match(text, one.end)
    ):
        return "part"
    if RULES["head_noun"].match(text, one.end):
        return "head noun"
    if RULES["supposed"].match(sentence):
        return "condition"
    before, after = RULES["clause"].split(sentence)[-1], RULES["clause"].split(rest)[0]
    if not before.strip() and BEFORE["queried"].search(text[: one.start]):
        return "queried"
    for rules, context in ((BEFORE, before), (AFTER, after)):
        if context.strip():
            for name, rule in rules.items():
                if rule.search(context):
                    return name
    return "verdict" if AFTER["verdict"].match(rest) else None


def _sentence(
    text: str, one: Mention[Key], others: Sequence[Mention[Key]]
) -> tuple[str, str, bool]:
    """Return what stands before and behind a mention in its sentence, and whether that is a question."""
    ends = [0, *(match.end() for match in RULES["sentence_end"].finditer(text))]
    begin = max(end for end in ends if end <= one.start)
    sentence_end = RULES["sentence_end"].search(text, one.end)
    stop = sentence_end.start() if sentence_end else len(text)
    before, behind = _masked(text, begin, one.start, others), _masked(text, one.end, stop, others)
    return before, behind, text[stop : stop + 1] in ("?", "？")


def is_asserted(text: str, one: Mention[Key]) -> bool:
    """Tell whether a mention is a statement by itself, no word in a sentence about something else."""
    if ASSERTED["chinese"].search(text):
        return True
    sentence, rest, _ = _sentence(text, one, ())
    before, after = RULES["clause"].split(sentence)[-1], RULES["clause"].split(rest)[0]
    label = ASSERTED["label"].search(text[: one.start])  # "B. Lung" alone, not one of a list
    is_own = label is None or (label[1] == one.key and rest.strip(" .:-").lower() in ("", YES))
    return is_own and all(
        ASSERTED[side].search(part) for side, part in (("before", before), ("after", after))
    )


def _masked(text: str, start: int, end: int, others: Sequence[Mention[Key]]) -> str:
    """Return a part of a text, other mentions in it as :data:`OTHER`."""
    pieces, position = [], start
    for other in sorted(others, key=lambda other: other.start):
        if position <= other.start and other.end <= end:
            pieces += [text[position : other.start], OTHER]
            position = other.end
    return "".join([*pieces, text[position:end]])


# Yes and no

YES = "yes"
NO = "no"
_POLARITY = {word: said for said, words in TABLES["polarity"].items() for word in words}
_ALONE = {word: said for said, words in TABLES["whole_answer"].items() for word in words}
_FINDINGS = {word: said for said, words in TABLES["whole_finding"].items() for word in words}
_FINDING_WORDS = frozenset(stems(" ".join(_FINDINGS)))
_WHOLE = _POLARITY | _ALONE
"""One word that is the whole answer; not what a gold answer of "true" would mean."""
_CHINESE_WORDS = sorted((word for word in _POLARITY if not word.isascii()), key=len, reverse=True)
YES_NO = patterns("yes_no", chinese=CHINESE, words="|".join(_CHINESE_WORDS))
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
    return agreed(answer, lambda text: _yes_or_no(text, question))


def _yes_or_no(text: str, question: str) -> str | None:
    whole = text.strip(" .。!,;:()[]\"'").lower()
    if whole in _WHOLE:
        return _WHOLE[whole]
    if whole in _FINDINGS:
        return _FINDINGS[whole] if YES_NO["asks"].match(question) else None
    open_text = YES_NO["either"].sub("§", text)
    said = _said(open_text)
    if last := [*YES_NO["corrected"].finditer(open_text)]:
        said = _said(open_text[last[-1].end() :].lstrip(" ,:")) or (
            said if len(said) == 1 else set()
        )
    if said:
        return said.pop() if len(said) == 1 else None
    return None if open_text != text else _restated(text, question)


def _said(text: str) -> set[str]:
    found = [YES_NO["first"].match(text), *YES_NO["declared"].finditer(text)]
    within = (
        (one, text[: one.start(1)].rpartition(".")[2]) for one in YES_NO["within"].finditer(text)
    )
    found += [
        one
        for one, before in within
        if not (BEFORE["condition"].search(before) or RULES["supposed"].match(before))
    ]
    said = {match[1].lower() for match in found if match}
    chinese = (YES_NO["chinese_first"].match(text), *YES_NO["chinese_declared"].finditer(text))
    return said | {_POLARITY[match[1]] for match in chinese if match}


def _restated(text: str, question: str) -> str | None:
    """Read one sentence that says of all the question's words that it is so, or that it is not."""
    finding = YES_NO["chinese_finding"].fullmatch(text.rstrip("。."))
    if finding and finding[2] in question:
        is_plain = not re.search("没|沒|无|無|不|未", re.sub("有没有|是不是", "", question))
        return (NO if finding[1] else YES) if is_plain else None
    asked = set() if text.startswith("?") else set(stems(question)) - _SMALL
    sentences = [part for part in YES_NO["sentence"].split(text) if part.strip()]
    if not (asked and sentences and YES_NO["asks"].match(question)):
        return None
    first = sentences[0]
    denials = [match[0].lower() for match in YES_NO["denies"].finditer(first)]
    stated = [word for word in stems(first) if word not in _SMALL]
    stated += ["with"] if "without" in stated else []
    order = [word for word in stems(question) if word in asked]
    said = set(stated) - {"not", "without", NO}
    if len(sentences) == 1 and len(first.split()) < 4 and set(order[-1:]) <= said <= asked:
        return NO if denials else YES  # "not enlarged"
    if not YES_NO["stated"].match(text) and not set(stated) <= asked | _FINDING_WORDS:
        return None
    fits = asked <= set(stated) and len(stated) <= len(asked) + 3 + len(denials)
    if stated[:1] == [NO] and len(asked) < 4 and set(stated[1:]) & asked:  # "No effusion."
        fits = fits or set(stated[1:]) <= asked
    unsure = YES_NO["hedge"].search(text) or RULES["refusal"].search(text)
    if not fits or unsure or len(sentences) > 2:
        return None
    if len(denials) > 1 or any(word in asked for word in stems(" ".join(denials))):
        return None
    return NO if denials else YES


def polarity(gold: str) -> str | None:
    """Return ``yes`` or ``no`` of a gold answer, in English or Chinese; None for any other."""
    return _POLARITY.get(gold.strip().strip(".。").lower())
