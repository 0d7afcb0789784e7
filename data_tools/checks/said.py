"""A conversation as the checks read it: the answers, split into words once."""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.checks.terms import words_of
from data_tools.items import Conversation


@dataclass(frozen=True, slots=True)
class Said:
    """What the model's turns say.

    Args:
        answers: their texts.
        text: all of them.
        plain: the text in lower case, with single spaces and straight apostrophes.
        words: `words_of` the text.
        chinese: whether it is to be read as Chinese.
    """

    answers: tuple[str, ...]
    text: str
    plain: str
    words: list[str]
    chinese: bool


def said(conversation: Conversation, *, chinese: bool) -> Said:
    """The answers of a conversation in one of the two languages."""
    answers = tuple(turn.text for turn in conversation if turn.speaker == "gpt")
    text = "\n".join(answers)
    return Said(answers, text, plain(text), words_of(text), chinese)


def plain(text: str) -> str:
    """As phrases are compared."""
    return " ".join(text.lower().replace("’", "'").split())
