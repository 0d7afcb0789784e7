# SPDX-License-Identifier: Apache-2.0

"""Where the work is done: processes of this machine, or a Ray cluster. The same results in the same order.

`Executor.map` is lazy: no more than a few tasks per worker are in flight, so neither a slow reader of the
results nor a long input takes memory. A worker that dies (a decoder that crashes, a process killed for
memory) costs the one task that kills it, not the run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from multiprocessing import connection, get_context, parent_process, resource_tracker
from pathlib import Path
from typing import Any, TypeVar

from gmai_xtuner.core.errors import CorpusError

IN_FLIGHT = 4
"""Tasks per worker that are under way or wait for their turn to be handed on."""

Input = TypeVar("Input")
Output = TypeVar("Output")
Function = Callable[[Any], Any]
Flight = deque[tuple[Any, Any]]  # inputs with the handles of their tasks


class Executor:
    """Runs a function over inputs, ``workers`` of them at a time; this one does it in its own process."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers

    def map(
        self,
        function: Callable[[Input], Output],
        inputs: Iterable[Input],
        *,
        died: Callable[[Input], Output] | None = None,
    ) -> Generator[tuple[Input, Output], None, None]:
        """Yield inputs with the function's results, in their order; inputs are read as results are taken.

        The function, a module's or a `functools.partial` of one, is pickled. ``died`` gives the result of an
        input whose worker dies; default is an error.
        """
        yield from ((one, function(one)) for one in inputs)

    def close(self) -> None:
        """End the workers."""


@contextmanager
def open_executor(name: str, workers: int | None = None) -> Iterator[Executor]:
    """Start an executor, ``processes`` or ``ray``, and end it; a `CorpusError` without Ray or its cluster.

    ``workers`` by default are the cores that this process may use, or the cluster's. One worker of
    ``processes`` is this process itself.
    """
    if name == "ray":
        with _ray(workers) as cluster:
            yield cluster
        return
    workers = workers or cores()
    with closing(Processes(workers) if workers > 1 else Executor()) as executor:
        yield executor


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Processes(Executor):
    """A pool of processes. They are spawned, not forked: libraries with threads don't survive a fork.

    `IN_FLIGHT` tasks per worker are in flight. When a worker dies, all of them are lost with the pool and
    done again one by one.
    """

    _pool: ProcessPoolExecutor | None = None

    def map(
        self,
        function: Callable[[Input], Output],
        inputs: Iterable[Input],
        *,
        died: Callable[[Input], Output] | None = None,
    ) -> Generator[tuple[Input, Output], None, None]:
        iterator = iter(inputs)
        flight: deque[tuple[Input, Any]] = deque()
        submit = self._submitter(function)
        try:
            while True:
                for task in islice(iterator, IN_FLIGHT * self.workers - len(flight)):
                    flight.append((task, submit(task)))
                if not flight:
                    return
                yield from self._next(function, flight, died)
        finally:
            for _, handle in flight:
                self._cancel(handle)

    def _submitter(self, function: Function) -> Function:
        """Return what starts a task and gives its handle."""
        return partial(self._start, function)

    def _start(self, function: Function, task: Any) -> Future[Any]:
        with _blocked_ctrl_c():
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self.workers, mp_context=get_context("spawn"), initializer=_start_worker
                )
            try:
                return self._pool.submit(function, task)
            except BrokenProcessPool as error:  # found when the one before it is waited for
                failed: Future[Any] = Future()
                failed.set_exception(error)
                return failed

    def _next(self, function: Function, flight: Flight, died: Function | None) -> Iterator[Any]:
        """Take tasks off the front of ``flight`` and yield them with their results."""
        try:
            result = flight[0][1].result()
        except BrokenProcessPool:
            self.close()
            for task, _ in flight:
                yield task, self._alone(function, task, died)
            flight.clear()
        else:
            yield flight.popleft()[0], result

    def _alone(self, function: Function, task: Any, died: Function | None) -> Any:
        try:
            return self._start(function, task).result()
        except BrokenProcessPool as error:
            self.close()
            if died is not None:
                return died(task)
            raise CorpusError(
                "a worker process died, twice in the same task. It was killed for memory (see "
                "the system's log; fewer `workers` need less) or a library crashed. "
                "The same command goes on where it stopped."
            ) from error

    def _cancel(self, handle: Future[Any]) -> None:
        handle.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


@contextmanager
def _blocked_ctrl_c() -> Iterator[None]:
    """Keep Ctrl-C, which is the parent's to handle, from processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started with the first process otherwise, when it lets the signal through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """End this worker when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _ray(workers: int | None) -> Iterator[Executor]:
    # Read by Ray when it is imported: no usage statistics leave a hospital, no web server is opened.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise CorpusError("engine `ray` needs Ray: pip install ray") from error
    address = os.environ.get("RAY_ADDRESS")
    started_here = not ray.is_initialized()
    if started_here:
        # On a cluster the code has to be installed, or at the same place on every machine.
        places = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
        local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={
                    "env_vars": {
                        "PYTHONPATH": os.pathsep.join(dict.fromkeys(places)),
                        "RAY_USAGE_STATS_ENABLED": "0",
                    }
                },
                **({} if address else local),
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"at {address} (RAY_ADDRESS)" if address else "on this machine"
            raise CorpusError(f"no Ray cluster {where}: {error}") from error
    try:
        in_cluster = int(ray.cluster_resources().get("CPU", 1))
        yield Ray(ray, workers or max(in_cluster, 1))
    finally:
        if started_here:
            ray.shutdown()


class Ray(Processes):
    """Tasks of a Ray cluster. Sources and output have to lie on storage that all machines share.

    Ray itself does a task again whose worker died, `max_retries` times.
    """

    def __init__(self, ray: Any, workers: int) -> None:
        super().__init__(workers)
        self._ray = ray

    def _submitter(self, function: Function) -> Function:
        remote = self._ray.remote(num_cpus=1, max_retries=1)(_call)
        held = self._ray.put(function)
        return lambda task: remote.remote(held, task)

    def _next(self, function: Function, flight: Flight, died: Function | None) -> Iterator[Any]:
        task, reference = flight[0]
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            if died is None:
                raise CorpusError(f"a task of the Ray cluster was lost: {error}") from error
            result = died(task)
        flight.popleft()
        yield task, result

    def _cancel(self, handle: Any) -> None:
        self._ray.cancel(handle, force=False)


def _call(function: Function, task: Any) -> Any:
    return function(task)
