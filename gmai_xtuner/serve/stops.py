"""Texts that end an answer, found in a stream of pieces that may cut them anywhere."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Hands text on up to the first stop text, and holds back what may become one.

    Args:
        texts: none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.found = False
        self._held = ""

    def add(self, piece: str) -> str:
        """What can be handed on now; nothing after a stop text."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self.texts), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when no more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
