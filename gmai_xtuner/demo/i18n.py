# SPDX-License-Identifier: Apache-2.0

"""What the page says, in English and Chinese, and errors that can be said in both; `words.yaml` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from gmai_xtuner.core.errors import GMAIError

Language = Literal["en", "zh"]
LANGUAGES: dict[Language, str] = {"en": "English", "zh": "中文"}

BANNER = {
    "en": "Research software. Not a medical device, not for clinical use: answers can be wrong.",
    "zh": "研究用软件，非医疗器械，不得用于临床：回答可能有误。",
}
"""Shown in both languages whichever the interface has."""

_FILE: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
)
WORDS: dict[str, dict[Language, str]] = _FILE["words"]
ERRORS: dict[str, dict[Language, str]] = _FILE["errors"]


class Preset(NamedTuple):
    """A task: its stable name, what its button says, and a question that may be changed before it is sent."""

    key: str
    name: dict[Language, str]
    question: dict[Language, str]


PRESETS = tuple(Preset(**task) for task in _FILE["tasks"])


class PageError(GMAIError):
    """A message to a visitor of the page: a key of `ERRORS`, and the values that are filled in."""

    def __init__(self, key: str, **values: Any) -> None:
        self.key, self.values = key, values
        super().__init__(self.said("en"))

    def said(self, language: Language) -> str:
        """Return the message in a language."""
        values = dict(self.values)
        if values.get("name") in WORDS:  # of a field of the page
            values["name"] = say(values["name"], language)
        return ERRORS[self.key][language].format(**values)


def say(key: str, language: Language, **values: Any) -> str:
    """Return words of the page (a key of `WORDS`) in a language, with ``values`` filled in."""
    return WORDS[key][language].format(**values)
