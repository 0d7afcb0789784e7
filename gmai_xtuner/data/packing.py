# SPDX-License-Identifier: Apache-2.0

"""Soft packing: whole conversations into sequences of ``max_length`` tokens, none split.

Packs are planned for *kinds* of conversations instead of single ones: all conversations of equal length
(and equal number of images, where their number is what limits a pack) are one kind, all packs with equal
content are one pattern. At 2,048 tokens there are a few thousand kinds whatever the size of the corpus, so
a plan costs about the same for a thousand and for twenty million conversations; which conversation of a
kind takes which place, and the order of the packs, is drawn anew for each epoch. (In a small corpus many
kinds have one member, so the same conversations share a pack each time; they never see each other, and the
packs of an optimiser step still change.)

Example, ``max_length`` 10, lengths 6 6 4 4 3: one pattern ``[6, 4] x 2``, one ``[3] x 1``; drawn:
``[[0, 3], [1, 2], [4]]`` or ``[[0, 2], [1, 3], [4]]``, ...

Two plans are made, and the one with fewer packs is taken.

**Best-fit decreasing** (Johnson et al., "Worst-case performance bounds for simple one-dimensional packing
algorithms", SIAM J. Comput. 3(4), 1974), exactly, spends the short conversations where they fit tightest
and ends with packs of two long ones and nothing short enough to fill them: at 2,048 tokens, 576 an image,
that costs a percent or more.

**Balanced fit** (:mod:`gmai_xtuner.data.balanced_fit`), for a larger corpus where that leaves room, uses up
all lengths evenly.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from gmai_xtuner.data.balanced_fit import Pattern, balanced_fit

BALANCED_FROM = 1_000
"""Conversations from which the balanced plan is tried; below, it gains a pack or two at most."""

_ROOM_WORTH_FILLING = 1e-3


Kind = tuple[int, int, int]
"""Length, number of images, and how many conversations have both."""


@dataclass(frozen=True, slots=True)
class Packs:
    """``offsets`` int64 ``[packs + 1]`` into ``items`` int64 ``[samples]``: pack ``p`` holds
    ``items[offsets[p]:offsets[p + 1]]``, indices into the lengths that were packed."""

    offsets: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.items[self.offsets[pack] : self.offsets[pack + 1]]


def pack(
    lengths: np.ndarray,
    *,
    max_length: int,
    images: np.ndarray | None = None,
    max_images: int | None = None,
    seed: int | list[int] = 0,
) -> Packs:
    """Pack conversations by length.

    Args:
        lengths: int ``[samples]``, tokens of each conversation, image tokens counted.
        max_length: tokens of a pack at the most.
        images: int ``[samples]``, images of each conversation.
        max_images: images of a pack at the most; ``None`` for no bound.
        seed: draws which conversation of a kind goes where, and the order of the packs. The same
            lengths and seed give the same packs on every machine; the number of packs does not depend
            on the seed.

    Returns:
        every index of ``lengths`` exactly once.

    Raises:
        ValueError: a conversation that can't fit into an empty pack (names its index).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    images = np.zeros_like(lengths) if images is None else np.asarray(images, dtype=np.int64)
    _check(lengths, images, max_length, max_images)
    if len(lengths) == 0:
        return Packs(np.zeros(1, np.int64), np.zeros(0, np.int64))
    # A bound that no pack can exceed, whatever is in it, is none: 576 tokens an image, 2,048 a pack.
    if max_images is None or (images * max_length < lengths * (max_images + 1)).all():
        images, max_images = np.zeros_like(lengths), None

    # Longest first; of equal length, most images first.
    code = (max_length - lengths) * (int(images.max()) + 1) + (images.max() - images)
    if code.max() < 2**16:
        code = code.astype(np.uint16)  # which numpy sorts by radix
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(code[shuffled], kind="stable")]
    sorted_code = code[order]
    starts = np.concatenate(([0], np.flatnonzero(sorted_code[1:] != sorted_code[:-1]) + 1))
    counts = np.diff(np.append(starts, len(order)))
    firsts = order[starts]
    patterns = _plan(lengths[firsts], images[firsts], counts, max_length, max_images)
    return _draw(patterns, starts, order, rng)


def _plan(
    lengths: np.ndarray,
    images: np.ndarray,
    counts: np.ndarray,
    max_length: int,
    max_images: int | None,
) -> list[Pattern]:
    """Patterns over kinds, which come longest first; a function of the kinds alone."""
    kinds = list(zip(lengths.tolist(), images.tolist(), counts.tolist(), strict=True))
    patterns = best_fit_decreasing(kinds, max_length, max_images)
    packs = _number_of_packs(patterns)
    bound = int((lengths * counts).sum()) / max_length
    enough = int(counts.sum()) >= BALANCED_FROM and packs > bound * (1 + _ROOM_WORTH_FILLING)
    if max_images is not None or not enough:
        return patterns
    balanced = balanced_fit(lengths[::-1], counts[::-1], max_length=max_length)
    if balanced is None or _number_of_packs(balanced) >= packs:
        return patterns
    last = len(kinds) - 1  # balanced_fit counts kinds from the shortest
    for pattern in balanced:
        pattern.content = [(last - kind, take) for kind, take in pattern.content]
    return balanced


def _number_of_packs(patterns: list[Pattern]) -> int:
    return sum(pattern.count for pattern in patterns)


def _draw(
    patterns: list[Pattern], starts: np.ndarray, order: np.ndarray, rng: np.random.Generator
) -> Packs:
    """Deal the conversations of each kind (a slice of ``order``) to the patterns; shuffle the packs."""
    number_of_packs = _number_of_packs(patterns)
    sizes = np.empty(number_of_packs, dtype=np.int64)
    first = 0
    for pattern in patterns:
        sizes[first : first + pattern.count] = sum(take for _, take in pattern.content)
        first += pattern.count
    position = rng.permutation(number_of_packs)  # where each planned pack ends up
    offsets = np.zeros(number_of_packs + 1, dtype=np.int64)
    offsets[1 + position] = sizes
    np.cumsum(offsets, out=offsets)

    items = np.empty(len(order), dtype=np.int64)
    next_of_kind = starts.copy()
    first = 0
    for pattern in patterns:
        base = offsets[position[first : first + pattern.count]]
        first += pattern.count
        filled = 0
        for kind, take in pattern.content:
            begin = next_of_kind[kind]
            dealt = order[begin : begin + take * pattern.count].reshape(pattern.count, take)
            next_of_kind[kind] = begin + take * pattern.count
            items[base[:, None] + np.arange(filled, filled + take)] = dealt
            filled += take
    return Packs(offsets, items)


def _check(
    lengths: np.ndarray, images: np.ndarray, max_length: int, max_images: int | None
) -> None:
    if len(images) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths but {len(images)} image counts")
    bad = np.flatnonzero((lengths < 1) | (lengths > max_length))
    if len(bad):
        raise ValueError(
            f"conversation {bad[0]} has {lengths[bad[0]]} tokens, a pack holds 1 to {max_length}"
        )
    if max_images is not None:
        bad = np.flatnonzero(images > max_images)
        if len(bad):
            raise ValueError(
                f"conversation {bad[0]} has {images[bad[0]]} images, a pack holds {max_images}"
            )


def best_fit_decreasing(
    kinds: list[Kind], max_length: int, max_images: int | None
) -> list[Pattern]:
    """Return the patterns of best-fit decreasing over kinds, longest first.

    A kind goes to the open packs with the least room that suffices. Such packs take as many of it as
    fit, because a pack that has just taken one has less room than before and so stays the best fit. Without
    ``max_images`` all kinds have 0 images.
    """
    # Open packs by (room in tokens, room in images) -> patterns. `rooms` is sorted for the best fit.
    open_packs: dict[tuple[int, int], list[Pattern]] = defaultdict(list)
    rooms: list[tuple[int, int]] = []
    closed: list[Pattern] = []

    def put(pattern: Pattern, room: tuple[int, int]) -> None:
        if room[0] == 0:
            closed.append(pattern)
            return
        if not open_packs[room]:
            insort(rooms, room)
        open_packs[room].append(pattern)

    def best(length: int, images: int) -> tuple[int, int] | None:
        for index in range(bisect_left(rooms, (length, 0)), len(rooms)):
            if rooms[index][1] >= images:
                return rooms[index]
        return None

    for kind, (length, images, number) in enumerate(kinds):
        while number:
            room = best(length, images)
            if room is None:
                pattern = Pattern([], number)
                room = (max_length, max_images or 0)
            else:
                pattern = open_packs[room].pop()
                if not open_packs[room]:
                    del open_packs[room]
                    rooms.pop(bisect_left(rooms, room))
            each = min(room[0] // length, room[1] // images if images else room[0])
            full, rest = divmod(number, each)
            full = min(full, pattern.count)
            rest = rest if full < pattern.count else 0
            for packs, take in ((full, each), (1 if rest else 0, rest)):
                if packs:
                    filled = Pattern([*pattern.content, (kind, take)], packs)
                    put(filled, (room[0] - take * length, room[1] - take * images))
                    number -= packs * take
            untouched = pattern.count - full - (1 if rest else 0)
            if untouched and pattern.content:
                put(Pattern(pattern.content, untouched), room)
    for patterns in open_packs.values():
        closed.extend(patterns)
    return closed
