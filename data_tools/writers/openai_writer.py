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
import contextlib
import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar

import platformdirs
from anyio.from_thread import start_blocking_portal

from data_tools.items import Problem
from data_tools.writers import asking
from data_tools.writers.asking import Ask, BudgetReached, Estimate, Outcome, Task
from data_tools.writers.ledger import Account, Expense, Ledger, Reply
from data_tools.writers.options import OpenAIOptions
from data_tools.writers.prompts import Prompts
from data_tools.writers.request import Request, Traits, expense, reason_of, reply_of
from gmai_xtuner.core.errors import CorpusError, EndpointError
from gmai_xtuner.core.http import (
    ChatServer,
    Concurrency,
    Pace,
    RequestRefused,
    ServerFault,
    back_off,
    each,
)

REFUSED_AT_FIRST = 5
"""Requests without a single answer after which the job, not the item, is at fault."""
OTHER_RUN_SECONDS = 0.5
"""Between two looks at an answer that another run is waiting for."""

T = TypeVar("T")
O = TypeVar("O", bound=OpenAIOptions)  # noqa: E741


class _Stopped(Exception):
    """The run is being stopped: this request is not sent."""


class _AskedElsewhere(Exception):
    """Another run is waiting for the same answer."""


class _Learnt(Exception):
    """The server doesn't know how something was asked for; it is now asked for otherwise."""


def cache_path(options: OpenAIOptions) -> Path:
    """Return the ledger's file: ``cache`` of the job, else one for all jobs in the user's cache folder."""
    return options.cache or platformdirs.user_cache_path("gmai_xtuner") / "answers.sqlite"


def key_of(options: OpenAIOptions) -> str | None:
    """Return the key in the environment; None for a server that needs none.

    Raises:
        EndpointError: there is none.
    """
    if options.key_variable is None:
        return None
    key = os.environ.get(options.key_variable, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {options.key_variable} is empty or not set; set it to the key for "
            f"{options.base_url}, or write key_variable: null if that server needs none"
        )
    return key


class ModelWriter(Generic[O]):
    """What the writers that ask a model have in common.

    Args:
        options: of the job.
        prompts: writes the prompts and judges the answers.
        folder: the corpus; ``prompt.image`` is a path below it.
        job: whose expenses these are, over all runs; the same in every run.
    """

    def __init__(self, options: O, prompts: Prompts, *, folder: Path, job: str) -> None:
        self.options, self.prompts, self.folder, self.job = options, prompts, folder, job

    def ledger(self) -> Ledger:
        """Open the ledger for a run of this job."""
        return Ledger(cache_path(self.options), job=self.job)

    def asking(self, task: Task) -> asking.Asking:
        """Return the questions of a task, in their order."""
        options = self.options
        translate = options.chinese == "translate"
        return asking.write(task, self.prompts, retries=options.retries, translate=translate)

    def request(self, ask: Ask, task: Task) -> Request:
        """Return the request that asks it."""
        return Request.of(ask, task.record, self.options, self.folder)

    def estimate(self, tasks: Iterable[Task]) -> Estimate:
        """Return what these tasks would cost, without a request. Needs no key.

        Raises:
            CorpusError: an image or the ledger can't be read.
        """
        options = self.options
        requests = cached = 0
        at_most = Expense()
        seen: set[bytes] = set()
        with self.ledger() as ledger:
            for task in tasks:
                asked = self.asking(task)
                with contextlib.suppress(StopIteration):
                    ask = next(asked)
                    while (
                        reply := ledger.answer((made := self.request(ask, task)).key)
                    ) is not None:
                        cached += 1
                        ask = asked.send(reply)
                    short = bytes.fromhex(made.key[:32])
                    if short in seen:
                        continue
                    seen.add(short)
                    # A translation is a second request, about as large as the first.
                    steps = 2 if options.chinese == "translate" and ask.item != task.item else 1
                    requests += steps
                    for _ in range(steps):
                        at_most += made.at_most
            shares = ledger.shares(options.model) or (1.0, 1.0)
        prompt_tokens = round(at_most.prompt_tokens * shares[0])
        completion_tokens = round(at_most.completion_tokens * shares[1])
        whole = expense(at_most.prompt_tokens, at_most.completion_tokens, options.price).dollars
        likely = expense(prompt_tokens, completion_tokens, options.price).dollars
        discount = at_most.dollars / whole if whole else 1.0
        return Estimate(
            requests, cached, prompt_tokens, completion_tokens, likely * discount, at_most.dollars
        )


class OpenAIWriter(ModelWriter[OpenAIOptions]):
    """Writes conversations by asking a model, one at a time."""

    def write(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Yield the tasks' outcomes as they come; the ledger has every answer before it is seen here.

        Leaving the iteration early waits for the requests in flight, which are paid for.

        Raises:
            BudgetReached: all in flight has been waited for and yielded.
            EndpointError: the server refuses every request, or gives no answer to any.
            CorpusError: an image or the ledger can't be read.
        """
        window = max(4 * self.options.in_flight, 64)
        with self.ledger() as ledger, start_blocking_portal() as portal:
            run = portal.call(_Run, self, ledger)
            wanted = takewhile(lambda _: run.stopped is None, tasks)
            try:
                for outcome in each(portal, run.write, wanted, window=window):
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
        self.server = ChatServer(
            options.base_url,
            model=options.model,
            key=key_of(options),
            key_variable=options.key_variable,
            timeout=options.timeout,
        )
        self.traits = Traits.of(options, ledger.traits(options.base_url, options.model))
        self.account = Account(options.budget, ledger.spent().total)
        self.concurrency = Concurrency(options.in_flight, check=self._check)
        self.requests_pace = Pace(options.requests_a_minute)
        self.tokens_pace = Pace(options.tokens_a_minute)
        # Some more than are in flight are ready to go, so that no slot waits for the ledger or an image.
        self.ready = asyncio.Semaphore(options.in_flight + options.in_flight // 4 + 1)
        self.settled = asyncio.Condition()
        self.asked: dict[str, asyncio.Event] = {}
        self.threads = ThreadPoolExecutor(2, "images")
        self.commit = _Committer(ledger)
        self.refused = self.under_way = 0
        self.failing_since: float | None = None

    async def close(self) -> None:
        """Send nothing more; wait for what is in flight, and keep it."""
        done = self.stopped
        self._stop(CorpusError("the writer was closed"))
        await self._wake()
        while self.under_way:
            await asyncio.sleep(0.01)
        await self.server.close()
        self.threads.shutdown()
        self.commit.close()
        self.stopped = done

    def _stop(self, error: CorpusError) -> None:
        """Stop the run; the first reason counts."""
        if self.stopped is None:
            self.stopped = error

    def _stop_at_server(self, what: str) -> None:
        self._stop(EndpointError(f"{self.options.base_url} (model {self.options.model}) {what}"))

    async def _wake(self) -> None:
        """Let those who wait for money look again."""
        async with self.settled:
            self.settled.notify_all()

    async def write(self, task: Task) -> Outcome | None:
        """Return the task's outcome; None if it is not decided because the run stops."""
        self.under_way += 1
        try:
            return await self._write(task)
        except _Stopped:
            return None
        except CorpusError as error:
            self._stop(error)
        except Exception as error:  # a fault of this program ends the run with its name
            stop = CorpusError(f"{task.item.id}: {type(error).__name__}: {error}")
            stop.__cause__ = error
            self._stop(stop)
        finally:
            self.under_way -= 1
            if self.stopped is not None:
                await self._wake()
        return None

    async def _write(self, task: Task) -> Outcome:
        asked = self.writer.asking(task)
        new: list[Reply] = []
        ask = next(asked)
        while True:
            try:
                reply = await self._reply(ask, task)
            except ServerFault as fault:
                problem = Problem(fault.reason, fault.detail)
                shown = asking.shown(ask.prompt)
                return Outcome(task.item, None, (problem,), shown, pending=True).counting(new)
            if reply.new:
                new.append(reply)
            try:
                ask = asked.send(reply)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    async def _reply(self, ask: Ask, task: Task) -> Reply:
        """Return the answer from the ledger, else from the server.

        Raises:
            ServerFault: it failed ``server_retries`` times.
            _Stopped: the run stops before it was sent.
            CorpusError: what stops the run.
        """
        made = await self._in_thread(self.writer.request, ask, task)
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
            except RequestRefused as refusal:
                return Reply(reason_of(refusal), asking.REFUSED, refusal.message)
            except ServerFault as fault:
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
                wait = back_off(waits - 1) if fault.wait is None else 0.0
            finally:
                self.asked.pop(made.key).set()
            await self._sleep(wait)

    async def _ask(self, made: Request) -> Reply:
        """Reserve, claim, send, settle; once."""
        await self._afford(made.at_most)
        actual = Expense()
        try:
            async with self.ready:
                self._check()
                run = await self.commit(lambda: self.ledger.claim(made.key, made.at_most))
                if run is not None:
                    if not self.ledger.is_alive(run):
                        await self.commit(lambda: self.ledger.bury(run))
                    raise _AskedElsewhere
                lost: Expense | None = None
                reply = None
                try:
                    # Another run may have settled it between the look into the ledger and the claim.
                    if (kept := self.ledger.answer(made.key)) is not None:
                        return kept
                    answer = reply = await self._send(made)
                    actual = reply.expense
                    await self.commit(
                        lambda: self.ledger.settle(
                            made.key, self.options.model, answer, made.at_most
                        )
                    )
                except ServerFault as fault:
                    if fault.billed:
                        actual = lost = made.at_most
                    raise
                finally:
                    if reply is None:
                        await self.commit(lambda: self.ledger.release(made.key, lost))
                return reply
        finally:
            self.account.settle(made.at_most, actual)
            await self._wake()

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
                answer = await self.server.complete(body)
            except ServerFault as fault:
                if fault.throttled:
                    self.concurrency.lower(seen)
                self._failed(fault)
                raise
            except RequestRefused as refusal:
                if lesson := traits.lesson(refusal, self.options):
                    self._learn(lesson)
                    raise _Learnt from refusal
                self._refused(refusal)
                raise
            except EndpointError as error:
                self._stop(error)
                raise
        reply = reply_of(answer, self.options, made.at_most)
        self.tokens_pace.give_back(tokens - reply.expense.tokens)
        self.failing_since = None
        await self.concurrency.answered()
        return reply

    async def _afford(self, at_most: Expense) -> None:
        """Reserve ``at_most``, waiting for requests under way to turn out cheaper if need be."""
        self._check()
        while not self.account.fits(at_most):
            if self.account.reserved.tokens == 0:
                self._stop(self._budget_reached(at_most))
                raise _Stopped
            async with self.settled:
                await self.settled.wait()
            self._check()
        self.account.reserve(at_most)

    def _budget_reached(self, at_most: Expense) -> BudgetReached:
        spent, budget = self.account.spent, self.options.budget
        bounds = [f"{budget.tokens:,} tokens"] if budget.tokens is not None else []
        bounds += [f"${budget.dollars:,.2f}"] if budget.dollars is not None else []
        return BudgetReached(
            f"the budget of {' and '.join(bounds)} is reached: {spent.tokens:,} tokens, "
            f"${spent.dollars:,.4f} spent by this job over all of its runs, and the next request can cost "
            f"{at_most.tokens:,} tokens, ${at_most.dollars:,.4f}. Nothing is lost: raise writer.budget and "
            "run the job again to go on."
        )

    def _check(self) -> None:
        if self.stopped is not None:
            raise _Stopped

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the run's end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check()
            await asyncio.sleep(min(left, 0.5))

    def _learn(self, lesson: dict[str, str]) -> None:
        """Remember what the server doesn't understand; of many answers to the same the first counts."""
        new = Traits.of(self.options, dataclasses.asdict(self.traits) | lesson)
        if new != self.traits:
            self.traits = new
            self.ledger.remember(self.options.base_url, self.options.model, **lesson)

    def _refused(self, refusal: RequestRefused) -> None:
        self.refused += 1
        if self.refused >= REFUSED_AT_FIRST and not self.concurrency.opened:
            self._stop_at_server(
                f"has refused the first {self.refused} requests, the last with: {refusal.message}. "
                "Check the writer's options."
            )

    def _failed(self, fault: ServerFault) -> None:
        """Stop the run if the server has given no answer for too long, or let it wait."""
        patience = self.options.patience
        now = time.monotonic()
        self.failing_since = now if self.failing_since is None else self.failing_since
        silent = now - self.failing_since
        if fault.wait is not None and fault.wait > patience:
            self._stop_at_server(
                f"asks to wait {fault.wait:,.0f} s ({fault}), longer than writer.patience "
                f"({patience:,.0f} s). Nothing is lost: run the job again then."
            )
        elif fault.wait is not None:
            self.concurrency.pause(fault.wait)
        if silent > patience:
            self._stop_at_server(
                f"has given no answer for {silent:,.0f} s, the last failure was: {fault}. Nothing is "
                "lost: run the job again when the server is well."
            )

    async def _in_thread(self, function: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *values)


class _Committer:
    """A thread that puts what is to be written at the same time into one transaction.

    An fsync is a hundred times dearer than a row, and the event loop waits for none.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self.thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self.thread.start()

    async def __call__(self, write: Callable[[], T]) -> T:
        """Do ``write``; return when it is on the disk. Not to be interrupted."""
        future: Future[T] = Future()
        self.queue.put((write, future))
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        self.queue.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (job := self.queue.get()) is not None:
            jobs = [job]
            while not self.queue.empty() and (job := self.queue.get()) is not None:
                jobs.append(job)
            try:
                with self.ledger.transaction():
                    results = [write() for write, _ in jobs]
            except Exception as caught:
                error = CorpusError(
                    f"{self.ledger.path}: the ledger of answers can't be written ({caught}); make room on "
                    "the disk and run the job again"
                )
                error.__cause__ = caught
                for _, future in jobs:
                    future.set_exception(error)
            else:
                for (_, future), result in zip(jobs, results, strict=True):
                    future.set_result(result)
            if job is None:
                return
