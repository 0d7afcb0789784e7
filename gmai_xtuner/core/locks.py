"""One process builds, the others wait and say so."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from mmengine.logging import print_log

MINUTES_BETWEEN_NOTES = 1.0


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the file lock ``path``; while another process has it, say each minute what is waited for."""
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=60 * MINUTES_BETWEEN_NOTES)
            break
        except Timeout:
            print_log(
                f"Waiting for another process to {what}", logger="current", level=logging.INFO
            )
    try:
        yield
    finally:
        lock.release()


def aside(path: Path) -> Path:
    """A name beside ``path`` that no other process on any machine uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def remove_left_behind(path: Path) -> None:
    """Remove what killed processes of this machine left under :func:`aside` names of ``path``."""
    for left in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.partial"):
        process = int(left.suffixes[-2].removeprefix("."))
        if not Path("/proc", str(process)).exists():
            shutil.rmtree(left, ignore_errors=True)


def publish(made: Path, target: Path) -> None:
    """Rename a finished folder into its place.

    On a file system whose locks do not reach other machines a second process may have built the same
    content meanwhile; whole is whole, the first one stays.
    """
    try:
        os.replace(made, target)
    except OSError:
        if not (target / "meta.json").is_file():
            raise
        shutil.rmtree(made, ignore_errors=True)
