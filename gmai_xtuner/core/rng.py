# SPDX-License-Identifier: Apache-2.0

"""Seeded choices that cost well under a microsecond: a generator is made for every conversation."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def seed_of(text: str, seed: int) -> int:
    """Return 63 bits that depend on ``text`` and the job's ``seed``, the same on every machine."""
    digest = blake2b(text.encode(), digest_size=8, salt=(seed & MASK).to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") >> 1


class Rng:
    """Splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

    Constructing `random.Random` alone takes longer than all choices of a conversation.
    """

    __slots__ = ("state",)

    def __init__(self, seed: int) -> None:
        self.state = seed & MASK

    def bits(self) -> int:
        """The next 64 bits."""
        state = self.state = (self.state + GOLDEN) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        return state ^ (state >> 31)

    def below(self, number: int) -> int:
        """Uniform from 0 to ``number - 1``."""
        return (self.bits() * number) >> 64

    def share(self) -> float:
        """Uniform in [0, 1)."""
        return (self.bits() >> 11) * 2.0**-53

    def pick(self, choices: Sequence[T]) -> T:
        return choices[(self.bits() * len(choices)) >> 64]

    def sample(self, choices: Sequence[T], number: int) -> list[T]:
        """``number`` different ones in random order, all if there are fewer; the sequence stays as it is."""
        size = len(choices)
        number = min(number, size)
        moved: dict[int, int] = {}  # the places that a Fisher-Yates shuffle has exchanged so far
        taken = []
        for place in range(number):
            other = place + self.below(size - place)
            taken.append(choices[moved.get(other, other)])
            moved[other] = moved.get(place, place)
        return taken

    def number(self, mean: float) -> int:
        """``mean`` rounded down, or up with the probability of its fraction."""
        whole = int(mean)
        return whole + (mean > whole and self.share() < mean - whole)
