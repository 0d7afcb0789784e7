"""How fast requests may be sent: a pace a minute, and as many at once as the server bears.

Neither is a matter of money, see `prices.Account`. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC

BURST = 1.0  # seconds of its rate that a pace may fall behind and catch up with


class Pace:
    """At most ``rate`` units a minute, evenly: each start is due as many minutes after the last as it took.

    Packages with token buckets let a whole minute's worth through at once and then go on at the full rate,
    so that the first minute has twice of what a server allows; and what a request was estimated at can't be
    given back when its true size is known.

    Args:
        rate: a minute; None: no limit.
        clock: seconds, for tests.
    """

    def __init__(self, rate: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 60 / rate if rate else 0.0
        self.clock = clock
        self.due = clock()

    def take(self, amount: float = 1) -> float:
        """Book ``amount`` units; returns the seconds to wait before they may be sent."""
        now = self.clock()
        start = max(self.due, now - BURST)
        self.due = start + amount * self.seconds
        return max(0.0, start - now)

    def give_back(self, amount: float) -> None:
        """``amount`` of what was booked wasn't needed (or, negative, more was)."""
        self.due -= amount * self.seconds


class Concurrency:
    """How many requests may be under way: additive increase, multiplicative decrease.

    Begins with one, so that a wrong key or an unknown model shows in one request, and opens with the first
    answer. A 429 takes it to seven tenths, once for all requests that were under way together; each answer
    raises it by its share of one.

    Args:
        limit: at most.
        check: called from time to time while a slot is waited for; raises if it needn't be any more.
    """

    def __init__(self, limit: int, *, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self.most = limit
        self.limit = 1.0
        self.under_way = 0
        self.opened = False
        self.lowered = 0  # how often
        self.not_before = 0.0
        self._room = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Hold a slot; the value is to be handed to `lower`."""
        async with self._room:
            while True:
                await self._room.wait_for(lambda: self.under_way < max(1, int(self.limit)))
                wait = self.not_before - time.monotonic()
                if wait <= 0:
                    break
                self._room.release()
                try:
                    # A little apart, or all that waited would come in the same moment.
                    await asyncio.sleep(min(0.5, wait + random.uniform(0, 0.1 * wait)))
                finally:
                    await self._room.acquire()
                self.check()
            self.under_way += 1
        try:
            yield self.lowered
        finally:
            self.under_way -= 1
            async with self._room:
                self._room.notify(2)

    async def answered(self) -> None:
        """The server gave an answer: room for more."""
        if not self.opened:
            self.opened, self.limit = True, float(self.most)
            async with self._room:
                self._room.notify_all()
        elif self.limit < self.most:
            self.limit = min(self.most, self.limit + 1 / self.limit)

    def lower(self, seen: int) -> None:
        """The server wants fewer; ``seen`` is what `slot` gave: an older complaint has been heard already."""
        if seen == self.lowered:
            self.lowered += 1
            self.limit = max(1.0, self.limit * 0.7)

    def pause(self, seconds: float) -> None:
        """No new request for so long: the server's wish holds for all."""
        self.not_before = max(self.not_before, time.monotonic() + seconds)


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Seconds that the server asks to wait, from ``Retry-After`` in seconds or as an HTTP date; None: unsaid.

    ``retry-after-ms`` is what OpenAI and Azure add. A value that is neither is taken as unsaid.
    """
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    for text, unit in ((milliseconds, 1000), (value, 1)):
        try:
            seconds = float(text) / unit if text else -1.0
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        when = email.utils.parsedate_to_datetime(value or "")
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, when.timestamp() - (time.time() if now is None else now))


def back_off(attempt: int, *, most: float = 60.0) -> float:
    """Seconds before the ``attempt``-th repetition (from 0): up to 0.5, 1, 2, ... ``most``, at least half.

    The jitter keeps requests that failed together from coming back together.
    """
    longest: float = min(most, 0.5 * 2 ** min(attempt, 20))
    return random.uniform(longest / 2, longest)
