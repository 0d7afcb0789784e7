# SPDX-License-Identifier: Apache-2.0

"""Start ``xtuner train``, show one screen of it, hand signals on, and return how it really ended."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train.status import (
    ALIVE,
    GONE,
    is_alive,
    owner_now,
    place_of_syntax_error,
    read_status,
    store_status,
    stored_status,
    xtuner_above,
)

FAILED, STOPPED = 1, 3
"""Exit statuses of a run that failed, and of one that stopped on request; a signal gives 128 + its number."""
LAUNCHER = "GMAI_LAUNCHER"
"""Environment variable with the process of ``gmai-train``, without which its run does not begin."""
PATIENCE = 120.0
"""Seconds that a run whose launcher was killed has to write its checkpoint before another start."""
ONE_SIGNAL = 1.0
"""Seconds in which several signals are one: of the terminal, and of a scheduler that signals each process."""
LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""

_ENTRY = re.compile(r"(?:^|  )[\d/]+ [\d:]+ - mmengine - (\w+) - (.*)")
_PROGRESS = re.compile(r"Iter\(train\)\s*\[\s*(\d+)/(\d+)\]")
_SHOWN = re.compile(
    r"Iter\(val\)|Sample answer |No sample answers|Saving checkpoint|\d+ micro-batches and|  held out for"
)
_KNOWN_NOISE = re.compile(r"Failed to search registry|\"?(FileClient|HardDiskBackend)\"? ")
_VALUES = (("loss", "loss"), ("lr", "rate"), ("tokens_per_second", "tokens/s"), ("eta", "eta"))
_ERRORS = re.compile(r"(?:error: |(?:[\w]+\.)*\w*(?:Error|Exception)\b|KeyboardInterrupt)")

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Unless the user has set it: packs differ in images and lengths, which leaves fixed segments in pieces."""


def start_xtuner(arguments: Sequence[str], environment: Mapping[str, str], **options: Any) -> Any:
    """Start ``xtuner``, which ends when this process does; it starts the first ``python`` of its ``PATH``.

    Raises:
        GMAIError: it is not installed.
    """
    path = _path()
    program = shutil.which("xtuner", path=path)
    if program is None:
        raise GMAIError(f"the command xtuner is not in {path}: pip install xtuner==0.2.0")
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        [program, *arguments],
        env={**ALLOCATOR, **os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG
        **options,
    )


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


class Screen:
    """Takes each line that a trainer prints; shows progress, warnings, answers and validation."""

    def __init__(self, title: str) -> None:
        self.error = ""
        """The last line that named an error."""
        self._title = title
        self._bar: tqdm | None = None
        self._shown_at = 0.0
        self._shows_rest = False

    def take(self, line: str) -> None:
        """Take one line, without its end."""
        if _ERRORS.match(line):
            self.error = line
        if (entry := _ENTRY.match(line)) is None:
            self._shows_rest = self._shows_rest and line.startswith("  ")
            if self._shows_rest:
                self.say(line)
            return
        level, text = entry.groups()
        if progress := _PROGRESS.match(text):
            self._progress(int(progress[1]), int(progress[2]), text)
        warns = level in ("WARNING", "ERROR") and not _KNOWN_NOISE.match(text)
        self._shows_rest = warns or bool(_SHOWN.match(text))
        if self._shows_rest:
            self.say(f"{level}: {text}" if warns else re.sub(r"\s{2,}", "  ", text.strip()))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _progress(self, iteration: int, total: int, text: str) -> None:
        found = dict(re.findall(r"([\w/]+): ((?:\d+ days?, )?\S+)", text))
        shown = "  ".join(f"{title} {found[name]}" for name, title in _VALUES if name in found)
        if sys.stdout.isatty():
            if self._bar is None:
                layout = "{desc} {bar:20} {n_fmt}/{total_fmt}{postfix}"
                self._bar = tqdm(total=total, desc=self._title, bar_format=layout, file=sys.stdout)
            self._bar.update(iteration - self._bar.n)
            self._bar.set_postfix_str(shown)
        elif time.monotonic() - self._shown_at >= LINE_EVERY or iteration == total:
            self._shown_at = time.monotonic()
            self.say(f"{self._title}  {iteration}/{total}  {shown}")


class Launch:
    """One run of ``xtuner train``, whose output goes to ``train_<time>.log`` in the work dir.

    ``arguments`` are what follows ``xtuner train``, with ``--work-dir``; ``environment`` adds variables.
    """

    def __init__(
        self, title: str, arguments: Sequence[str], work_dir: Path, environment: Mapping[str, str]
    ) -> None:
        self.work_dir = work_dir
        self.log = work_dir / f"train_{datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}.log"
        self._arguments = ["train", *arguments]
        self._environment = {**environment, LAUNCHER: str(os.getpid())}
        self._screen = Screen(title)
        self._before: dict[str, Any] = {}
        self._signal = 0
        self._signalled = 0.0
        self._process: subprocess.Popen[str]

    def run(self) -> int:
        """Train; return the exit status: 0 only if the run has finished."""
        self._wait_for_an_orphan()
        self._before = stored_status(self.work_dir)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        handlers = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            self._run()
        finally:
            self._screen.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._ended()

    def _run(self) -> None:
        # A session of its own: the terminal's Ctrl-C comes here alone.
        options = {"stdout": subprocess.PIPE, "start_new_session": True}
        self._process = start_xtuner(self._arguments, self._environment, **options)
        with self.log.open("w", encoding="utf-8") as log, self._process:
            assert self._process.stdout is not None
            # To the end of the output, which the trainer holds: xtuner may be gone earlier.
            for line in self._process.stdout:
                log.write(line)
                self._screen.take(line.rstrip("\n"))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on to the trainer of rank 0; the second one ends the run at once."""
        now = time.monotonic()
        first = not self._signal
        if not first and now - self._signalled < ONE_SIGNAL:
            return
        self._signal, self._signalled = number, now
        status = self._own_status()
        trainer = int(status.get("process", 0)) if status.get("state") in ALIVE else 0
        if first and trainer:
            print(
                "stopping with a checkpoint at the end of the step; once more: at once", flush=True
            )
            # Before its loop the trainer hears Ctrl-C alone.
            os.kill(trainer, number if status["state"] == "running" else signal.SIGINT)
            return
        with suppress(ProcessLookupError):
            if trainer:
                os.kill(trainer, signal.SIGKILL)
            os.killpg(self._process.pid, signal.SIGTERM)

    def _own_status(self) -> dict[str, Any]:
        """Return the status of this run; nothing as long as it has written none."""
        status = read_status(self.work_dir)
        owner = ("host", "process", "since")
        return status if any(status.get(key) != self._before.get(key) for key in owner) else {}

    def _ended(self) -> int:
        status = self._own_status()
        if status.get("state") in ALIVE:  # ours has ended: of a run that began meanwhile
            status = {}
        if self._signal and (not status or status.get("reason") == GONE):
            reason = f"{signal.Signals(self._signal).name} came, and it ended at once, without a checkpoint"
            status = self._write({**status, "state": "stopped", "reason": reason})
        elif not status:
            reason = (
                self._screen.error.removeprefix("error: ") or "xtuner ended before the run began"
            )
            if reason.startswith(("SyntaxError", "IndentationError", "TabError")):
                reason += (
                    f" ({place_of_syntax_error(self._arguments[1])})"  # mmengine does not say it
                )
            status = {"state": "failed", "reason": reason}
            # A start that the trainer refuses leaves the status of who owns the work dir.
            refused = self._screen.error.startswith("error: ")
            if not refused and self._before.get("state") not in ("finished", *ALIVE):
                self._write(status)
        state = status["state"]
        print(f"{state}{': ' * bool(status.get('reason'))}{status.get('reason', '')}", flush=True)
        if state == "finished":
            return 0
        print(f"the whole output: {self.log}", flush=True)
        if state != "stopped":
            return FAILED
        print("to go on: the same command (of one stage, with --resume)", flush=True)
        return 128 + self._signal if self._signal else STOPPED

    def _write(self, status: dict[str, Any]) -> dict[str, Any]:
        own = owner_now()
        base = {"iteration": 0, "of": None, "since": own["time"]}
        store_status(self.work_dir, {**base, **self._before, **status, **own})
        return status

    def _wait_for_an_orphan(self) -> None:
        """Let a run whose ``xtuner`` was killed come to the end of its step and give the work dir back."""
        end, announced = time.monotonic() + PATIENCE, False
        while time.monotonic() < end:
            status = stored_status(self.work_dir)
            here = status.get("host") == socket.gethostname() and status.get("state") in ALIVE
            if not here or not is_alive(status) or xtuner_above(int(status["process"])):
                return
            if not announced:
                print(f"process {status['process']} is ending the run that was killed", flush=True)
            announced = True
            time.sleep(0.5)
