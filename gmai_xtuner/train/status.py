# SPDX-License-Identifier: Apache-2.0

"""One owner for each work dir, and a ``status.json`` that is true from the first line of a run to its last.

The process of rank 0 holds a lock on ``run.lock`` in the work dir for as long as it lives; the kernel
releases it, whatever the process dies of.

A second process, the keeper (``python -m gmai_xtuner.train.status WORK_DIR PROCESS``), outlives it. While
the trainer lives, it renews the time stamp of ``status.json``, for machines the lock does not reach. When the
trainer has died without a word (``kill -9``, the kernel's lack of memory, a fault in a library), it writes
``failed``. And when Ctrl-C comes from the terminal, it ends the ``xtuner`` command above, which would
otherwise kill its trainer after a quarter of a second, before a checkpoint is written.
"""

from __future__ import annotations

import ast
import atexit
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import is_running, replace_text
from gmai_xtuner.core.strict_json import STRICT_JSON

STATUS_FILE = "status.json"
"""Says how a run ended, for the script that started it: ``xtuner`` exits with 0 whatever happens."""
LOCK_FILE = "run.lock"
ALIVE = ("starting", "running")
HEARTBEAT = 5.0
"""Seconds after which the keeper renews the time stamp of ``status.json``."""
POLL = 0.2
"""Seconds between two looks of the keeper at the trainer."""
LOOK = 4 * HEARTBEAT
"""Seconds for which a run on another machine is watched before it is taken for dead."""
KEEPER_HEARS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def rank() -> int:
    """Return this process's rank, as torchrun, Slurm or MPI says it before anything is initialised."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


class Run:
    """A run's hold on its work dir, which is made; ``resumes`` says that it may go on from what is there.

    Raises:
        GMAIError: another run holds the work dir, or an earlier one has left checkpoints there and
            ``resumes`` is false. Nothing has been changed then.
    """

    def __init__(self, work_dir: Path, *, resumes: bool) -> None:
        self.work_dir = Path(os.path.abspath(work_dir))
        self.is_owner = rank() == 0
        self.progress: Callable[[], tuple[int, int | None]] = lambda: (0, None)
        """Returns micro-batches trained, and those of the whole run (``None`` while not known)."""
        self._since = owner_now()["time"]
        self._written = 0.0
        self._lock: int | None = None
        if self.is_owner:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        if not resumes:
            from gmai_xtuner.checkpoint.training import checkpoints_in

            if found := checkpoints_in(self.work_dir):
                self.release()
                raise GMAIError(
                    f"work dir {self.work_dir} has checkpoints of an earlier run ({found[0].name}, "
                    f"{len(found)} in all), and --resume was not given. To go on: the same command with "
                    f"--resume {self.work_dir}. To start anew: another --work-dir, or remove them first"
                )
        if self.is_owner:
            self.write("starting")

    def write(self, state: str, reason: str = "") -> None:
        """Replace ``status.json``; rank 0 does it, and any rank that fails.

        ``state`` is ``starting`` (reads data, builds the model), ``running``, ``stopped`` (on request),
        ``finished`` or ``failed``; ``reason`` why it stopped or failed.
        """
        if not self.is_owner:
            if state != "failed" or stored_status(self.work_dir).get("state") not in ALIVE:
                return
            reason = f"rank {rank()}: {reason}"
        iteration, of = self.progress()
        status = {"state": state, "iteration": iteration, "of": of, "reason": reason}
        self._written = time.monotonic()
        store_status(self.work_dir, {**status, "since": self._since, **owner_now()})

    def renew(self, seconds: float = 30.0) -> None:
        """Write ``running`` with the present iteration, unless that was done in the last ``seconds``."""
        if self.is_owner and time.monotonic() - self._written >= seconds:
            self.write("running")

    def failed(self, error: BaseException) -> None:
        """Write how the run ended by an error; what another rank has said first stays."""
        state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        if stored_status(self.work_dir).get("state") in ALIVE:
            self.write(state, in_plain_words(error))

    def release(self) -> None:
        """Give the work dir back; a process that ends does so by itself."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        handle = os.open(self.work_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        held, reaches = False, True
        try:
            # Not flock: data-loader workers would inherit it, and outlive a killed trainer with it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reaches = error.errno not in _NO_LOCKS
            held = reaches
        status = stored_status(self.work_dir)
        if not held and status.get("state") in ALIVE:
            here = status.get("host") == socket.gethostname()
            if here and not reaches:
                held = is_alive(status)
            elif not here:
                held = _stays_young(self.work_dir / STATUS_FILE, status)
        if held:
            os.close(handle)
            raise GMAIError(
                f"work dir {self.work_dir} belongs to another run: {describe_owner(status)}. Nothing was "
                "changed. Give another --work-dir, or stop that run first: "
                f"touch {self.work_dir / 'stop'}"
            )
        self._lock = handle


def owner_now() -> dict[str, Any]:
    """Return the fields of a status that say when and by which process it is written."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "host": socket.gethostname(), "process": os.getpid()}


def describe_owner(status: dict[str, Any]) -> str:
    """Return who holds a work dir, from its status."""
    if status.get("state") not in ALIVE:
        return "a process that has just started"
    return (
        f"process {status.get('process')} on {status.get('host')}, since "
        f"{status.get('since', status.get('time'))} ({status['state']}, iteration "
        f"{status.get('iteration')} of {status.get('of')})"
    )


# --- the file -----------------------------------------------------------------------------------


def stored_status(work_dir: Path) -> dict[str, Any]:
    """Return what ``status.json`` of a work dir says; nothing if there is none that can be read."""
    try:
        status = STRICT_JSON.decode((work_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def store_status(work_dir: Path, status: dict[str, Any]) -> None:
    """Replace ``status.json``; on a full disk, write over the old one; never raise for it."""
    text = json.dumps(status, ensure_ascii=False) + "\n"
    file = work_dir / STATUS_FILE
    try:
        replace_text(file, text)
    except OSError as error:
        try:
            with file.open("r+", encoding="utf-8") as old:
                old.write(text)
                old.truncate()
        except OSError:
            print(f"{file} can't be written ({error}): {text}", file=sys.stderr)


def read_status(work_dir: Path) -> dict[str, Any]:
    """Return the status of a run; one whose process on this machine is gone has ``failed``."""
    status = stored_status(work_dir)
    here = status.get("host") == socket.gethostname()
    if status.get("state") in ALIVE and here and not is_alive(status):
        return {**status, "state": "failed", "reason": GONE}
    return status


GONE = (
    "its process ended without a word: killed, by the kernel for want of memory (see dmesg) or by kill -9. "
    "The same command with --resume goes on from the last checkpoint"
)


def is_alive(status: dict[str, Any]) -> bool:
    """Return whether the process of a status is there, on this machine."""
    try:
        return is_running(int(status["process"]))
    except (KeyError, TypeError, ValueError):
        return False


def _stays_young(file: Path, status: dict[str, Any]) -> bool:
    """Watch whether a keeper on another machine renews the status file."""
    print(
        f"{file} says {status['state']} on {status.get('host')}; looking for {LOOK:g} s whether it is so",
        file=sys.stderr,
    )
    end, first = time.monotonic() + LOOK, _time_stamp(file)
    while time.monotonic() < end:
        time.sleep(HEARTBEAT / 5)
        if _time_stamp(file) != first:
            return True
    return False


def _time_stamp(file: Path) -> int:
    # Opened, because a network file system asks its server only then.
    with file.open("rb") as handle:
        return os.fstat(handle.fileno()).st_mtime_ns


# --- why ----------------------------------------------------------------------------------------

_MEANINGS = (
    (
        r"DataLoader worker .*(killed by signal|exited unexpectedly)",
        "a data-loader worker was killed, most likely by the kernel for want of memory (see dmesg): lower "
        "train_dataloader.num_workers or give the job more memory (in a container, --shm-size)",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "the memory of the GPU does not suffice: lower train_dataloader.batch_size and raise "
        "optim_wrapper.accumulative_counts, or take --deepspeed zero3 or zero2_offload",
    ),
    (
        r"No space left on device|Disk quota exceeded|inline_container\.cc|iostream error",
        "the disk is full: make room, and give the same command again (to train, with --resume)",
    ),
    (r"No module named", "a package is missing from this environment: pip install it"),
    (
        r"NCCL|Connection closed by peer|Connection reset by peer|Broken pipe",
        "another rank or its machine has gone: its own output says why",
    ),
)
"""Errors of other packages that a user can cause: a pattern, and what it means."""


def in_plain_words(error: BaseException) -> str:
    """Return why a run ended, for ``status.json``: what an error means, and then its own text."""
    if isinstance(error, GMAIError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C came before a checkpoint could be written"
    while isinstance(error, ImportError) and isinstance(error.__context__, ImportError):
        error = error.__context__  # mmengine says which module it could not import, and not why
    own = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return f"the memory of this machine does not suffice. {own}"
    meaning = next((text for pattern, text in _MEANINGS if re.search(pattern, own)), None)
    if meaning is None and isinstance(error, AssertionError):
        meaning = "DeepSpeed, mmengine or xtuner does not take a setting of this run"
    return own if meaning is None else f"{meaning}. {own}"


def place_of_syntax_error(config: str) -> str:
    """Return where a config file is no Python, which mmengine does not say."""
    with suppress(OSError):
        try:
            ast.parse(Path(config).read_text(encoding="utf-8"))
        except SyntaxError as error:
            return f"{config}, line {error.lineno}"
    return f"in a file that {config} names as _base_"


# --- the run of this process --------------------------------------------------------------------

_current: Run | None = None


def claim(work_dir: Path, *, resumes: bool) -> Run:
    """Return this process's hold on a work dir; take it if it has none (errors: see :class:`Run`)."""
    global _current
    if _current is None or _current.work_dir != Path(os.path.abspath(work_dir)):
        _current = Run(work_dir, resumes=resumes)
    return _current


def record_failure(error: BaseException) -> None:
    """Write into the status of this process's run, if it has one, that it ended by an error."""
    if _current is not None:
        _current.failed(error)


def record_failed_start(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """``sys.excepthook`` of ``xtuner train`` until the plugin sets its own: no run has begun yet.

    The config can't be read, an import fails, an option is none. An earlier run that has finished, or that
    lives, keeps its status; so does the work dir of a config that can't be one of this package's.
    """
    sys.__excepthook__(kind, error, trace)
    words, in_settings = [], False
    for word in sys.argv:  # --cfg-options itself may be what is wrong
        in_settings = word == "--cfg-options" or (in_settings and not word.startswith("--"))
        words += [] if in_settings else [word]
    sys.argv = words
    arguments = sys.modules["__main__"].parse_args()
    config = Path(arguments.config)
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "gmai"
    work_dir = Path(arguments.work_dir or Path("work_dirs", config.stem))
    foreign = not ("gmai" in text or "_base_" in text)
    if rank() or foreign or read_status(work_dir).get("state") in ("finished", *ALIVE):
        return
    reason = in_plain_words(error)
    if isinstance(error, SyntaxError):
        reason += f" ({place_of_syntax_error(arguments.config)})"
    work_dir.mkdir(parents=True, exist_ok=True)
    status = {"state": "failed", "iteration": 0, "of": None, "reason": reason}
    own = owner_now()
    store_status(work_dir, {**status, "since": own["time"], **own})
    print(f"error: {reason}", file=sys.stderr)


@contextmanager
def failure_recorded(work_dir: Path, *, resumes: bool) -> Iterator[Run]:
    """Hold a work dir for a block, and write into its status if the block raises."""
    run = claim(work_dir, resumes=resumes)
    try:
        yield run
    except BaseException as error:
        run.failed(error)
        raise


def start_keeper(run: Run) -> None:
    """Start the keeper, the process that outlives this one; see the module."""
    if not run.is_owner:
        return
    command = [sys.executable, "-m", __name__, str(run.work_dir), str(os.getpid())]
    nowhere = subprocess.DEVNULL
    # Until it hears signals as it should, it hears none: it inherits the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, KEEPER_HEARS)
    try:
        keeper = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @atexit.register
    def end() -> None:
        keeper.kill()
        keeper.wait()


# --- the keeper ---------------------------------------------------------------------------------


def is_xtuner(process: int) -> bool:
    """Return whether a process is the ``xtuner`` command."""
    with suppress(OSError):
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return any(os.path.basename(part) == b"xtuner" for part in command[:2])
    return False


def parent_of(process: int) -> int | None:
    """Return the parent of a process; ``None`` if the process is not there."""
    with suppress(OSError):
        # The name, in brackets, may itself hold brackets and blanks.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return None


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


def watch(work_dir: Path, trainer: int, launcher: int) -> None:
    """Stay until the trainer, this process's parent and the launcher's child, has gone.

    One that has not begun when ``xtuner`` goes is interrupted.
    """

    def spare_the_trainer(*_: object) -> None:
        """End ``xtuner`` before it kills the trainer, which is to write its checkpoint first."""
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
    watch(Path(sys.argv[1]), watched, parent_of(watched) or 0)
