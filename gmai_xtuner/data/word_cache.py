# SPDX-License-Identifier: Apache-2.0

"""Token ids of a text from those of its words, where that is provably the same."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from tokenizers import Tokenizer

_MARK = "\u2581"
_LONGEST_WORD = 40
_MOST_WORDS = 300_000
_OTHER_KINDS = (*("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"),)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>$")


def encode_whole(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens."""
    encodings: list[Any] = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


class WordCache:
    """Tokenises texts word by word and remembers the words.

    A byte-pair tokenizer of sentencepiece's kind (InternLM2's, Llama's) writes ``▁`` for a space and merges
    over the whole text. No merge joins the end of one word with the mark of the next unless the merge table
    has one that does so; then words can be tokenised apart, and most words have been seen before. :meth:`of`
    reads the table and refuses every tokenizer for which the proof does not hold; a text with two spaces in a
    row, or with a space behind a character that such a merge begins with, is tokenised whole.

    ``glued`` are characters behind which a space does not part words; a text with the ``unknown`` id, whose
    runs the tokenizer fuses, is tokenised whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, glued: str, unknown: int | None) -> None:
        self._encode = partial(encode_whole, tokenizer)
        self._together = [_MARK, "  ", *(character + " " for character in glued)]
        self._unknown = unknown
        self._first: dict[str, list[int]] = {}
        self._later: dict[str, list[int]] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordCache | None:
        """Return a cache, or ``None`` where words apart might get other ids than the text."""
        state = json.loads(tokenizer.to_str())
        model, normalizer = state["model"], state["normalizer"]
        if normalizer is not None and normalizer.get("type") == "Sequence":
            steps = normalizer["normalizers"]
            normalizer = steps[0] if len(steps) == 1 else None
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
        replaces_spaces = normalizer is not None and replaces.items() <= normalizer.items()
        plain_model = model["type"] == "BPE" and not any(map(model.get, _OTHER_KINDS))
        if not replaces_spaces or not plain_model or state["pre_tokenizer"] is not None:
            return None
        unknown = tokenizer.token_to_id(model["unk_token"] or "")
        if unknown is None and tokenizer.token_to_id(_MARK) is None:
            return None  # the mark would vanish, and what it parts would meet
        for token in state["added_tokens"]:
            flags = (token["single_word"], token["lstrip"], token["rstrip"], token["normalized"])
            if any(flags) or " " in token["content"] or _MARK in token["content"]:
                return None
        merges = [
            merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
        ]
        before_mark = {left for left, right in merges if right.startswith(_MARK)}
        if any(_BYTE.search(left) for left in before_mark):
            return None  # its last character is unknown
        glued = "".join(sorted({left[-1] for left in before_mark} - {_MARK}))
        return cls(tokenizer, glued=glued, unknown=unknown)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as the tokenizer gives them without special tokens."""
        words = [
            None if any(mark in text for mark in self._together) else text.split(" ")
            for text in texts
        ]
        whole = [text for text, parts in zip(texts, words, strict=True) if parts is None]
        known = dict(zip(whole, self._encode(whole), strict=True))
        long_words = self._learn([parts for parts in words if parts])
        found = []
        for text, parts in zip(texts, words, strict=True):
            if parts is None:
                found.append(known[text])
                continue
            ids = list(self._first[parts[0]])
            for word in parts[1:]:
                ids += self._later[word]
            if self._unknown is not None and self._unknown in ids:
                (ids,) = self._encode([text])
            found.append(ids)
        for word in long_words:
            self._first.pop(word, None)
            self._later.pop(word, None)
        return found

    def _learn(self, texts: Sequence[list[str]]) -> list[str]:
        """Put every word of these texts into the two caches.

        Returns:
            long ones (a sentence of Chinese is one), seldom seen again, to be forgotten after use.
        """
        if len(self._first) + len(self._later) > _MOST_WORDS:
            self._first.clear()
            self._later.clear()
        first = list({parts[0] for parts in texts} - self._first.keys())
        later = list(set().union(*(parts[1:] for parts in texts)) - self._later.keys())
        if not first and not later:
            return []
        ids = self._encode([*first, *(" " + word for word in later)])
        self._first.update(zip(first, ids[: len(first)], strict=True))
        self._later.update(zip(later, ids[len(first) :], strict=True))
        return [word for word in (*first, *later) if len(word) > _LONGEST_WORD]
