# SPDX-License-Identifier: Apache-2.0

"""Fingerprints of units, which tell whether their files are what they were when they were read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from data_tools.records import Unit

_LONGEST_NAME = 4096


def unit_fingerprint(root: Path, unit: Unit, files: Iterable[str] = ()) -> bytes:
    """Return 16 bytes that change if the unit's payload, a file that it names or one of ``files`` changes.

    A file counts as named if a text or path anywhere in key or payload is its path, absolute or below the
    root. Its size and time of change are looked at, not its bytes; a folder's are those of its entries.

    Raises:
        TypeError: the payload holds something else than plain values.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, root, unit.key)
    _add(digest, root, unit.payload)
    for name in files:
        _add(digest, root, name)
    return digest.digest()


def _add(digest: Any, root: Path, value: Any) -> None:
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(value, os.PathLike):  # a set that was moved as a whole is the same set
            text = os.path.relpath(text, root) if os.path.isabs(text) else text
        digest.update(f"s{text!r}".encode("utf-8", "surrogatepass"))
        if 0 < len(text) < _LONGEST_NAME and "\0" not in text and "\n" not in text:
            _add_file(digest, os.path.join(root, text))
    elif value is None or isinstance(value, bool | int | float | np.generic):
        digest.update(f"v{value!r}".encode())
    elif isinstance(value, bytes):
        digest.update(b"b" + value)
    elif isinstance(value, np.ndarray):
        digest.update(
            f"a{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
        )
    elif isinstance(value, Mapping):
        digest.update(f"m{len(value)}".encode())
        for key, item in value.items():
            _add(digest, root, key)
            _add(digest, root, item)
    elif isinstance(value, list | tuple):
        digest.update(f"l{len(value)}".encode())
        for item in value:
            _add(digest, root, item)
    elif isinstance(value, set | frozenset):
        _add(digest, root, sorted(value))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _add(digest, root, field.name)
            _add(digest, root, getattr(value, field.name))
    elif isinstance(value, BaseModel):
        _add(digest, root, value.model_dump())
    else:
        raise TypeError(f"a unit's payload holds a {type(value).__name__}; expected plain values")


def _add_file(digest: Any, path: str) -> None:
    try:
        state = os.stat(path)
        digest.update(f"f{state.st_size},{state.st_mtime_ns}".encode())
        if os.path.isdir(path):
            entries = sorted((entry.name, entry.stat()) for entry in os.scandir(path))
            for name, state in entries:
                line = f"e{name}\0{state.st_size},{state.st_mtime_ns}"
                digest.update(line.encode("utf-8", "surrogatepass"))
    except (OSError, ValueError):
        digest.update(b"-")
