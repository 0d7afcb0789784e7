# SPDX-License-Identifier: Apache-2.0

"""Questions of a benchmark that the corpus asks as well, and whether about the same image.

A text is taken apart into words, Chinese, Japanese and Korean into characters; case, punctuation, width and
``<image>`` marks don't count. Two texts are near if the Jaccard index of their sets of 3-grams of words is at
least 0.5. A text of fewer than three words is one gram, itself.

The index is exact where MinHash estimates it: 3-grams are put into one order, rare ones first, and two sets
with Jaccard ``t`` have one in common among the first ``n - ceil(t n) + 1`` of each (Bayardo, Ma and Srikant,
"Scaling up all pairs similarity search", WWW 2007). Questions of a benchmark are mostly told apart by rare
ones, so few are compared. benchmarks/overlap.py holds it against datasketch's MinHash LSH.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from data_tools.contamination.benchmark import Item
from gmai_xtuner.core.conversation import Conversation

EXAMPLES = 3
GRAM = 3
_REMEMBERED = 200_000
"""Questions of the corpus whose hits are kept: templates come again and again."""

_ONE_BY_ONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_ONE_BY_ONE}]|[^\W_{_ONE_BY_ONE}]+")
_MARK = re.compile(r"<image(?:\s*\d+)?>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Asked:
    """A turn of the corpus that asks what the benchmark asks.

    ``same_answer``: it is also answered alike; ``same_picture``: about an image of that question.
    """

    dataset: str
    id: str
    question: str
    answer: str
    jaccard: float
    same_answer: bool
    same_picture: bool


@dataclass(slots=True)
class TextHits:
    """The turns of the corpus that ask one text of the benchmark: how many, and the surest of them."""

    equal: int = 0
    near: int = 0
    examples: list[Asked] = field(default_factory=list)

    def add(self, asked: Asked) -> None:
        self.equal += asked.jaccard == 1
        self.near += asked.jaccard != 1
        self.examples.append(asked)
        if len(self.examples) > EXAMPLES:
            self.examples.sort(
                key=lambda a: (-a.same_picture, -a.same_answer, -a.jaccard, a.dataset, a.id)
            )
            del self.examples[EXAMPLES:]


class Questions:
    """The benchmark's questions, ready to be found; ``threshold``: smallest Jaccard index of near texts.

    Attributes:
        texts, of_text: normalised texts, and the positions of the items that each belongs to.
        hits: text -> what asks it.
        both: item -> what asks it of one of its images.
        whole: dataset and id of conversations that are an item without an image, word for word.
    """

    def __init__(self, items: Sequence[Item], *, threshold: float) -> None:
        self.items = items
        of_text: defaultdict[str, list[int]] = defaultdict(list)
        for number, item in enumerate(items):
            for text in dict.fromkeys(normalised(text) for text in item.texts):
                if text:
                    of_text[text].append(number)
        self.texts, self.of_text = list(of_text), list(of_text.values())
        self._answers = [
            {normalised(items[number].answer) for number in numbers} - {""}
            for numbers in self.of_text
        ]
        self._index = TextIndex(self.texts, threshold=threshold)
        self._known: dict[str, list[tuple[int, float]]] = {}
        self.hits: dict[int, TextHits] = {}
        self.both: dict[int, Asked] = {}
        self.whole: list[tuple[int, str]] = []

    def look_at(
        self, dataset: int, name: str, conversation: Conversation, images: frozenset[int]
    ) -> None:
        """Note what a conversation of a dataset has in common with the benchmark.

        ``images`` are those of the benchmark that are among, or look like, the conversation's.
        """
        turns = [turn.text for turn in conversation.turns if turn.role != "system"]
        is_whole = False
        for question, reply in zip(turns[::2], turns[1::2], strict=True):
            text = normalised(question)
            found = self._find(text)
            if not found:
                continue
            answer = normalised(reply)
            for number, jaccard in found:
                same_answer = answer in self._answers[number]
                shared = [
                    place
                    for place in (self.of_text[number] if images else ())
                    if images.intersection(self.items[place].images)
                ]
                asked = Asked(
                    name, conversation.id, question, reply, jaccard, same_answer, bool(shared)
                )
                self.hits.setdefault(number, TextHits()).add(asked)
                for place in shared:
                    if place not in self.both or jaccard > self.both[place].jaccard:
                        self.both[place] = asked
                is_whole |= (
                    jaccard == 1
                    and same_answer
                    and not conversation.images
                    and len(text.split()) >= GRAM
                    and any(
                        not item.images and normalised(item.answer) == answer
                        for item in map(self.items.__getitem__, self.of_text[number])
                    )
                )
        if is_whole:
            self.whole.append((dataset, conversation.id))

    def _find(self, text: str) -> list[tuple[int, float]]:
        found = self._known.get(text)
        if found is None:
            equal = self._index.equal(text)
            # Other texts may have the same 3-grams in another order: near, but not equal.
            near = [(n, min(j, 0.9999)) for n, j in self._index.near(text) if n != equal]
            found = near if equal is None else [(equal, 1.0), *near]
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[text] = found
        return found


def normalised(text: str) -> str:
    """Return a text's words, or characters where words aren't written apart; nothing else of it counts."""
    plain = unicodedata.normalize("NFKC", _MARK.sub(" ", text)).casefold()
    return " ".join(_WORD.findall(plain))


def grams(text: str) -> frozenset[str]:
    """Return the 3-grams of a normalised text; of a shorter one itself; of an empty one none."""
    parts = text.split()
    if len(parts) < GRAM:
        return frozenset([text]) if parts else frozenset()
    return frozenset(" ".join(parts[at : at + GRAM]) for at in range(len(parts) - GRAM + 1))


class TextIndex:
    """Finds the texts that a text is near to; all are normalised, and ``threshold`` is above 0."""

    def __init__(self, texts: Sequence[str], *, threshold: float = 0.5) -> None:
        # 0.7 of 10 must be 7, not 7.000000000000001.
        share = Fraction(threshold).limit_denominator(10_000)
        self._above, self._below = share.numerator, share.denominator
        self._exact = {text: number for number, text in enumerate(texts)}
        having: defaultdict[str, list[int]] = defaultdict(list)
        sizes = []
        for number, text in enumerate(texts):
            sizes.append(len(own := grams(text)))
            for gram in own:
                having[gram].append(number)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._having = {gram: np.array(numbers) for gram, numbers in having.items()}

    def near(self, text: str) -> list[tuple[int, float]]:
        """Return the positions of texts near a normalised text, each with its index, nearest first."""
        own = grams(text)
        lists = [self._having[gram] for gram in own if gram in self._having]
        if not lists:
            return []
        candidates, both = np.unique(np.concatenate(lists), return_counts=True)
        together = len(own) + self._sizes[candidates] - both
        close = both * self._below >= self._above * together
        found = zip(candidates[close].tolist(), (both / together)[close].tolist(), strict=True)
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))

    def equal(self, text: str) -> int | None:
        """Return the position of the text that is equal to a normalised text."""
        return self._exact.get(text)
