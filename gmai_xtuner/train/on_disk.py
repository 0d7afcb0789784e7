# SPDX-License-Identifier: Apache-2.0

"""Writing, renaming and deleting that survives a kill, and whose errors all ranks learn of."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import all_gather_object

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.files import directory_to_disk
from gmai_xtuner.data.log import warn

WRITING = ".writing"
REMOVING = ".removing"
PROBE = ".shared-"
"""Beginning of the name by which ranks find out whether they share a work dir."""

TORCH_WRITE_ERRORS = r"inline_container\.cc|iostream error|Parent directory .* does not exist"
"""torch.save on a full disk, or without its folder, raises a RuntimeError with one of these, seen with torch
2.11."""


def is_write_error(error: Exception) -> bool:
    """Return whether an error is the file system's, raised by Python or by torch."""
    return isinstance(error, OSError) or (
        isinstance(error, RuntimeError) and bool(re.search(TORCH_WRITE_ERRORS, str(error)))
    )


@contextmanager
def raised_on_all_ranks(explain: Callable[[str], str]) -> Iterator[None]:
    """Let every rank raise at the end of the block if one can't write in it. To be entered by all ranks.

    A rank that raises alone would leave the others in their next collective until that times out. In the
    block no rank may wait for another. ``explain`` makes the message out of ``"rank 3: [Errno 28] ..."``.

    Raises:
        GMAIError: a rank had a ``GMAIError`` or one that :func:`is_write_error` knows; any other is raised
            as it is, at once.
    """
    mine: Exception | None = None
    try:
        yield
    except (OSError, RuntimeError, GMAIError) as error:
        if not (is_write_error(error) or isinstance(error, GMAIError)):
            raise
        mine = error
    texts = all_gather_object(None if mine is None else str(mine))
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if problems:
        others = f" (and {len(problems) - 1} more ranks)" if problems[1:] else ""
        raise GMAIError(explain(problems[0] + others)) from mine


def put_in_place(staging: Path, final: Path) -> None:
    """Give ``staging`` its name; what had that name goes, but only when ``staging`` has it.

    Raises:
        OSError: if the file system refuses; both are where they were.
    """
    old = _move_away(final)
    try:
        staging.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
    directory_to_disk(final.parent)
    if old is not None:
        _delete_or_warn(old)


def remove(path: Path) -> bool:
    """Remove a checkpoint, half of which is never taken for one; return whether nothing of that name is left.

    What the file system does not let go is warned of and stays, as ``*.removing`` if it can be renamed.
    """
    if path.name.endswith(REMOVING):
        return _delete_or_warn(path)
    try:
        going = _move_away(path)
    except OSError as error:
        _warn_of(path, error)
        return False
    if going is not None:
        _delete_or_warn(going)
    return True


def _move_away(path: Path) -> Path | None:
    """Rename to a free ``*.removing``; ``None`` if nothing is there."""
    for number in itertools.count():
        going = path.with_name(f"{path.name}{f'.{number}' if number else ''}{REMOVING}")
        if not os.path.lexists(going):
            break
    try:
        path.rename(going)
    except FileNotFoundError:
        return None
    return going


def _delete_or_warn(path: Path) -> bool:
    try:
        _delete(path)
    except OSError as error:
        _warn_of(path, error)
        return False
    return True


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)  # it stopped at the first; what else can go goes
        if path.exists():
            raise


def _warn_of(path: Path, error: OSError) -> None:
    warn(f"{path} is no longer needed and can't be removed: {error}. The next start tries again")
