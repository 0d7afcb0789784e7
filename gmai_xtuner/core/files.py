# SPDX-License-Identifier: Apache-2.0

"""Files and folders that are whole or not there, whenever a process is killed; locks between processes."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import socket
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock, Timeout

MINUTES_BETWEEN_NOTES = 1.0

_LONG_NAME = 150
"""Bytes; most file systems allow 255, of which the machine's name may take 64."""

NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Answers of some network file systems (FUSE, CIFS) to fsync of a directory; they have no such thing."""

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the file lock ``path``; while another process has it, say each minute what is waited for.

    ``what`` is the other process's work: ``"tokenise train.jsonl"``.
    """
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=60 * MINUTES_BETWEEN_NOTES)
            break
        except Timeout:
            log.info("Waiting for another process to %s", what)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a path beside ``target`` to write a file or folder to; it becomes ``target`` at the block's end.

    A file that is there is replaced; so is an empty folder. If the block or the renaming fails, nothing is
    left of it. ``durable`` waits until everything is on disk, so that a power cut undoes nothing, and removes
    what killed processes have left of earlier attempts; False serves many small files that can be made anew.
    """
    if durable:
        remove_left_behind(target)
    partial = staging(target)
    try:
        yield partial
        if durable:
            to_disk(partial)
        os.replace(partial, target)
    except BaseException:
        delete(partial)
        raise
    if durable:
        directory_to_disk(target.parent)


def replace_text(
    file: Path, text: str | bytes | bytearray, *, durable: bool = True, mode: int = 0o666
) -> None:
    """Write a file, UTF-8, so that a reader sees the old or the new one, never a part.

    ``durable`` as of :func:`staged`; ``mode``: permissions, less those that the process's umask takes.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with staged(file, durable=durable) as partial, open(os.open(partial, flags, mode), "wb") as out:
        out.write(data)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal; those of the files asked for last are kept.

    A file whose size and time of change are the same is not read again.
    """
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def staging(path: Path) -> Path:
    """Return a name beside ``path`` that no other process on any machine uses."""
    return path.with_name(f"{_staging_start(path)}{os.getpid()}.partial")


def _staging_start(path: Path) -> str:
    """Return the name without the process; of a long name, to which nothing can be added, its hash."""
    name = path.name
    if len(os.fsencode(name)) > _LONG_NAME:
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return f".{name}.{socket.gethostname()}."


def remove_left_behind(path: Path) -> None:
    """Remove what killed processes of this machine left under :func:`staging` names of ``path``."""
    start = _staging_start(path)
    for name in os.listdir(path.parent):
        process = name.removeprefix(start).removesuffix(".partial")
        is_ours = name == f"{start}{process}.partial" and process.isdecimal()
        if is_ours and not is_running(int(process)):
            delete(path.with_name(name))


def keep_first(made: Path, target: Path) -> None:
    """Rename a finished folder into its place; the first of two processes with the same content stays.

    The locks of some file systems do not reach other machines.
    """
    try:
        os.replace(made, target)
    except OSError:
        if not (target / "meta.json").is_file():
            raise
        delete(made)


def delete(path: Path) -> None:
    """Remove a file or folder as far as the file system lets it go; errors are passed over."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def is_running(process: int) -> bool:
    """Return whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except OSError as error:  # or another user's
        return not isinstance(error, ProcessLookupError)
    return True


def to_disk(path: Path) -> None:
    """Wait until a file, or every file below a folder, is on disk."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            to_disk(entry)
        directory_to_disk(path)
        return
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def directory_to_disk(path: Path) -> None:
    """Wait until the names in a folder are on disk, where the file system knows how to."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(handle)


def similar_file(path: str) -> str | None:
    """Return the file that a misspelt path may mean: ``\\``, ``%20``, ``~``, blanks at ends, letter case."""
    if "\0" in path or os.path.exists(path):
        return None
    slashes = path.replace("\\", "/")
    home = os.path.expanduser(slashes[slashes.find("~") :]) if "/~/" in f"/{slashes}" else slashes
    found = map(_in_letter_case, dict.fromkeys((path, slashes, home, unquote(home))))
    return next((path for path in found if path is not None), None)


def _in_letter_case(path: str) -> str | None:
    """Return an existing file whose names differ in letter case, Unicode form or blanks at their ends."""
    there = "/" if os.path.isabs(path) else "."
    for part in path.split("/"):
        if part in ("", ".") or os.path.exists(os.path.join(there, part)):
            there = os.path.join(there, part)
            continue
        try:
            changed = os.stat(there).st_mtime_ns
            name = _names(there, changed).get(_plain(part))
        except OSError:
            return None
        if name is None:
            return None
        there = os.path.join(there, name)
    return os.path.normpath(there) if os.path.isfile(there) else None


@lru_cache(maxsize=16)
def _names(folder: str, _changed: int) -> dict[str, str]:
    return {_plain(name): name for name in sorted(os.listdir(folder))}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip()).casefold()
