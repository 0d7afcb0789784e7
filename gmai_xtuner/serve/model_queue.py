"""One model, many requests: they are computed one after the other, in the order in which they came."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gmai_xtuner.generate import Predictor, Prompt, PromptTooLong, Sampling
from gmai_xtuner.serve.errors import ApiError
from gmai_xtuner.serve.stops import StopTexts


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of the model."""

    prompt: Prompt
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ended: ``"stop"``, or ``"length"`` at its greatest length."""

    finish_reason: str
    prompt_tokens: int
    new_tokens: int


Event = Piece | End


class ModelQueue:
    """Hands requests to the model's one thread.

    Args:
        predictor: the model.
        max_waiting: requests that may wait for the one that is computed; more are turned away.
    """

    def __init__(self, predictor: Predictor, *, max_waiting: int) -> None:
        self.predictor = predictor
        self.max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._jobs = 0

    def check_room(self) -> None:
        """Raises:
        ApiError: too many requests wait.
        """
        if self._jobs > self.max_waiting:
            raise ApiError(
                f"{self._jobs} requests are computed or wait, this server's limit; come again later",
                status=503,
                code="server_busy",
                retry_after=10,
            )

    def check_length(self, prompt: Prompt) -> None:
        """Raises:
        ApiError: the model has no position left to answer at.
        """
        length, limit = self.predictor.num_tokens(prompt), self.predictor.context_length
        if length >= limit:
            raise ApiError(
                str(PromptTooLong(length, limit)), code="context_length_exceeded", param="messages"
            )

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """The answer as it comes.

        Closing the iterator takes a waiting job out, and stops the model after the token that it is at.

        Raises:
            ApiError: the model failed.
        """
        loop = asyncio.get_running_loop()
        coming: asyncio.Queue[Event | Exception] = asyncio.Queue()
        stop = threading.Event()

        def tell(event: Event | Exception) -> None:
            loop.call_soon_threadsafe(coming.put_nowait, event)

        self._jobs += 1
        done = loop.run_in_executor(self._thread, self._compute, job, stop, tell)
        done.add_done_callback(self._one_less)
        try:
            while True:
                event = await coming.get()
                if isinstance(event, Exception):
                    raise ApiError(
                        f"the model failed: {event}", status=500, code="model_failed"
                    ) from event
                yield event
                if isinstance(event, End):
                    return
        finally:
            stop.set()

    def _one_less(self, _: Any) -> None:
        self._jobs -= 1

    def _compute(
        self, job: Job, stop: threading.Event, tell: Callable[[Event | Exception], None]
    ) -> None:
        if stop.is_set():
            return
        try:
            stream = self.predictor.stream(
                job.prompt.turns,
                job.prompt.images,
                max_new_tokens=job.max_new_tokens,
                sampling=job.sampling,
            )
            try:
                stops = StopTexts(job.stops)
                for piece in stream:
                    if stop.is_set():
                        return
                    if text := stops.add(piece):
                        tell(Piece(text))
                    if stops.found:
                        break
                if not stops.found and (text := stops.rest()):
                    tell(Piece(text))
            finally:
                stream.close()
            reason = "length" if stream.is_cut and not stops.found else "stop"
            tell(End(reason, stream.prompt_tokens, stream.new_tokens))
        except Exception as error:
            tell(error)

    def close(self) -> None:
        """Start nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
