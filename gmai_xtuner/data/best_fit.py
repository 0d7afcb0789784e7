"""Best-fit decreasing over kinds of conversations instead of single ones.

Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J.
Comput. 3(4), 1974, exactly: all conversations of equal length and equal number of images are one kind, all
packs with equal content one pattern. At 2,048 tokens there are a few thousand kinds whatever the size of
the corpus, so the plan costs about the same for a thousand and for twenty million conversations.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass


@dataclass(slots=True)
class Pattern:
    """``count`` packs with the same content: (kind, how many of it) in the order of packing."""

    content: list[tuple[int, int]]
    count: int


def best_fit_decreasing(
    kinds: list[tuple[int, int, int]], max_length: int, max_images: int | None
) -> list[Pattern]:
    """Best-fit decreasing over kinds ``(length, images, how many)``, longest first.

    A kind goes to the open packs with the least room that suffices. Such packs take as many of it as
    fit, because a pack that has just taken one has less room than before and so stays the best fit.
    """
    # Open packs by (room in tokens, room in images) -> patterns. `rooms` is sorted for the best fit.
    open_packs: dict[tuple[int, int], list[Pattern]] = defaultdict(list)
    rooms: list[tuple[int, int]] = []
    unlimited = max_images is None
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
                room = (max_length, 0 if unlimited else int(max_images or 0))
            else:
                pattern = open_packs[room].pop()
                if not open_packs[room]:
                    del open_packs[room]
                    rooms.pop(bisect_left(rooms, room))
            each = room[0] // length
            if images and not unlimited:
                each = min(each, room[1] // images)
            full, rest = divmod(number, each)
            full = min(full, pattern.count)
            rest = rest if full < pattern.count else 0
            used_images = 0 if unlimited else images
            for packs, take in ((full, each), (1 if rest else 0, rest)):
                if packs:
                    filled = Pattern([*pattern.content, (kind, take)], packs)
                    put(filled, (room[0] - take * length, room[1] - take * used_images))
                    number -= packs * take
            untouched = pattern.count - full - (1 if rest else 0)
            if untouched and pattern.content:
                put(Pattern(pattern.content, untouched), room)
    for patterns in open_packs.values():
        closed.extend(patterns)
    return closed
