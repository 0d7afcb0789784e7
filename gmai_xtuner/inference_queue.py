# SPDX-License-Identifier: Apache-2.0

"""One inference queue: a model computes one answer at a time, the others wait in the order they came.

The server and the page use it. An asyncio loop hands out turns; the model runs in one thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from typing import TypeVar

_GIVE_UP_INTERVAL = 0.1
"""Seconds between two looks at whether a waiting client has given up."""


Stream = TypeVar("Stream", bound=Iterator[str])


class QueueFull(Exception):
    """Too many answers are computed or waited for."""


class InferenceQueue:
    """Let one answer at a time be computed; more than ``max_waiting`` others are turned away."""

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._tickets: list[asyncio.Event] = []  # set when something before it has left
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")

    @property
    def length(self) -> int:
        """Answers that are computed or waited for."""
        return len(self._tickets)

    @property
    def is_full(self) -> bool:
        """Whether the next one would be turned away."""
        return self.length > self._max_waiting

    @asynccontextmanager
    async def turn(
        self,
        *,
        on_position: Callable[[int], None] | None = None,
        give_up: threading.Event | None = None,
    ) -> AsyncIterator[bool]:
        """Wait for one's turn and hold it; yield whether it is, or ``give_up`` was set first.

        ``on_position`` is called with the number of answers ahead, whenever it changes. Too many that wait
        are ``QueueFull``.
        """
        if self.is_full:
            raise QueueFull
        ticket = asyncio.Event()
        self._tickets.append(ticket)
        try:
            known = None
            while (ahead := self._tickets.index(ticket)) and not (give_up and give_up.is_set()):
                if ahead != known and on_position is not None:
                    on_position(ahead)
                known = ahead
                ticket.clear()
                try:
                    await asyncio.wait_for(ticket.wait(), _GIVE_UP_INTERVAL if give_up else None)
                except TimeoutError:
                    continue
            yield not ahead
        finally:
            self._tickets.remove(ticket)
            for waiting in self._tickets:
                waiting.set()

    async def start(self, make: Callable[[], Stream]) -> Stream:
        """Make a stream of pieces in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, make)

    async def pieces(
        self, stream: Iterator[str], stop: threading.Event | None = None
    ) -> AsyncGenerator[str, None]:
        """Yield what a blocking iterator yields, computed in the model's thread.

        It ends early, after the piece that is being computed, when ``stop`` is set, and is closed in any case
        before this returns, so that nothing computes on.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[str | None] = asyncio.Queue()
        abandoned = threading.Event()

        def hand_on(item: str | None) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        def run() -> None:
            try:
                with closing(stream) as iterator:  # type: ignore[type-var]
                    for piece in iterator:
                        if abandoned.is_set() or (stop and stop.is_set()):
                            break
                        hand_on(piece)
            finally:
                hand_on(None)

        worker = loop.run_in_executor(self._executor, run)
        try:
            while (item := await items.get()) is not None:
                yield item
        finally:
            abandoned.set()
            await asyncio.shield(worker)

    def close(self) -> None:
        """Start nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
