# SPDX-License-Identifier: Apache-2.0

"""The writer that asks a model: many requests in flight, none twice, none beyond the budget.

```
tasks -> window of conversations -> ledger has the answer ------------------------> judged -> Outcome
         (4 x in_flight)            no: budget -> claim -> slot -> pace -> server -> ledger
```
Whoever iterates over `OpenAIWriter.write` feeds the tasks and takes the outcomes in his own thread; the
requests are made in an event loop of another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal

from data_tools.items import Task
from data_tools.options import OpenAIOptions
from data_tools.writers.asking import REFUSED, Account, ModelWriter, Outcome, step
from data_tools.writers.ledger import Expense, Ledger, Reply
from data_tools.writers.request import Request, Traits, reason_of, reply_of
from gmai_xtuner.core import http
from gmai_xtuner.core.errors import CorpusError, EndpointError

REFUSED_AT_FIRST = 5
"""Requests without a single answer after which the job, not the item, is at fault."""
OTHER_RUN_SECONDS = 0.5
"""Between two looks at an answer that another run is waiting for."""

T = TypeVar("T")


class _Stopped(Exception):
    """The run is being stopped: this request is not sent."""


class _AskedElsewhere(Exception):
    """Another run is waiting for the same answer."""


class _Learnt(Exception):
    """The server doesn't know how something was asked for; it is now asked for otherwise."""


class OpenAIWriter(ModelWriter[OpenAIOptions]):
    """Writes conversations by asking a model, one at a time."""

    def write(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield the tasks' outcomes as they come; the ledger has every answer before it is seen here.

        Leaving the iteration early waits for the requests in flight, which are paid for. A `BudgetReached`
        comes after all in flight was yielded; an `EndpointError` if the server refuses every request, or
        gives no answer to any; a `CorpusError` if an image or the ledger can't be read.
        """
        window = max(4 * self.options.in_flight, 64)
        with self.ledger() as ledger, start_blocking_portal() as portal:
            run = portal.call(_Run, self, ledger)
            wanted = takewhile(lambda _: run.stopped is None, tasks)
            try:
                for outcome in http.each(portal, run.write, wanted, window=window):
                    if outcome is not None:
                        yield outcome
            finally:
                portal.call(run.close)
            if run.stopped is not None:
                raise run.stopped


class _Run:
    """The state of one run; all of it belongs to the event loop."""

    def __init__(self, writer: OpenAIWriter, ledger: Ledger) -> None:
        options = writer.options
        self.writer, self.options, self.ledger = writer, options, ledger
        self.stopped: CorpusError | None = None
        self.server = http.ChatServer(
            options.base_url,
            model=options.model,
            key=options.key(),
            key_variable=options.key_variable,
            timeout=options.timeout,
        )
        self.traits = Traits.of(options, ledger.traits(options.base_url, options.model))
        self.account = Account(options, ledger.spent())
        self.concurrency = http.Concurrency(options.in_flight, check=self._check)
        self.requests_pace = http.Pace(options.requests_a_minute)
        self.tokens_pace = http.Pace(options.tokens_a_minute)
        # Some more than are in flight are ready to go, so that no slot waits for the ledger or an image.
        self.ready = asyncio.Semaphore(options.in_flight + options.in_flight // 4 + 1)
        self.settled = asyncio.Condition()
        self.asked: dict[str, asyncio.Event] = {}
        self.threads = ThreadPoolExecutor(2, "images")
        self.writes: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self.committing = asyncio.Lock()
        self.refused = self.under_way = 0
        self.failing_since: float | None = None

    async def close(self) -> None:
        """Send nothing more; wait for what is in flight, and keep it."""
        done = self.stopped
        await self._stop(CorpusError("the writer was closed"))
        while self.under_way:
            await asyncio.sleep(0.01)
        await self.server.close()
        self.threads.shutdown()
        self.stopped = done

    async def _stop(self, error: CorpusError) -> None:
        """Stop the run; the first reason counts. Those who wait for money look again."""
        self.stopped = self.stopped or error
        await self._wake()

    async def _stop_at_server(self, what: str) -> None:
        text = f"{self.options.base_url} (model {self.options.model}) {what}"
        await self._stop(EndpointError(text))

    async def _wake(self) -> None:
        async with self.settled:
            self.settled.notify_all()

    def _check(self) -> None:
        if self.stopped is not None:
            raise _Stopped

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the run's end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check()
            await asyncio.sleep(min(left, 0.5))

    async def _in_thread(self, function: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *values)

    async def _commit(self, write: Callable[[], T]) -> T:
        """Return what ``write`` returns, once it is on the disk.

        All that comes while a transaction is put on the disk goes into the next: an fsync is a hundred times
        dearer than a row.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.writes.append((write, done))
        async with self.committing:
            if not done.done():
                writes, self.writes = self.writes, []
                try:
                    results = await asyncio.to_thread(self._together, [one for one, _ in writes])
                except Exception as caught:
                    error = CorpusError(
                        f"{self.ledger.path}: the ledger of answers can't be written ({caught}); make room "
                        "on the disk and run the job again"
                    )
                    error.__cause__ = caught
                    for _, future in writes:
                        future.set_exception(error)
                else:
                    for (_, future), result in zip(writes, results, strict=True):
                        future.set_result(result)
        return await done

    def _together(self, writes: list[Callable[[], Any]]) -> list[Any]:
        with self.ledger.transaction():
            return [write() for write in writes]

    async def write(self, task: Task) -> Outcome | None:
        """Return the task's outcome; None if it is not decided because the run stops."""
        self.under_way += 1
        try:
            questions = self.writer.questions(task)
            found = await self._in_thread(step, questions)
            while isinstance(found, Request):
                try:
                    said: Reply | http.ServerFault = await self._reply(found)
                except http.ServerFault as fault:
                    said = fault
                found = await self._in_thread(step, questions, said)
            return found
        except _Stopped:
            return None
        except CorpusError as error:
            await self._stop(error)
        except Exception as error:  # a fault of this program ends the run with its name
            stop = CorpusError(f"{task.item.id}: {type(error).__name__}: {error}")
            stop.__cause__ = error
            await self._stop(stop)
        finally:
            self.under_way -= 1
        return None

    async def _reply(self, made: Request) -> Reply:
        """Return the answer from the ledger, else from the server."""
        faults = waits = 0
        while True:
            reply = self.ledger.answer(made.key)
            if reply is not None:
                return reply
            if other := self.asked.get(made.key):
                await other.wait()
                continue
            self.asked[made.key] = asyncio.Event()
            try:
                return await self._ask(made)
            except _AskedElsewhere:
                wait = OTHER_RUN_SECONDS
            except _Learnt:
                continue
            except http.RequestRefused as refusal:
                return Reply(reason_of(refusal), REFUSED, refusal.message)
            except http.ServerFault as fault:
                faults += not fault.throttled
                waits += 1
                if faults > self.options.server_retries:
                    if not self.concurrency.opened:
                        raise EndpointError(
                            f"{self.options.base_url} has answered no request: {fault}. Check "
                            "writer.base_url, or run the job again when the server is well."
                        ) from fault
                    raise
                # What the server asks for holds for all requests, see Concurrency.pause.
                wait = http.back_off(waits - 1) if fault.wait is None else 0.0
            finally:
                self.asked.pop(made.key).set()
            await self._sleep(wait)

    async def _ask(self, made: Request) -> Reply:
        """Reserve, claim, send, settle; once."""
        await self._afford(made.at_most)
        actual, lost, reply = Expense(), None, None
        try:
            async with self.ready:
                self._check()
                run = await self._commit(partial(self.ledger.claim, made.key, made.at_most))
                if run is not None:
                    if not self.ledger.is_alive(run):
                        await self._commit(partial(self.ledger.bury, run))
                    raise _AskedElsewhere
                try:
                    # Another run may have settled it between the look into the ledger and the claim.
                    if (kept := self.ledger.answer(made.key)) is not None:
                        return kept
                    reply = await self._send(made)
                    actual = reply.cost
                    values = made.key, self.options.model, reply, made.at_most
                    await self._commit(partial(self.ledger.settle, *values))
                except http.ServerFault as fault:
                    if fault.billed:
                        actual = lost = made.at_most
                    raise
                finally:
                    if reply is None:
                        await self._commit(partial(self.ledger.release, made.key, lost))
                return reply
        finally:
            self.account.settle(made.at_most, actual)
            await self._wake()

    async def _afford(self, at_most: Expense) -> None:
        """Reserve ``at_most``, waiting for requests under way to turn out cheaper if need be."""
        self._check()
        while not self.account.fits(at_most):
            if self.account.reserved.tokens == 0:
                await self._stop(self.account.reached(at_most))
                raise _Stopped
            async with self.settled:
                await self.settled.wait()
            self._check()
        self.account.reserve(at_most)

    async def _send(self, made: Request) -> Reply:
        traits = self.traits
        body = await self._in_thread(made.body, traits)
        tokens = made.at_most.tokens
        async with self.concurrency.slot() as seen:
            self._check()
            if traits != self.traits:  # something was learnt meanwhile
                traits = self.traits
                body = await self._in_thread(made.body, traits)
            await self._sleep(max(self.requests_pace.take(), self.tokens_pace.take(tokens)))
            # What a failure means for the others is settled before the slot is free for the next.
            try:
                answer = await self.server.complete(body, [self.writer.origins[made.source]])
            except http.ServerFault as fault:
                if fault.throttled:
                    self.concurrency.lower(seen)
                await self._failed(fault)
                raise
            except http.RequestRefused as refusal:
                if lesson := traits.lesson(refusal, self.options):
                    self._learn(lesson)
                    raise _Learnt from refusal
                await self._refused(refusal)
                raise
            except EndpointError as error:
                await self._stop(error)
                raise
        reply = reply_of(answer, self.options, made.at_most)
        self.tokens_pace.give_back(tokens - reply.cost.tokens)
        self.failing_since = None
        await self.concurrency.answered()
        return reply

    def _learn(self, lesson: dict[str, str]) -> None:
        """Remember what the server doesn't understand; of many answers to the same the first counts."""
        new = dataclasses.replace(self.traits, **lesson)
        if new != self.traits:
            self.traits = new
            self.ledger.remember(self.options.base_url, self.options.model, lesson)

    async def _refused(self, refusal: http.RequestRefused) -> None:
        self.refused += 1
        if self.refused >= REFUSED_AT_FIRST and not self.concurrency.opened:
            said = (
                f"has refused the first {self.refused} requests, the last with: {refusal.message}"
            )
            await self._stop_at_server(f"{said}. Check the writer's options.")

    async def _failed(self, fault: http.ServerFault) -> None:
        """Stop the run if the server has given no answer for too long, or let it wait."""
        patience, now = self.options.patience, time.monotonic()
        self.failing_since = self.failing_since or now
        silent = now - self.failing_since
        if fault.wait is not None and fault.wait > patience:
            await self._stop_at_server(
                f"asks to wait {fault.wait:,.0f} s ({fault}), longer than writer.patience "
                f"({patience:,.0f} s). Nothing is lost: run the job again then."
            )
        elif fault.wait is not None:
            self.concurrency.pause(fault.wait)
        if silent > patience:
            await self._stop_at_server(
                f"has given no answer for {silent:,.0f} s, the last failure was: {fault}. Nothing is lost: "
                "run the job again when the server is well."
            )
