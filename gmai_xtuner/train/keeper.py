# SPDX-License-Identifier: Apache-2.0

"""The process beside a trainer that outlives it: ``python -m gmai_xtuner.train.keeper WORK_DIR PROCESS``.

While the trainer lives, it renews the time stamp of ``status.json``. When the trainer has died without a
word (``kill -9``, the kernel's lack of memory, a fault in a library), it writes ``failed``. And when Ctrl-C
comes from the terminal, it ends the ``xtuner`` command above, which would otherwise kill its trainer after a
quarter of a second, before a checkpoint is written.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from gmai_xtuner.train.status import (
    ALIVE,
    GONE,
    HEARTBEAT,
    KEEPER_HEARS,
    STATUS_FILE,
    store_status,
    stored_status,
)

POLL = 0.2
"""Seconds between two looks at the trainer."""


def is_xtuner(process: int) -> bool:
    """Return whether a process is the ``xtuner`` command."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(part) == b"xtuner" for part in command[:2])


def parent_of(process: int) -> int | None:
    """Return the parent of a process; ``None`` if the process is not there."""
    try:
        # The name, in brackets, may itself hold brackets and blanks.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])


def xtuner_above(process: int) -> tuple[int, int] | None:
    """Find the ``xtuner`` command above a process, as (its child, itself).

    It runs the trainer (or torchrun) as a child, and dies of a signal without handing it on. When the child
    has another parent, ``xtuner`` has gone.
    """
    while parent := parent_of(process):
        if is_xtuner(parent):
            return process, parent
        process = parent
    return None


def main(work_dir: Path, trainer: int, launcher: int) -> None:
    """Stay until the trainer has gone; interrupt one that has not begun when ``xtuner`` goes.

    Args:
        work_dir: of the run.
        trainer: the process to watch, which is this one's parent.
        launcher: the trainer's parent.
    """

    def spare_the_trainer(*_: object) -> None:
        if is_xtuner(launcher):
            os.kill(launcher, signal.SIGTERM)

    for number in KEEPER_HEARS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            hears = spare_the_trainer if number == signal.SIGINT else signal.SIG_IGN
            signal.signal(number, hears)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, KEEPER_HEARS)
    renewed = time.monotonic()
    command = xtuner_above(trainer)
    while os.getppid() == trainer:
        time.sleep(POLL)
        if command and parent_of(command[0]) != command[1]:
            command = None
            if stored_status(work_dir).get("state") == "starting":
                os.kill(trainer, signal.SIGINT)  # later the trainer looks for itself, at each step
        if time.monotonic() - renewed >= HEARTBEAT:
            renewed = time.monotonic()
            with suppress(OSError):
                os.utime(work_dir / STATUS_FILE)
    status = stored_status(work_dir)
    if status.get("process") == trainer and status.get("state") in ALIVE:
        store_status(work_dir, {**status, "state": "failed", "reason": GONE})


if __name__ == "__main__":
    watched = int(sys.argv[2])
    main(Path(sys.argv[1]), watched, parent_of(watched) or 0)
