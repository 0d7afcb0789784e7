# SPDX-License-Identifier: Apache-2.0

"""The answer to a request, piece by piece, from the model's inference queue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from gmai_xtuner.generate import AnswerStream, Predictor, Prompt, PromptTooLong, Sampling
from gmai_xtuner.inference_queue import InferenceQueue, QueueFull
from gmai_xtuner.serve.protocol import ApiError, busy


class Job(NamedTuple):
    """What is asked of the model."""

    prompt: Prompt
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()


class End(NamedTuple):
    """How an answer ended: ``"stop"``, or ``"length"`` at its greatest length."""

    finish_reason: str
    prompt_tokens: int
    new_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """As the API has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }


class Answers:
    """Compute the answers of one model; more than ``max_waiting`` requests are turned away."""

    def __init__(self, predictor: Predictor, *, max_waiting: int) -> None:
        self.predictor = predictor
        self.queue = InferenceQueue(max_waiting=max_waiting)

    def check_room(self) -> None:
        """Refuse when too many requests wait: ``ApiError`` 503, with ``Retry-After``."""
        if self.queue.is_full:
            raise self._full()

    def _full(self) -> ApiError:
        return busy(f"{self.queue.length} requests are computed or wait, this server's limit")

    def check_length(self, prompt: Prompt) -> None:
        """Refuse a prompt that leaves the model no position to answer at: ``ApiError`` 400."""
        try:
            length, limit = self.predictor.num_tokens(prompt), self.predictor.context_length
            if length >= limit:
                raise PromptTooLong(length, limit)
        except PromptTooLong as error:
            raise ApiError(str(error), code="context_length_exceeded", param="messages") from error

    async def events(self, job: Job) -> AsyncIterator[str | End]:
        """Yield the answer as it comes, and how it ended.

        Closing the iterator takes a waiting job out, and stops the model after the token that it is at.

        Raises:
            ApiError: the model failed, or too many requests wait.
        """
        stops, streams = StopTexts(job.stops), list[AnswerStream]()

        def start() -> Iterator[str]:
            turns, images = job.prompt.turns, job.prompt.images
            options = {"max_new_tokens": job.max_new_tokens, "sampling": job.sampling}
            streams.append(self.predictor.stream(turns, images, **options))  # type: ignore[arg-type]
            return streams[0]

        try:
            async with (
                self.queue.turn(),
                aclosing(self.queue.pieces(start)) as pieces,  # type: ignore[type-var]
            ):
                async for piece in pieces:
                    if text := stops.add(piece):
                        yield text
                    if stops.found:
                        break
        except QueueFull as error:
            raise self._full() from error
        except Exception as error:
            raise ApiError(f"the model failed: {error}", status=500, code="model_failed") from error
        if text := stops.rest():
            yield text
        reason = "length" if streams[0].is_cut and not stops.found else "stop"
        yield End(reason, streams[0].prompt_tokens, streams[0].new_tokens)


class StopTexts:
    """Hand text on up to the first of the stop texts (none empty), and hold back what may become one."""

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
        # The longest end of the text with which a stop text begins.
        begun = (n for s in self.texts for n in range(1, len(s)) if text.endswith(s[:n]))
        kept = max(begun, default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """Return what was held back, when no more comes."""
        text, self._held = self._held, ""
        return text
