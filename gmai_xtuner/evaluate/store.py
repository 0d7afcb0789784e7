# SPDX-License-Identifier: Apache-2.0

"""Answers on disk: appended as they come, each with everything that it depends on, read again after a stop.

```
STORE/run.json          whose answers these are; another model or other settings are refused
STORE/answers-0.jsonl   one line an answer, of process 0, 1, ...
```
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.core.strict_json import STRICT_JSON
from gmai_xtuner.evaluate.questions import ImageSource

log = logging.getLogger(__name__)
RUN_FILE = "run.json"
FORMAT = 1

AnswerKey = tuple[str, str]
_NO_ANSWER = {
    "length": "cut", "max_tokens": "cut", "content_filter": "declined", "refusal": "declined",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One question that is to be asked.

    Without ``<image>`` marks in the prompt the images come first. ``protocol`` is its ``name/version``;
    ``labels`` are how an answer may begin, e.g. the options' letters: their probabilities are of interest.
    The names of its ``benchmark`` decide whether an endpoint may be asked.
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...]
    max_new_tokens: int
    protocol: str
    labels: tuple[str, ...] = ()
    benchmark: str = ""

    @property
    def key(self) -> AnswerKey:
        """What its answer is looked up by: the same words asked by another protocol need no new answer."""
        return _key(self.id, self.prompt, self.max_new_tokens)


def split_at_images(prompt: str, number: int) -> list[str | None]:
    """Split a prompt into texts and, as None, images in their order; a ``ValueError`` if marks don't fit."""
    marks = prompt.count(IMAGE_TOKEN)
    if not marks:
        return [*[None] * number, prompt]
    if marks != number:
        raise ValueError(f"{marks} {IMAGE_TOKEN} marks in the prompt, but {number} images")
    first, *others = prompt.split(IMAGE_TOKEN)
    parts = [first, *(part for text in others for part in (None, text))]
    return [part and part.strip("\n") for part in parts if part is None or part.strip()]


def sorted_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Sort the longest first: jobs of one batch are alike, and what doesn't fit into memory shows at once."""
    return sorted(jobs, key=lambda job: (-len(job.images), -len(job.prompt), job.id))


@dataclass(frozen=True, slots=True)
class Given:
    """What became of a job.

    ``text`` is the answer in full; None if there is none: ``problem`` is a short stable key then, e.g.
    ``"damaged_image"``, ``detail`` what went wrong. ``seconds`` are its share of its batch, or of its
    request; ``ended`` is the server's ``finish_reason``, ``length`` where the answer was cut.
    ``probabilities``: label -> its share of the labels' probability as the answer's first token; None where
    the answer does not begin with a label.
    """

    job: Job
    text: str | None
    seconds: float = 0.0
    problem: str = ""
    detail: str = ""
    ended: str = "stop"
    probabilities: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What all answers of a store have in common.

    ``model`` is its hash, ``model_name`` how it was given; ``generation`` what decides an answer besides the
    prompt, e.g. the precision; ``source`` the sha256 of each annotation file by name.
    """

    benchmark: str
    variant: str
    model: str
    model_name: str
    generation: Mapping[str, Any]
    source: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it was given, and as it is stored; see :class:`Job` and :class:`Given`.

    ``model`` is its hash; ``generation`` are the settings, with ``max_new_tokens``.
    """

    id: str
    prompt: str
    answer: str
    seconds: float
    model: str
    protocol: str
    generation: Mapping[str, Any]
    ended: str = "stop"
    probabilities: Mapping[str, float] | None = None

    @property
    def problem(self) -> str:
        """Why it is no answer: ``cut``, ``declined`` or ``empty``; empty where it is one."""
        return _NO_ANSWER.get(self.ended, "") or ("" if self.answer.strip() else "empty")

    @classmethod
    def of(cls, given: Given, *, model: str, generation: Mapping[str, Any]) -> Answer:
        """Record the answer that a model gave to a job."""
        job, ended = given.job, given.problem or given.ended
        said = (job.id, job.prompt, given.text or "", given.seconds, model, job.protocol)
        generation = {**generation, "max_new_tokens": job.max_new_tokens}
        return cls(*said, generation, ended, given.probabilities)

    @property
    def key(self) -> AnswerKey:
        return _key(self.id, self.prompt, int(self.generation["max_new_tokens"]))


def _key(question: str, prompt: str, max_new_tokens: int) -> AnswerKey:
    return question, hashlib.sha256(f"{max_new_tokens}\0{prompt}".encode()).hexdigest()[:16]


class AnswerStore:
    """Stored answers of one model to one benchmark, in a folder that is made where it does not exist.

    An ``EvaluationError`` if the folder holds answers of another model, benchmark or other settings, or a
    line in it is damaged; says what differs.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self.identity = folder, identity
        if (stored := read_identity(folder)) is not None:
            _check_same(folder, stored, identity)

    def create(self) -> None:
        """Write down whose answers these are; before the first of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if read_identity(self.folder) is None:
            content = {"format": FORMAT, **asdict(self.identity)}
            text = json.dumps(content, indent=1, ensure_ascii=False)
            replace_text(self.folder / RUN_FILE, f"{text}\n")

    def read(self) -> dict[AnswerKey, Answer]:
        """Return every whole answer by its key."""
        found: dict[AnswerKey, Answer] = {}
        decoder = msgspec.json.Decoder(Answer)
        unreadable = (ValueError, TypeError, LookupError, OverflowError, msgspec.MsgspecError)
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            whole, _, _ = file.read_bytes().rpartition(b"\n")
            for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
                try:
                    answer = decoder.decode(line)
                    key = answer.key
                except unreadable as error:
                    raise EvaluationError(
                        f"{file}, line {number} is not an answer ({error}). Remove the line, and the same "
                        "command asks that question again"
                    ) from error
                if answer.model != self.identity.model:
                    raise EvaluationError(
                        f"{file}, line {number} is of the model {answer.model}, the store of "
                        f"{self.identity.model}. Answers of several models were put together"
                    )
                if key not in found or not answer.problem:
                    found[key] = answer
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run from writing here; an EvaluationError where another does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock").acquire(timeout=1):
                yield
        except Timeout as error:
            raise EvaluationError(
                f"another evaluation writes to {self.folder}. Wait for it, or give another --out"
            ) from error

    @contextmanager
    def writer(self, rank: int = 0) -> Iterator[Callable[[Sequence[Answer]], None]]:
        """Give a function that appends to this process's file; what it has returned from is on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"answers-{rank}.jsonl"
        _cut_torn_line(path)
        with path.open("ab", buffering=0) as file:

            def add(answers: Sequence[Answer]) -> None:
                lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answers)
                try:
                    data = "".join(lines).encode()
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError as error:
                    raise EvaluationError(
                        f"{path} can't be written ({error.strerror}). Make room, and the same command goes on"
                    ) from error

            yield add


def read_identity(folder: Path) -> Identity | None:
    """Return whose answers a folder holds; None where there are none, an error where it can't be read."""
    file = folder / RUN_FILE
    if not file.exists():
        if any(folder.glob("answers-*.jsonl")):
            raise EvaluationError(
                f"{folder} has answers but no {RUN_FILE}: whose they are is not known. Give another --out"
            )
        return None
    try:
        content = STRICT_JSON.decode(file.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version != FORMAT:
            raise ValueError(f"its format is {version}, this version reads {FORMAT}")
        return msgspec.convert(content, Identity)
    except (OSError, ValueError, KeyError, AttributeError, msgspec.MsgspecError) as error:
        raise EvaluationError(
            f"{file} can't be read: {error}. Give another --out, or remove {folder}"
        ) from error


def _cut_torn_line(file: Path) -> None:
    """Cut off what follows the last line's end: the part of a line that a killed process has written."""
    content = file.read_bytes() if file.exists() else b""
    whole = content.rfind(b"\n") + 1
    if torn := len(content) - whole:
        log.warning("%s: %d bytes of an answer cut off by a stop are left out", file, torn)
        os.truncate(file, whole)


def _check_same(folder: Path, stored: Identity, now: Identity) -> None:
    before, after = asdict(stored), asdict(now)
    if stored.model == now.model:
        after["model_name"] = before["model_name"]  # the same weights at another place
    different = [
        f"{name}: {_short(before[name])} there, {_short(after[name])} now"
        for name in before
        if before[name] != after[name]
    ]
    if different:
        raise EvaluationError(
            f"{folder} holds answers of another run ({'; '.join(different)}). Give another --out, or the "
            "model, files and settings of those answers"
        )


def _short(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, sort_keys=True), 160, placeholder="...")
