"""Questions that say the same: equal after normalisation, or with most of their 3-grams in common.

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
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

import numpy as np

GRAM = 3
_ONE_BY_ONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_ONE_BY_ONE}]|[^\W_{_ONE_BY_ONE}]+")
_MARK = re.compile(r"<image(?:\s*\d+)?>", re.IGNORECASE)


def words(text: str) -> list[str]:
    """A text's words, or characters where words aren't written apart; nothing else of it counts."""
    plain = unicodedata.normalize("NFKC", _MARK.sub(" ", text)).casefold()
    return _WORD.findall(plain)


def normalised(text: str) -> str:
    """Two texts of the same words are this same text."""
    return " ".join(words(text))


def grams(text: str) -> frozenset[str]:
    """3-grams of a normalised text; of a shorter one itself; of an empty one none."""
    parts = text.split()
    if len(parts) < GRAM:
        return frozenset([text]) if parts else frozenset()
    return frozenset(" ".join(parts[at : at + GRAM]) for at in range(len(parts) - GRAM + 1))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """What two sets have in common over what they have together; 0 for two empty ones."""
    together = len(one | other)
    return len(one & other) / together if together else 0.0


_Size = TypeVar("_Size", int, np.ndarray)


class TextIndex:
    """Finds the texts that a text is near to.

    Args:
        texts: normalised, each once.
        threshold: smallest Jaccard index, above 0.
    """

    def __init__(self, texts: Sequence[str], *, threshold: float = 0.5) -> None:
        self.texts = list(texts)
        # 0.7 of 10 must be 7, not 7.000000000000001.
        share = Fraction(threshold).limit_denominator(10_000)
        self._above, self._below = share.numerator, share.denominator
        self._exact = {text: number for number, text in enumerate(self.texts)}
        self._sets = [grams(text) for text in self.texts]
        self._often = Counter(gram for one in self._sets for gram in one)
        self._sizes = np.array([len(one) for one in self._sets], dtype=np.int64)
        having: defaultdict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(self._sets):
            for gram in self._first(one):
                having[gram].append(number)
        self._having = {gram: np.array(numbers) for gram, numbers in having.items()}

    def near(self, text: str) -> list[tuple[int, float]]:
        """Numbers of the texts that are near a normalised text, with the index, nearest first."""
        own = grams(text)
        first = self._first(own) if own else []
        lists = [self._having[gram] for gram in first if gram in self._having]
        if not lists:
            return []
        candidates, shared = np.unique(np.concatenate(lists), return_counts=True)
        # So many grams must be in both sets. Those among the first of both are counted; of the others no
        # more can be shared than are left of one of them.
        sizes = self._sizes[candidates]
        needed = -(-self._above * (len(own) + sizes) // (self._above + self._below))
        left = np.maximum(len(own) - len(first), sizes - self._count_of_first(sizes))
        found = []
        for number in candidates[shared + left >= needed].tolist():
            other = self._sets[number]
            both = len(own & other)
            together = len(own) + len(other) - both
            if both * self._below >= self._above * together:
                found.append((number, both / together))
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))

    def equal(self, text: str) -> int | None:
        """Number of the text that is equal to a normalised text."""
        return self._exact.get(text)

    def _first(self, own: Iterable[str]) -> list[str]:
        """The rarest grams, of which one at least is shared with every near text."""
        ordered = sorted(own, key=lambda gram: (self._often[gram], gram))
        return ordered[: self._count_of_first(len(ordered))]

    def _count_of_first(self, size: _Size) -> _Size:
        return size + 1 - -(-self._above * size // self._below)  # the share needed, rounded up
