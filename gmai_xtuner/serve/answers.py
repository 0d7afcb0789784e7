# SPDX-License-Identifier: Apache-2.0

"""The answer to a request, piece by piece, from the model's inference queue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from gmai_xtuner.generate import AnswerStream, Predictor, Prompt, PromptTooLong, Sampling
from gmai_xtuner.inference_queue import InferenceQueue, QueueFull
from gmai_xtuner.serve.errors import ApiError


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


class Answers:
    """Compute the answers of one model.

    Args:
        predictor: the model.
        max_waiting: requests that may wait for the one that is computed; more are turned away.
    """

    def __init__(self, predictor: Predictor, *, max_waiting: int) -> None:
        self.predictor = predictor
        self._queue = InferenceQueue(max_waiting=max_waiting)

    def check_room(self) -> None:
        """Refuse when too many requests wait.

        Raises:
            ApiError: 503, with ``Retry-After``.
        """
        if self._queue.is_full:
            raise self._busy()

    def _busy(self) -> ApiError:
        return ApiError(
            f"{self._queue.length} requests are computed or wait, this server's limit; come again later",
            status=503,
            code="server_busy",
            retry_after=10,
        )

    def check_length(self, prompt: Prompt) -> None:
        """Refuse a prompt that leaves the model no position to answer at.

        Raises:
            ApiError: 400.
        """
        try:
            length, limit = self.predictor.num_tokens(prompt), self.predictor.context_length
            if length >= limit:
                raise PromptTooLong(length, limit)
        except PromptTooLong as error:
            raise ApiError(str(error), code="context_length_exceeded", param="messages") from error

    async def events(self, job: Job) -> AsyncIterator[Piece | End]:
        """Yield the answer as it comes, and how it ended.

        Closing the iterator takes a waiting job out, and stops the model after the token that it is at.

        Raises:
            ApiError: the model failed, or too many requests wait.
        """
        stops, streams = StopTexts(job.stops), list[AnswerStream]()

        def start() -> Iterator[str]:
            stream = self.predictor.stream(
                job.prompt.turns,
                job.prompt.images,
                max_new_tokens=job.max_new_tokens,
                sampling=job.sampling,
            )
            streams.append(stream)
            return stream

        try:
            async with (
                self._queue.turn(),
                aclosing(self._queue.pieces(start)) as pieces,  # type: ignore[type-var]
            ):
                async for piece in pieces:
                    if text := stops.add(piece):
                        yield Piece(text)
                    if stops.found:
                        break
        except QueueFull as error:
            raise self._busy() from error
        except Exception as error:
            raise ApiError(f"the model failed: {error}", status=500, code="model_failed") from error
        if not stops.found and (text := stops.rest()):
            yield Piece(text)
        (stream,) = streams
        reason = "length" if stream.is_cut and not stops.found else "stop"
        yield End(reason, stream.prompt_tokens, stream.new_tokens)

    def close(self) -> None:
        """Start nothing more."""
        self._queue.close()


class StopTexts:
    """Hand text on up to the first stop text, and hold back what may become one.

    Args:
        texts: none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.found = False
        self._held = ""

    def add(self, piece: str) -> str:
        """Return what can be handed on now; nothing after a stop text."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self.texts), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """Return what was held back, when no more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
