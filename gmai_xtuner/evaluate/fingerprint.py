"""Which model gave an answer: a hash over its weights, configuration and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from gmai_xtuner.core.errors import EvaluationError

CACHE_FILE = "model_hash.json"
_NOT_THE_MODEL = {".md", ".txt~", ".lock", ".png", ".jpg", ".gitattributes", ".gitignore"}


def hash_files(folders: Mapping[str, Path], *, cache: Path | None = None) -> str:
    """``sha256:...`` over every file of the folders a model is loaded from.

    Names and contents count, dates and places do not: a copy has the same hash. Pictures, notes and hidden
    files are left out. A file whose size and modification time are those of an earlier run is not read again.

    Args:
        folders: part -> folder or file, e.g. ``{"model": Path("my_model")}``.
        cache: folder in which hashes of files are remembered; None: every file is read.

    Raises:
        EvaluationError: no file there.
    """
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    # Of several processes one reads the weights, the others its hashes.
    with nullcontext() if cache is None else FileLock(cache / f".{CACHE_FILE}.lock"):
        return _hash_files(folders, cache)


def _hash_files(folders: Mapping[str, Path], cache: Path | None) -> str:
    known = _read_cache(cache)
    total = hashlib.sha256()
    for part, folder in sorted(folders.items()):
        files = list(_files(folder))
        if not files:
            raise EvaluationError(f"no model files in {str(folder)!r}: nothing to hash")
        for file in files:
            name = file.relative_to(folder).as_posix() if folder.is_dir() else file.name
            total.update(f"{part}/{name}\0{_hash(file, known)}\n".encode())
    if cache is not None:
        _write_cache(cache, known)
    return f"sha256:{total.hexdigest()}"


def hash_text(value: Any) -> str:
    """``sha256:...`` of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _files(folder: Path) -> Iterable[Path]:
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
    state = os.stat(file)
    stamp = [state.st_size, state.st_mtime_ns]
    remembered = known.get(str(file.resolve()))
    if remembered and remembered["stamp"] == stamp:
        return str(remembered["sha256"])
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 24):
            digest.update(block)
    known[str(file.resolve())] = {"stamp": stamp, "sha256": digest.hexdigest()}
    return digest.hexdigest()


def _read_cache(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    try:
        found = json.loads((folder / CACHE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it only saves reading the files again
    return found if isinstance(found, dict) else {}


def _write_cache(folder: Path, known: dict[str, Any]) -> None:
    from gmai_xtuner.core.files import replace_text

    replace_text(folder / CACHE_FILE, json.dumps(known, indent=1) + "\n")
