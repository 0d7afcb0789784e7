"""All questions of a benchmark are asked, what is stored already is not; on one process or several."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.answerers import Answerer, Given, Job
from gmai_xtuner.evaluate.benchmarks import Benchmark
from gmai_xtuner.evaluate.protocols import Protocol
from gmai_xtuner.evaluate.questions import Question
from gmai_xtuner.evaluate.store import Answer, AnswerStore, Identity, key_of

log = logging.getLogger(__name__)
_WAIT = datetime.timedelta(days=7)
"""How long a process waits for the slowest."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that torchrun, accelerate or Slurm has started."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def world() -> Iterator[World]:
    """Join the other processes, if the environment says that there are any.

    They talk through gloo, also on GPUs: only lists of questions and counts are exchanged.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield World()
        return
    torch.distributed.init_process_group("gloo", timeout=_WAIT)
    try:
        yield World(rank, local_rank, size)
    finally:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Asked:
    """What a protocol asks.

    Args:
        protocol: the protocol.
        questions: those that count, in their order; cut by ``--limit``.
        selected: how many there would be without a limit.
    """

    protocol: Protocol
    questions: tuple[Question, ...]
    selected: int

    @property
    def name(self) -> str:
        return f"{self.protocol.name}/{self.protocol.version}"

    def jobs(self) -> list[Job]:
        return [
            Job(
                question.id,
                self.protocol.prompt(question),
                question.images,
                self.protocol.max_new_tokens,
                self.name,
            )
            for question in self.questions
        ]


def ask_for(benchmark: Benchmark, protocol: Protocol, *, limit: int | None = None) -> Asked:
    """What a protocol asks of a benchmark.

    Raises:
        EvaluationError: nothing.
    """
    selected = protocol.select(benchmark.questions)
    if not selected:
        raise EvaluationError(
            f"{benchmark.name} ({benchmark.variant}) has no question for the protocol {protocol.name!r}: "
            f"{len(benchmark.questions)} were read, {len(benchmark.problems)} had problems"
        )
    return Asked(protocol, selected[:limit], len(selected))


def identity_of(benchmark: Benchmark, answerer: Answerer) -> Identity:
    """Whose answers a store of this model and benchmark holds."""
    return Identity(
        benchmark=benchmark.name,
        variant=benchmark.variant,
        model=answerer.model,
        model_name=answerer.name,
        generation=dict(answerer.generation),
        source=source_of(benchmark),
    )


def source_of(benchmark: Benchmark) -> dict[str, str]:
    """sha256 of each annotation file by its name; files of one name (MMMU has them) are numbered."""
    source: dict[str, str] = {}
    for file in sorted(benchmark.source, key=lambda one: (one.path.name, one.sha256)):
        name, number = file.path.name, 1
        while name in source:
            number += 1
            name = f"{file.path.name} ({number})"
        source[name] = file.sha256
    return source


def store_folder(out: Path, name: str, variant: str) -> Path:
    return out / f"{name}-{variant}"


def answer_all(
    asked: Sequence[Asked], answerer: Answerer, store: AnswerStore, *, world: World
) -> Mapping[str, Given]:
    """Ask what has no answer yet.

    All processes take part. What a process has yielded is on disk; a stop loses the batches under way.

    Args:
        asked: protocols that share the store; a question that two of them ask in the same words is
            asked once.
        answerer: who answers.
        store: takes the answers.
        world: this process among the others.

    Returns:
        the questions that got no answer, by id, in all processes.

    Raises:
        EvaluationError: another run writes to the store, or the answerer can't go on.
    """
    # Only one process looks and locks, and all ask what it has found missing.
    with store.locked() if world.rank == 0 else nullcontext():
        if world.rank == 0:
            store.create()
        pending = world.from_first(_pending(asked, store) if world.rank == 0 else None)
        failed: dict[str, Given] = {}
        done = sum(len(part.questions) for part in asked) - len(pending)
        with (
            store.writer(world.rank) as writer,
            Progress(
                f"{store.identity.benchmark} ({store.identity.variant})",
                total=len(pending),
                stored=done,
                world=world,
            ) as progress,
        ):
            for given in answerer.answers(pending, rank=world.rank, world_size=world.size):
                writer.add([_as_answer(one, answerer) for one in given if one.text is not None])
                failed |= {one.job.id: one for one in given if one.text is None}
                progress.add(len(given), len(failed))
        everywhere: dict[str, Given] = {}
        for part in world.gather(failed):
            everywhere |= part
    return everywhere


def _pending(asked: Sequence[Asked], store: AnswerStore) -> list[Job]:
    known = set(store.read())
    pending: dict[tuple[str, str], Job] = {}
    for part in asked:
        for job in part.jobs():
            key = key_of(job.id, job.prompt, job.max_new_tokens)
            if key not in known:
                pending.setdefault(key, job)
    return list(pending.values())


def _as_answer(given: Given, answerer: Answerer) -> Answer:
    job = given.job
    return Answer(
        id=job.id,
        prompt=job.prompt,
        answer=given.text or "",
        seconds=given.seconds,
        model=answerer.model,
        protocol=job.protocol,
        generation={**answerer.generation, "max_new_tokens": job.max_new_tokens},
    )


class Progress:
    """One line on a terminal, a line now and then in a file, of the first process.

    Args:
        name: of the benchmark.
        total: questions to ask, of all processes.
        stored: answers that were there already.
        world: this process; the others are taken to be as fast.
        out: default: standard error.
    """

    def __init__(
        self, name: str, *, total: int, stored: int, world: World, out: TextIO | None = None
    ) -> None:
        self._name, self._total, self._stored, self._world = name, total, stored, world
        self._out = out or sys.stderr
        self._every = 0.5 if self._out.isatty() else 15.0
        self._start = self._told = time.monotonic()
        self._done = self._failed = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._total and self._world.rank == 0:
            self._tell(end="\n")
        elif self._world.rank == 0 and kind is None:
            self._write(f"{self._name}: all {self._stored:,} answers are stored already", "\n")

    def add(self, done: int, failed: int) -> None:
        self._done, self._failed = self._done + done, failed
        now = time.monotonic()
        if self._world.rank == 0 and now - self._told >= self._every:
            self._told = now
            self._tell(end="" if self._out.isatty() else "\n")

    def _tell(self, end: str) -> None:
        done = min(self._total, self._done * self._world.size)
        rate = done / max(1e-9, time.monotonic() - self._start)
        parts = [f"{self._name}: {done:,} of {self._total:,} asked"]
        if self._stored:
            parts.append(f"{self._stored:,} stored before")
        if self._failed:
            parts.append(f"{self._failed:,} without an answer")
        parts.append(f"{rate:.2f} a second")
        if done < self._total and rate > 0:
            parts.append(f"{duration((self._total - done) / rate)} left")
        self._write(", ".join(parts), end)

    def _write(self, text: str, end: str) -> None:
        begin = "\r\x1b[K" if self._out.isatty() else ""
        self._out.write(begin + text + end)
        self._out.flush()


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counted(failed: Mapping[str, Given]) -> dict[str, int]:
    """Reason -> number of questions without an answer."""
    return dict(Counter(given.problem for given in failed.values()).most_common())
