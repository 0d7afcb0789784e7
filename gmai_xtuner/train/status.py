"""How a run ended, for the script that started it: ``xtuner`` itself exits with 0 whatever happens."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process

from gmai_xtuner.train.checkpointing import replace_text

STATUS_FILE = "status.json"


def write_status(
    work_dir: Path, state: str, *, iteration: int = 0, of: int | None = None, reason: str = ""
) -> None:
    """Replace ``status.json`` of a work dir; rank 0 does it.

    Args:
        work_dir: of the run.
        state: ``starting`` (reads data, builds the model), ``running``, ``stopped`` (on request, with a
            checkpoint), ``finished`` or ``failed``. After a ``kill -9``, or where the model could not be
            built, it still says ``running`` or ``starting``: then look whether ``process`` on ``host``
            is there.
        iteration: micro-batches trained, when this was written.
        of: micro-batches of the whole run; ``None`` while it is not known.
        reason: why it stopped or failed.
    """
    if is_main_process():
        status = {
            "state": state,
            "iteration": iteration,
            "of": of,
            "reason": reason,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        replace_text(work_dir / STATUS_FILE, json.dumps(status, ensure_ascii=False) + "\n")


@contextmanager
def log_failure(work_dir: Path) -> Iterator[None]:
    """Say ``starting`` now, and ``failed`` if what comes raises: nothing of an earlier run stays."""
    if is_main_process():
        work_dir.mkdir(parents=True, exist_ok=True)
    write_status(work_dir, "starting")
    try:
        yield
    except BaseException as error:
        write_status(work_dir, "failed", reason=f"{type(error).__name__}: {error}")
        raise


@contextmanager
def log_status(loop: Any) -> Iterator[None]:
    """Keep ``status.json`` true while a training loop runs.

    Args:
        loop: with ``runner``, ``iter``, ``max_iters`` and ``stop_reason``.
    """
    work_dir = Path(loop.runner.work_dir)

    def write(state: str, reason: str = "") -> None:
        write_status(work_dir, state, iteration=loop.iter, of=loop.max_iters, reason=reason)

    write("running")
    try:
        yield
    except BaseException as error:
        write("failed", f"{type(error).__name__}: {error}")
        raise
    if loop.iter >= loop.max_iters:
        write("finished")
    else:
        write("stopped", loop.stop_reason)
