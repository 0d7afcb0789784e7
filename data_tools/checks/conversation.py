"""Is it a conversation at all: turns, image marks, language, length."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_tools.checks.options import CheckOptions
from data_tools.checks.said import Said
from data_tools.items import IMAGE, TEXT_FORMS, Conversation, Item, Problem

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LETTERS = re.compile(r"[A-Za-z]+|[\u3400-\u9fff]")
_SENTENCE = re.compile(r"[^.。!！?？\n]{24,}[.。!！?？\n]")
# Forms whose answers are sentences; of perception a letter may be enough.
_SENTENCES = ("caption", "region_caption", "instruction", "dialogue", *TEXT_FORMS)


def turns(conversation: Conversation, item: Item) -> Iterator[Problem]:
    """Human and gpt in turn, nothing empty, one image mark at the head or none in a text form."""
    if not conversation or len(conversation) % 2:
        yield Problem("turns don't alternate", f"{len(conversation)} turns; give an answer to each")
        return
    for number, turn in enumerate(conversation):
        if turn.speaker != ("human", "gpt")[number % 2]:
            yield Problem("turns don't alternate", f"turn {number + 1} is of {turn.speaker!r}")
            return
        if not turn.text.strip() or turn.text.strip() == IMAGE:
            yield Problem("empty turn", f"turn {number + 1} says nothing")
    marks = sum(turn.text.count(IMAGE) for turn in conversation)
    expected = 0 if item.form in TEXT_FORMS else 1
    if marks != expected:
        yield Problem("wrong number of image marks", f"{marks} of {IMAGE} instead of {expected}")
    elif expected and not conversation[0].text.startswith(IMAGE):
        yield Problem("image mark isn't first", f"{IMAGE} stands in the middle of a turn")


def length(what: Said, item: Item, options: CheckOptions) -> Iterator[Problem]:
    """Within the bounds; Chinese characters count as words."""
    numbers = [_number_of_words(answer) for answer in what.answers]
    if item.form in _SENTENCES and sum(numbers) < options.min_words:
        yield Problem(
            "answer too short", f"{sum(numbers)} words, at least {options.min_words} wanted"
        )
    if max(numbers, default=0) > options.max_words:
        yield Problem(
            "answer too long", f"{max(numbers)} words, at most {options.max_words} wanted"
        )


def language(what: Said, item: Item, options: CheckOptions) -> Iterator[Problem]:
    """The answers are in the item's language; a name or an option letter in another is none of it."""
    if what.text.isascii() and (item.language == "en" or item.form == "perception"):
        return
    letters = _LETTERS.findall(what.text)
    if not letters or (item.form == "perception" and len(letters) < 4):
        return
    chinese = sum(1 for letter in letters if letter >= "\u3400") / len(letters)
    share = chinese if item.language == "zh" else 1 - chinese
    if share < options.language_share:
        name = {"en": "English", "zh": "Chinese"}[item.language]
        yield Problem("wrong language", f"only {share:.0%} of it is {name}; write {name}")


def repetition(what: Said) -> Iterator[Problem]:
    """No sentence comes back within one answer."""
    for answer in what.answers:
        if len(answer) < 48:
            continue
        sentences = [sentence.strip().lower() for sentence in _SENTENCE.findall(answer)]
        if len(set(sentences)) < len(sentences):
            again = next(sentence for sentence in sentences if sentences.count(sentence) > 1)
            yield Problem("sentence repeated", again[:120])
            return


def _number_of_words(text: str) -> int:
    if text.isascii():
        return text.count(" ") + 1
    return len(_CHINESE.findall(text)) + len(_CHINESE.sub(" ", text).split())
