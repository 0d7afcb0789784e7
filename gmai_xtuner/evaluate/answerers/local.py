"""Batched answers of a model in this process."""

from __future__ import annotations

import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from gmai_xtuner.core.errors import EvaluationError, ImageError
from gmai_xtuner.evaluate.answerers.answerer import Given, Job, batches_of, open_picture

log = logging.getLogger(__name__)
_READERS = 4
_FIRST_FAILED = 8
Pictures = list[Image.Image]


class LocalAnswerer(ABC):
    """Asks in batches of jobs of like length; reads the next batch's pictures meanwhile.

    Args:
        name, model, generation: see :class:`~gmai_xtuner.evaluate.answerers.answerer.Answerer`.
        batch_size: jobs asked together; halved for good where a batch does not fit into the GPU.
    """

    def __init__(
        self, *, name: str, model: str, generation: Mapping[str, Any], batch_size: int
    ) -> None:
        self.name = name
        self.model = model
        self.generation = generation
        self.batch_size = batch_size
        self._asked = self._failed = 0

    @abstractmethod
    def generate(
        self, prompts: Sequence[str], pictures: Sequence[Pictures], max_new_tokens: int
    ) -> list[str]:
        """Greedy answers to prompts with equally many pictures."""

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        mine = batches_of(jobs, self.batch_size)[rank::world_size]
        with ThreadPoolExecutor(_READERS, "pictures") as readers:
            coming = [self._read(readers, batch) for batch in mine[:1]]
            for batch, later in itertools.zip_longest(mine, mine[1:]):
                pictures = coming.pop()
                if later is not None:
                    coming.append(self._read(readers, later))
                yield self._answer(batch, pictures)

    def _read(
        self, readers: ThreadPoolExecutor, batch: Sequence[Job]
    ) -> list[Future[Pictures | ImageError]]:
        return [readers.submit(_pictures, job) for job in batch]

    def _answer(
        self, batch: Sequence[Job], futures: Sequence[Future[Pictures | ImageError]]
    ) -> list[Given]:
        start = time.monotonic()
        given: list[Given] = []
        ready: list[tuple[Job, Pictures]] = []
        for job, future in zip(batch, futures, strict=True):
            pictures = future.result()
            if isinstance(pictures, ImageError):
                given.append(Given(job, None, 0.0, pictures.reason, str(pictures)))
            else:
                ready.append((job, pictures))
        texts = self._texts(ready)
        self._check(texts)
        share = round((time.monotonic() - start) / max(1, len(ready)), 4)
        return given + [
            Given(job, None, 0.0, "cannot_be_asked", str(text))
            if isinstance(text, ValueError)
            else Given(job, text, share)
            for (job, _), text in zip(ready, texts, strict=True)
        ]

    def _check(self, texts: Sequence[str | ValueError]) -> None:
        """Where no question at all can be asked, it is not the questions that are wrong."""
        errors = [text for text in texts if isinstance(text, ValueError)]
        self._asked += len(texts) - len(errors)
        self._failed += len(errors)
        if errors and not self._asked and self._failed >= _FIRST_FAILED:
            raise EvaluationError(
                f"{self.name} could be asked none of the first {self._failed} questions: {errors[-1]}"
            ) from errors[-1]

    def _texts(self, ready: Sequence[tuple[Job, Pictures]]) -> Sequence[str | ValueError]:
        """Answers; where one question can't be asked, e.g. since it is too long, the others still are."""
        if not ready:
            return []
        try:
            return self._generate(ready)
        except ValueError as error:
            if len(ready) == 1:
                return [error]
            return [text for one in ready for text in self._texts([one])]

    def _generate(self, ready: Sequence[tuple[Job, Pictures]]) -> list[str]:
        texts: list[str] = []
        position = 0
        while position < len(ready):
            part = ready[position : position + self.batch_size]
            try:
                texts += self.generate(
                    [job.prompt for job, _ in part],
                    [pictures for _, pictures in part],
                    part[0][0].max_new_tokens,
                )
            except torch.cuda.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.batch_size = len(part) // 2
                torch.cuda.empty_cache()
                log.warning(
                    "%d questions at once do not fit into the GPU's memory: %d from here on",
                    len(part),
                    self.batch_size,
                )
                continue
            position += len(part)
        return texts


def _pictures(job: Job) -> Pictures | ImageError:
    try:
        return [
            open_picture(source, f"image {number} of question {job.id}")
            for number, source in enumerate(job.images, 1)
        ]
    except ImageError as error:
        return error
