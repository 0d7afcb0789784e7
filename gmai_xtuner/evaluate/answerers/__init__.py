# SPDX-License-Identifier: Apache-2.0

"""Who answers, in how many processes, and the hash by which a model is known.

An export of ours, any image-text model of transformers, any OpenAI-compatible endpoint, or stored answers.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.core.files import locked, replace_text
from gmai_xtuner.core.strict_json import STRICT_JSON
from gmai_xtuner.evaluate.store import Given, Job

CACHE_FILE = "model_hash.json"
_NOT_THE_MODEL = {".md", ".txt~", ".lock", ".png", ".jpg", ".gitattributes", ".gitignore"}
_WAIT = datetime.timedelta(days=7)
"""How long a process waits for the slowest."""


class Answerer(Protocol):
    """Something that answers.

    Attributes:
        model: its hash.
        generation: what decides an answer besides prompt and ``max_new_tokens``.
        repeats: the same question has the same answer always: what was cut need not be asked again.
    """

    name: str
    model: str
    generation: Mapping[str, Any]
    repeats: bool

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        """Yield answers as they come, in any order, each once; of this process's share of the jobs.

        An ``EvaluationError`` if it can't go on; what was yielded before stands.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it runs: the options of the same names, which the command's ``--help`` explains.

    With ``answers`` the ``model`` is a name alone; a ``temperature`` of None isn't sent: not all take it.
    ``logprobs`` asks the server how likely the first tokens were, where an answer has labels.
    """

    model: str
    name: str | None = None
    loader: Literal["auto", "ours", "transformers"] = "auto"
    llm: str | None = None
    vision: str | None = None
    dtype: str | None = None
    device: str | None = None
    batch_size: int = 16
    endpoint: str | None = None
    api_key_env: str | None = None
    moved_from: str | None = None
    in_flight: int = 16
    retries: int = 6
    timeout: float = 300.0
    temperature: float | None = 0.0
    answers: tuple[str, ...] = ()
    answer_columns: tuple[str, str] | None = None
    logprobs: bool = False

    @property
    def shown(self) -> str:
        """The name in tables."""
        return self.name or Path(self.model.rstrip("/")).name or self.model


def make_answerer(options: ModelOptions, *, cache: Path, local_rank: int = 0) -> Answerer:
    """Load the model, or get ready to ask the endpoint; a ``GMAIError`` says why it can't be.

    Hashes of weights are remembered in the folder ``cache``; ``local_rank`` is this process's GPU.
    """
    if options.answers:
        from gmai_xtuner.evaluate.answerers.stored import StoredAnswers

        return StoredAnswers(options)
    if options.endpoint is not None:
        from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer

        return EndpointAnswerer(options)
    import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
    from gmai_xtuner.evaluate.answerers.local import load_local

    return load_local(options, cache=cache, local_rank=local_rank)


# Processes


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that torchrun, accelerate, Slurm or a training has started."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        self.gather(None)

    def from_first(self, value: Any) -> Any:
        """Return the first process's value, in all of them."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in every process."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def world() -> Iterator[World]:
    """Join the other processes, if the environment says that there are any.

    They talk through gloo, also on GPUs: only lists of questions and counts are exchanged.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_WAIT)
    try:
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        yield World(rank, local_rank, size)
    finally:
        distributed.destroy_process_group()


# Hashes


def hash_files(folders: Mapping[str, Path], *, cache: Path | None = None) -> str:
    """Return ``sha256:...`` over every file of the folders (part -> folder or file) a model is loaded from.

    Names and contents count, dates and places do not: a copy has the same hash. Images, notes and hidden
    files are left out. With a ``cache`` folder a file whose size and modification time are those of an
    earlier run is not read again. An ``EvaluationError`` if a part has no file.
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
    files = (file for file in sorted(folder.rglob("[!.]*")) if file.is_file())
    inside = ((file, file.relative_to(folder).as_posix()) for file in files)
    return [
        file
        for file, name in inside
        if file.suffix.lower() not in _NOT_THE_MODEL and "/." not in f"/{name}"
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
        found = STRICT_JSON.decode(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it only saves reading the files again
    return found if isinstance(found, dict) else {}
