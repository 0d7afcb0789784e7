# SPDX-License-Identifier: Apache-2.0

"""A request to stop: one rank hears it, all of them obey at the end of an optimiser step.

Ctrl-C (``SIGINT``), ``SIGTERM`` and ``SIGUSR1`` to any rank, a file ``stop`` in the work dir, the death of
the ``xtuner`` command above, or a call of :meth:`StopRequest.ask`. A second Ctrl-C ends the run at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce
from torch.utils.data import DataLoader

from gmai_xtuner.train.status import parent_of, xtuner_above

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_CTRL_C = 1.0
"""Seconds in which several ``SIGINT`` are one: the terminal's, and the one that torchrun hands on."""
STOP_FILE = "stop"

_FILE, _LAUNCHER, _ASKED = 1001, 1002, 1003


class StopRequest:
    """Hears requests to stop; the signal handler only takes a note: what a rank does is interrupted nowhere.

    Instead of sending a signal a user may put an (empty) ``stop_file`` there. Launchers give their processes
    a fixed time after a signal (torchrun 30 seconds); after a file there is no such end.
    """

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self._signal = 0
        self._noted = 0.0
        self._asked: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._launcher = xtuner_above(os.getpid())

    def install(self) -> None:
        """Take the signals from now on. Outside the main thread, where Python has none, do nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What was started in the background of a script is to ignore the terminal's Ctrl-C.
                if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Put back the handlers from before :meth:`install`."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def ask(self, reason: str) -> None:
        """Stop at the end of the step, "because" of the reason; one rank is enough."""
        self._asked = reason

    def agreed(self) -> str | None:
        """Return why all ranks are to stop now, or ``None``. Every rank must call it, at the same step."""
        own = torch.tensor([self._own()], dtype=torch.int32)
        all_reduce(own, op="max")
        code = int(own)
        if not code:
            return None
        reasons = {
            _ASKED: self._asked or "another rank asked for it",
            _FILE: f"there is a file {self.stop_file}",
            _LAUNCHER: "the xtuner command that started this run has gone",
            signal.SIGINT: "Ctrl-C came",
        }
        return reasons.get(code) or f"{signal.Signals(code).name} came"

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal == number == signal.SIGINT and now - self._noted >= ONE_CTRL_C:
            raise KeyboardInterrupt
        if self._signal != number:
            self._signal, self._noted = number, now

    def _own(self) -> int:
        if self._asked:
            return _ASKED
        if self._signal:
            return self._signal
        if self._launcher and parent_of(self._launcher[0]) != self._launcher[1]:
            return _LAUNCHER
        # One look at the file system a step, by one process.
        if int(os.environ.get("RANK", "0")) == 0 and self.stop_file.exists():
            return _FILE
        return 0


def guard_workers(loader: DataLoader) -> None:
    """Keep a data loader's workers out of what concerns the trainer alone.

    Requests to stop are not for them (:func:`worker_init`). And they are started with a number from the
    loader's own generator instead of the global one, which dropout draws from: a resumed run starts them in
    the middle of an epoch, and would go on with other random numbers than a run never stopped.
    """
    loader.worker_init_fn = partial(worker_init, then=loader.worker_init_fn)
    loader.generator = torch.Generator().manual_seed(0)


def worker_init(worker_id: int, *, then: Callable[[int], None] | None = None) -> None:
    """Start a data-loader worker: requests to stop are not for it.

    A scheduler signals every process of a job. A worker that died of it would take the trainer along before
    its checkpoint. So a worker takes ``SIGTERM`` from its trainer alone (that is how the data loader ends
    workers) and ignores ``SIGINT`` and ``SIGUSR1``. ``then`` is what the data loader would have called.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_the_trainer_says, daemon=True).start()
    if then is not None:
        then(worker_id)


def _end_when_the_trainer_says() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
