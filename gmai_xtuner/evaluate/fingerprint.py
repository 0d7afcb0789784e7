# SPDX-License-Identifier: Apache-2.0

"""Which model gave an answer: a hash over its weights, configuration and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.core.files import locked, replace_text

CACHE_FILE = "model_hash.json"
_NOT_THE_MODEL = {".md", ".txt~", ".lock", ".png", ".jpg", ".gitattributes", ".gitignore"}


def hash_files(folders: Mapping[str, Path], *, cache: Path | None = None) -> str:
    """Return ``sha256:...`` over every file of the folders a model is loaded from.

    Names and contents count, dates and places do not: a copy has the same hash. Images, notes and hidden
    files are left out. A file whose size and modification time are those of an earlier run is not read again.

    Args:
        folders: part -> folder or file, e.g. ``{"model": Path("my_model")}``.
        cache: folder in which hashes of files are remembered; None: every file is read.

    Raises:
        EvaluationError: no file there.
    """
    if cache is None:
        return _hash_files(folders, {})
    cache.mkdir(parents=True, exist_ok=True)
    # Of several processes one reads the weights, the others its hashes.
    with locked(cache / f".{CACHE_FILE}.lock", "hash the model"):
        known = _read_cache(cache / CACHE_FILE)
        found = _hash_files(folders, known)
        replace_text(cache / CACHE_FILE, json.dumps(known, indent=1) + "\n")
    return found


def _hash_files(folders: Mapping[str, Path], known: dict[str, Any]) -> str:
    total = hashlib.sha256()
    for part, folder in sorted(folders.items()):
        files = _files(folder)
        if not files:
            raise EvaluationError(f"no model files in {str(folder)!r}: nothing to hash")
        for file in files:
            name = file.relative_to(folder).as_posix() if folder.is_dir() else file.name
            total.update(f"{part}/{name}\0{_hash(file, known)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def hash_text(value: Any) -> str:
    """Return ``sha256:...`` of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.suffix.lower() not in _NOT_THE_MODEL
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _hash(file: Path, known: dict[str, Any]) -> str:
    name, state = str(file.resolve()), file.stat()
    size_and_time = [state.st_size, state.st_mtime_ns]
    if known.get(name, {}).get("stamp") != size_and_time:
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        known[name] = {"stamp": size_and_time, "sha256": digest}
    return str(known[name]["sha256"])


def _read_cache(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it only saves reading the files again
    return found if isinstance(found, dict) else {}
