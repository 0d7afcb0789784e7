# SPDX-License-Identifier: Apache-2.0

"""Calls in a process of their own, with a bound on memory and time, for any reader of files.

`run_bounded` returns a function's result, `iterate_bounded` yields what a generator yields.

Native decoders (OpenJPEG, CharLS, GDCM, libtiff, ITK) may end the process that calls them, panic, or allocate
what a header claims. A worker process takes one call after the other, so that honest files stay fast, and a
new one takes its place when it dies. Linux bounds memory; elsewhere only time is bounded.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from inspect import isgenerator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from gmai_xtuner.core.errors import GMAIError, Unusable

MEMORY = 2**30
SECONDS = 20
FAILED = "file that its decoder can't read"
DIED = "file that ends its decoder, or takes too much memory or time"

_RESULT, _ITEM, _END, _ERROR = "result", "item", "end", "error"
_WAIT = 8  # a busy machine gives a worker the seconds of computing that it may use within so many times them
_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Result = TypeVar("Result")


def run_bounded(
    function: Callable[..., Result], *args: Any, memory: int = MEMORY, seconds: int = SECONDS
) -> Result:
    """Return ``function(*args)``, computed in a worker process; all of it is pickled.

    ``memory`` are bytes beside what the worker holds, ``seconds`` those of computing.

    Raises:
        GMAIError: what the function raises of this family.
        Unusable: it raises anything else (`FAILED`), or the worker dies or is stopped (`DIED`).
    """
    if _Worker.is_here:
        return function(*args)
    (result,) = _results(function, args, memory, seconds)
    return result  # type: ignore[no-any-return]


def iterate_bounded(
    function: Callable[..., Iterator[Result]],
    *args: Any,
    memory: int = MEMORY,
    seconds: int = SECONDS,
) -> Iterator[Result]:
    """Yield what the generator ``function(*args)`` yields, as `run_bounded`; the seconds are of each item."""
    yield from (function(*args) if _Worker.is_here else _results(function, args, memory, seconds))


def _results(
    function: Callable[..., Any], args: tuple[Any, ...], memory: int, seconds: int
) -> Iterator[Any]:
    """Yield all items of a generator, or the one result of another function."""
    worker, is_over = _living_worker(), False
    try:
        worker.send((function, args, memory, seconds))
        while not is_over:
            kind, value = worker.receive(timeout=_WAIT * seconds)
            is_over = kind != _ITEM
            if kind == _ERROR:
                raise value
            if kind != _END:
                yield value
    finally:
        if is_over:
            _idle.append(worker)
        else:  # an answer that is not waited for must not be the next call's
            worker.stop()


class _Worker:
    is_here = False
    """True in a worker's own process."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._link, there = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import _serve; _serve({there.fileno()})"
        )
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_SINGLE_THREAD},
            )

    def send(self, call: tuple[Any, ...]) -> None:
        try:
            self._link.send(call)
        except ConnectionError as error:
            raise Unusable(DIED) from error

    def receive(self, *, timeout: float) -> tuple[str, Any]:
        try:
            if self._link.poll(timeout):
                answer: tuple[str, Any] = self._link.recv()
                return answer
        except (EOFError, ConnectionError) as error:
            raise Unusable(DIED) from error
        raise Unusable(DIED, f"no answer within {timeout:g} s")

    def lives(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._link.close()
        if self._owner != os.getpid():  # a generator that a fork has copied
            return
        self._process.kill()
        self._process.wait()


_idle: list[_Worker] = []


def _living_worker() -> _Worker:
    """Return an idle worker, or a new one: the system may have ended those that wait, for their memory."""
    with suppress(IndexError):  # another thread has taken the last one
        while _idle:
            if (worker := _idle.pop()).lives():
                return worker
            worker.stop()
    return _Worker()


@atexit.register
def _stop_workers() -> None:
    while _idle:
        _idle.pop().stop()


# A forked process must not talk to its parent's workers.
os.register_at_fork(after_in_child=_idle.clear)


def _serve(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Worker.is_here = True
    link = Connection(descriptor)
    while True:
        try:
            function, args, memory, seconds = link.recv()
        except EOFError:
            return
        _limit_memory(memory)
        _limit_seconds(seconds)
        answer: tuple[str, Any]
        try:
            result = function(*args)
            if isgenerator(result):
                for item in result:
                    link.send((_ITEM, item))
                    _limit_seconds(seconds)
                answer = _END, None
            else:
                answer = _RESULT, result
        except GMAIError as error:
            answer = _ERROR, error
        except BaseException as error:  # a panic of Rust is no Exception
            answer = _ERROR, Unusable(FAILED, f"{type(error).__name__}: {str(error)[:200]}")
        _limit_memory(None)
        _limit_seconds(None)
        link.send(answer)


def _limit_memory(memory: int | None) -> None:
    """Bound what this process may allocate beside what it holds; None lifts the bound."""
    if sys.platform.startswith("linux"):
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit("CORE", 0)
        _limit("AS", None if memory is None else held + memory)


def _limit_seconds(seconds: int | None) -> None:
    """Bound what this process may compute from now on; None lifts the bound."""
    if sys.platform.startswith("linux"):
        _limit("CPU", None if seconds is None else int(time.process_time()) + 1 + seconds)


def _limit(name: str, wanted: int | None) -> None:
    import resource

    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    wanted = hard if wanted is None else wanted
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (soft, hard))
