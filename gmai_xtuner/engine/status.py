"""How a run ended, for the script that started it: ``xtuner`` itself exits with 0 whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process

from gmai_xtuner.engine.checkpointing import replace_text

STATUS_FILE = "status.json"


def write_status(work_dir: Path, state: str, *, iteration: int, of: int, reason: str = "") -> None:
    """Replace ``status.json`` of a work dir; rank 0 does it.

    Args:
        work_dir: of the run.
        state: ``running`` (also after a ``kill -9``), ``stopped`` (on request, with a checkpoint),
            ``finished`` or ``failed``.
        iteration: micro-batches trained.
        of: micro-batches of the whole run.
        reason: why it failed.
    """
    if is_main_process():
        status = {"state": state, "iteration": iteration, "of": of, "reason": reason}
        replace_text(work_dir / STATUS_FILE, json.dumps(status, ensure_ascii=False) + "\n")


@contextmanager
def told(loop: Any) -> Iterator[None]:
    """Keep ``status.json`` true while a training loop runs.

    Args:
        loop: with ``runner``, ``iter`` and ``max_iters``.
    """
    work_dir = Path(loop.runner.work_dir)

    def tell(state: str, reason: str = "") -> None:
        write_status(work_dir, state, iteration=loop.iter, of=loop.max_iters, reason=reason)

    tell("running")
    try:
        yield
    except BaseException as error:
        tell("failed", f"{type(error).__name__}: {error}")
        raise
    tell("finished" if loop.iter >= loop.max_iters else "stopped")
