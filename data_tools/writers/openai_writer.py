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
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from data_tools.items import Problem
from data_tools.writers import asking
from data_tools.writers.asking import Ask, Prompts
from data_tools.writers.endpoint import Endpoint, NotUnderstood, RequestRefused, ServerFault
from data_tools.writers.ledger import Ledger
from data_tools.writers.limits import Concurrency, Pace, back_off
from data_tools.writers.options import OpenAIOptions
from data_tools.writers.outcome import BudgetReached, Estimate, Outcome, Reply, Task
from data_tools.writers.payload import Payload, Traits, payload
from data_tools.writers.prices import Account, Expense, expense
from gmai_xtuner.core.errors import CorpusError, EndpointError

REFUSED_AT_FIRST = (
    5  # requests without a single answer after which the job, not the item, is at fault
)
OTHER_RUN_SECONDS = 0.5  # between two looks at an answer that another run is waiting for

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run is doing: for a line on the screen.

    Args:
        requests, cached: answers of this run, from the server and from the ledger.
        in_flight, limit: requests under way, and how many may be.
        spent: by the job over all runs, with what was lost.
        reserved: what the requests under way can still cost.
        faults: reason -> how often the server failed.
    """

    requests: int
    cached: int
    in_flight: int
    limit: int
    spent: Expense
    reserved: Expense
    faults: dict[str, int]


class Stopped(Exception):
    """The run is being stopped: this request isn't sent."""


def cache_path(options: OpenAIOptions) -> Path:
    """The ledger's file: ``cache`` of the job, else one for all jobs in the user's cache folder."""
    return options.cache or platformdirs.user_cache_path("gmai_xtuner") / "answers.sqlite"


class OpenAIWriter:
    """Writes conversations by asking a model.

    Args:
        options: of the job.
        prompts: writes the prompts and judges the answers.
        folder: the corpus; ``prompt.image`` is a path below it.
        job: whose expenses these are, over all runs; the same in every run.
    """

    def __init__(self, options: OpenAIOptions, prompts: Prompts, *, folder: Path, job: str) -> None:
        self.options, self.prompts, self.folder, self.job = options, prompts, folder, job
        self._run: _Run | None = None

    def write(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """The tasks' outcomes, as they come; the ledger has every answer before it's seen here.

        Leaving the iteration early waits for the requests in flight, which are paid for.

        Raises:
            BudgetReached: all in flight has been waited for and yielded.
            EndpointError: the server refuses every request, or gives no answer to any.
            CorpusError: a picture or the ledger can't be read.
        """
        ledger = Ledger(cache_path(self.options), job=self.job)
        with ledger, _Loop() as loop:
            run = loop.call(_Run.open(self, ledger))
            self._run = run
            try:
                yield from self._write(iter(tasks), loop, run)
            finally:
                loop.call(run.close())

    def _write(self, tasks: Iterator[Task], loop: _Loop, run: _Run) -> Iterator[Outcome]:
        window = max(4 * self.options.in_flight, 64)
        more, under_way = True, 0
        while True:
            while more and under_way < window and run.stopped is None:
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                loop.start(run.write(task))
                under_way += 1
            if under_way == 0:
                break
            outcome = run.outcomes.get()
            under_way -= 1
            if outcome is not None:
                yield outcome
        if run.stopped is not None:
            raise run.stopped

    def progress(self) -> Progress:
        """Of the run that is going on, or of the last one; from any thread."""
        if self._run is None:
            return Progress(0, 0, 0, 0, Expense(), Expense(), {})
        return self._run.progress()

    def estimate(self, tasks: Iterable[Task]) -> Estimate:
        """See `estimate`."""
        return estimate(tasks, self.options, self.prompts, folder=self.folder, job=self.job)


def estimate(
    tasks: Iterable[Task], options: OpenAIOptions, prompts: Prompts, *, folder: Path, job: str
) -> Estimate:
    """What these tasks would cost, without a request. Needs no key.

    Raises:
        CorpusError: a picture or the ledger can't be read.
    """
    requests = cached = 0
    at_most = Expense()
    seen: set[bytes] = set()
    with Ledger(cache_path(options), job=job) as ledger:
        for task in tasks:
            asked = asking.write(
                task, prompts, retries=options.retries, translate=options.chinese == "translate"
            )
            with contextlib.suppress(StopIteration):
                ask = next(asked)
                while True:
                    made = payload(ask, task.record, options, folder)
                    reply = ledger.answer(made.key)
                    if reply is None:
                        break
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


class _Run:
    """One run's state; all of it belongs to the event loop, but for `outcomes` and `progress`."""

    def __init__(self, writer: OpenAIWriter, ledger: Ledger) -> None:
        options = writer.options
        self.options, self.prompts, self.folder = options, writer.prompts, writer.folder
        self.ledger = ledger
        self.outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self.stopped: CorpusError | None = None
        self.endpoint = Endpoint(options)
        self.traits = Traits.of(options, ledger.traits(options.base_url, options.model))
        self.account = Account(options.budget, ledger.spent().total)
        self.concurrency = Concurrency(options.in_flight, check=self._check)
        self.requests_pace = Pace(options.requests_a_minute)
        self.tokens_pace = Pace(options.tokens_a_minute)
        # Some more than are in flight are ready to go, so that no slot waits for the ledger or a picture.
        self.ready = asyncio.Semaphore(options.in_flight + options.in_flight // 4 + 1)
        self.settled = asyncio.Condition()
        self.asked: dict[str, asyncio.Event] = {}
        self.threads = ThreadPoolExecutor(2, "pictures")
        self.commit = _Committer(ledger)
        self.answers = self.cached = self.refused = 0
        self.failing_since: float | None = None
        self.faults: dict[str, int] = {}

    @classmethod
    async def open(cls, writer: OpenAIWriter, ledger: Ledger) -> _Run:
        return cls(writer, ledger)

    async def close(self) -> None:
        """Send nothing more; wait for what is in flight, and keep it."""
        self._stop(CorpusError("the writer was closed"))
        async with self.settled:
            self.settled.notify_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self.endpoint.close()
        self.threads.shutdown()
        self.commit.close()

    def progress(self) -> Progress:
        return Progress(
            self.answers,
            self.cached,
            self.concurrency.under_way,
            int(self.concurrency.limit),
            self.account.spent,
            self.account.reserved,
            dict(self.faults),
        )

    def _stop(self, error: CorpusError) -> None:
        """The first reason counts."""
        if self.stopped is None:
            self.stopped = error

    async def write(self, task: Task) -> None:
        """Put the task's outcome into the queue; None if it isn't decided because the run stops."""
        outcome = None
        try:
            outcome = await self._write(task)
        except Stopped:
            pass
        except CorpusError as error:
            self._stop(error)
        except (
            Exception
        ) as error:  # a fault of this program: end the run with it, not without an end
            stop = CorpusError(f"{task.item.id}: {type(error).__name__}: {error}")
            stop.__cause__ = error
            self._stop(stop)
        finally:
            if self.stopped is not None:
                async with self.settled:
                    self.settled.notify_all()
            self.outcomes.put(outcome)

    async def _write(self, task: Task) -> Outcome:
        options = self.options
        asked = asking.write(
            task, self.prompts, retries=options.retries, translate=options.chinese == "translate"
        )
        new: list[Reply] = []
        ask = next(asked)
        while True:
            try:
                reply = await self._reply(ask, task)
            except ServerFault as fault:
                return Outcome(
                    task.item,
                    None,
                    (Problem(fault.reason, fault.detail),),
                    asking.shown(ask.prompt),
                    prompt_tokens=sum(reply.prompt_tokens for reply in new),
                    completion_tokens=sum(reply.completion_tokens for reply in new),
                    dollars=sum(reply.dollars for reply in new),
                    attempts=len(new),
                    requests=len(new),
                    pending=True,
                )
            if reply.new:
                new.append(reply)
            else:
                self.cached += 1
            try:
                ask = asked.send(reply)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    async def _reply(self, ask: Ask, task: Task) -> Reply:
        """From the ledger, else from the server.

        Raises:
            ServerFault: it failed ``server_retries`` times.
            Stopped: the run stops before it was sent.
            CorpusError: what stops the run.
        """
        made = await self._in_thread(payload, ask, task.record, self.options, self.folder)
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
            except NotUnderstood:
                continue
            except RequestRefused as refusal:
                return Reply(refusal.reason, asking.REFUSED, refusal.detail)
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

    async def _ask(self, made: Payload) -> Reply:
        """Reserve, claim, send, settle; once."""
        await self._afford(made.at_most)
        actual = Expense()
        try:
            async with self.ready:
                self._check()
                run = await self.commit(lambda: self.ledger.claim(made.key, made.at_most))
                if run is not None:
                    if self.ledger.lives(run):
                        raise _AskedElsewhere
                    await self.commit(lambda: self.ledger.bury(run))
                    raise _AskedElsewhere
                lost: Expense | None = None
                reply = None
                try:
                    # Another run may have settled it between the look into the ledger and the claim.
                    if (kept := self.ledger.answer(made.key)) is not None:
                        return kept
                    reply = await self._send(made)
                    if reply.prompt_tokens < 0:
                        reply = dataclasses.replace(reply, **_fields(made.at_most))
                    actual = Expense(reply.prompt_tokens, reply.completion_tokens, reply.dollars)
                    answer = reply
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
            async with self.settled:
                self.settled.notify_all()

    async def _send(self, made: Payload) -> Reply:
        traits = self.traits
        body = await self._in_thread(made.body, traits)
        tokens = made.at_most.tokens
        async with self.concurrency.slot() as seen:
            self._check()
            if traits != self.traits:  # something was learnt meanwhile
                traits = self.traits
                body = await self._in_thread(made.body, traits)
            wait = max(self.requests_pace.take(), self.tokens_pace.take(tokens))
            await self._sleep(wait)
            # What a failure means for the others is settled before the slot is free for the next.
            try:
                reply = await self.endpoint.complete(body, traits)
            except ServerFault as fault:
                if fault.throttled:
                    self.concurrency.lower(seen)
                self._failed(fault)
                raise
            except NotUnderstood as lesson:
                self._learn(lesson)
                raise
            except RequestRefused as refusal:
                self._refused(refusal)
                raise
            except EndpointError as error:
                self._stop(error)
                raise
        used = reply.prompt_tokens + reply.completion_tokens
        if used >= 0:
            self.tokens_pace.give_back(tokens - used)
        self.answers += 1
        self.failing_since = None
        await self.concurrency.answered()
        return reply

    async def _afford(self, at_most: Expense) -> None:
        """Reserve ``at_most``, waiting for requests under way to turn out cheaper if need be."""
        self._check()
        while not self.account.fits(at_most):
            if self.account.reserved.tokens == 0:
                self._stop(self._budget_reached(at_most))
                raise Stopped
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
            raise Stopped

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the run's end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check()
            await asyncio.sleep(min(left, 0.5))

    def _learn(self, lesson: NotUnderstood) -> None:
        """Remember what the server doesn't understand; of many answers to the same the first counts."""
        new = Traits.of(self.options, dataclasses.asdict(self.traits) | lesson.traits)
        if new != self.traits:
            self.traits = new
            self.ledger.remember(self.options.base_url, self.options.model, **lesson.traits)

    def _refused(self, refusal: RequestRefused) -> None:
        self.refused += 1
        if self.refused >= REFUSED_AT_FIRST and not self.concurrency.opened:
            self._stop(
                EndpointError(
                    f"{self.options.base_url} (model {self.options.model}) has refused the first "
                    f"{self.refused} requests, the last with: {refusal.detail}. Check the writer's "
                    "options."
                )
            )

    def _failed(self, fault: ServerFault) -> None:
        """Count it, and stop the run if the server has given no answer for too long."""
        self.faults[fault.reason] = self.faults.get(fault.reason, 0) + 1
        patience = self.options.patience
        now = time.monotonic()
        self.failing_since = now if self.failing_since is None else self.failing_since
        silent = now - self.failing_since
        if fault.wait is not None and fault.wait > patience:
            self._stop(
                EndpointError(
                    f"{self.options.base_url} asks to wait {fault.wait:,.0f} s ({fault}), longer than "
                    f"writer.patience ({patience:,.0f} s). Nothing is lost: run the job again then."
                )
            )
        elif fault.wait is not None:
            self.concurrency.pause(fault.wait)
        if silent > patience:
            self._stop(
                EndpointError(
                    f"{self.options.base_url} has given no answer for {silent:,.0f} s, the last failure "
                    f"was: {fault}. Nothing is lost: run the job again when the server is well."
                )
            )

    async def _in_thread(self, function: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *values)


class _AskedElsewhere(Exception):
    """Another run is waiting for the same answer."""


def _fields(cost: Expense) -> dict[str, Any]:
    return {field.name: getattr(cost, field.name) for field in dataclasses.fields(cost)}


class _Committer:
    """A thread that puts what is to be written at the same time into one transaction.

    An fsync is a hundred times dearer than a row, and the event loop waits for none.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.loop = asyncio.get_running_loop()
        self.queue: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self.thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self.thread.start()

    async def __call__(self, write: Callable[[], T]) -> T:
        """Do ``write``; returns when it's on the disk. Not to be interrupted."""
        future: asyncio.Future[T] = self.loop.create_future()
        self.queue.put((write, future))
        return await asyncio.shield(future)

    def close(self) -> None:
        self.queue.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (first := self.queue.get()) is not None:
            jobs = [first]
            end = False
            while not self.queue.empty():
                job = self.queue.get()
                if job is None:
                    end = True
                    break
                jobs.append(job)
            results: list[Any] = []
            error: Exception | None = None
            try:
                with self.ledger.transaction():
                    results = [write() for write, _ in jobs]
            except Exception as caught:
                error = CorpusError(
                    f"{self.ledger.path}: the ledger of answers can't be written ({caught}); make room on "
                    "the disk and run the job again"
                )
                error.__cause__ = caught
            self.loop.call_soon_threadsafe(
                self._done, [future for _, future in jobs], results, error
            )
            if end:
                return

    @staticmethod
    def _done(
        futures: list[asyncio.Future[Any]], results: list[Any], error: Exception | None
    ) -> None:
        for number, future in enumerate(futures):
            if future.cancelled():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(results[number])


class _Loop:
    """An event loop in a thread of its own; a context manager."""

    def __enter__(self) -> _Loop:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="requests", daemon=True)
        self.thread.start()
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    def call(self, coroutine: Any) -> Any:
        """Run it and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def start(self, coroutine: Any) -> None:
        """Run it; its result goes its own way."""

        def begin() -> None:
            task = self.loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.loop.call_soon_threadsafe(begin)

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
