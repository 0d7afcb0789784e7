# SPDX-License-Identifier: Apache-2.0

"""Calls in a process of their own, with a bound on memory and time: `run_bounded`, for any reader of files.

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
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from gmai_xtuner.core.errors import GMAIError, Unusable

MEMORY = 2**30
SECONDS = 20
FAILED = "file that its decoder can't read"
DIED = "file that ends its decoder, or takes too much memory or time"

_WAIT = 8  # a busy machine gives a worker the seconds of computing that it may use within so many times them
_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Result = TypeVar("Result")


def run_bounded(
    function: Callable[..., Result], *args: Any, memory: int = MEMORY, seconds: int = SECONDS
) -> Result:
    """Return ``function(*args)``, computed in a worker process.

    Args:
        function: of a module; it, its arguments and its result are pickled.
        args: its arguments.
        memory: bytes that the call may add to what the worker holds.
        seconds: of computing.

    Raises:
        GMAIError: what the function raises of this family, such as `Unusable`.
        Unusable: it raises anything else (`FAILED`), or the worker dies or is stopped (`DIED`).
    """
    if _Worker.is_here:
        return function(*args)
    worker = _idle.pop() if _idle else _Worker()
    try:
        done, result = worker.ask((function, args, memory, seconds), timeout=_WAIT * seconds)
    except BaseException:  # an answer that is not waited for must not be the next call's
        worker.stop()
        raise
    _idle.append(worker)
    if done:
        return result
    raise result


class _Worker:
    is_here = False
    """True in a worker's own process."""

    def __init__(self) -> None:
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

    def ask(self, call: tuple[Any, ...], *, timeout: float) -> tuple[bool, Any]:
        try:
            self._link.send(call)
            if self._link.poll(timeout):
                answer: tuple[bool, Any] = self._link.recv()
                return answer
        except (EOFError, ConnectionError) as error:
            raise Unusable(DIED) from error
        raise Unusable(DIED, f"no answer within {timeout:g} s")

    def stop(self) -> None:
        self._link.close()
        self._process.kill()
        self._process.wait()


_idle: list[_Worker] = []


@atexit.register
def _stop_workers() -> None:
    while _idle:
        _idle.pop().stop()


# A forked process must not talk to its parent's workers.
os.register_at_fork(after_in_child=_idle.clear)


def _serve(descriptor: int) -> None:
    """Answer calls until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Worker.is_here = True
    link = Connection(descriptor)
    while True:
        try:
            function, args, memory, seconds = link.recv()
        except EOFError:
            return
        _limit(memory, seconds)
        answer: tuple[bool, Any]
        try:
            answer = True, function(*args)
        except GMAIError as error:
            answer = False, error
        except BaseException as error:  # a panic of Rust is no Exception
            answer = False, Unusable(FAILED, f"{type(error).__name__}: {str(error)[:200]}")
        _limit(None, None)
        link.send(answer)


def _limit(memory: int | None, seconds: int | None) -> None:
    """Bound what this process may allocate and compute from now on; None lifts the bound."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    for kind, soft in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, None if memory is None else held + memory),
        (resource.RLIMIT_CPU, None if seconds is None else int(time.process_time()) + 1 + seconds),
    ):
        hard = resource.getrlimit(kind)[1]
        wanted = resource.RLIM_INFINITY if soft is None else soft
        if hard != resource.RLIM_INFINITY and (wanted == resource.RLIM_INFINITY or wanted > hard):
            wanted = hard
        resource.setrlimit(kind, (wanted, hard))
