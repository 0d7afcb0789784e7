# SPDX-License-Identifier: Apache-2.0

"""Models that answer one question at a time, in the order in which questions came."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.demo.conversation import Exchange, Session
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.generate import AnswerStream, Predictor, Prompt, PromptTooLong
from gmai_xtuner.inference_queue import InferenceQueue, QueueFull
from gmai_xtuner.model.costs import part_cost, size

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model with the name that people see."""

    name: str
    predictor: Predictor

    @property
    def facts(self) -> str:
        """Parameters, dtype, device and the memory of its weights."""
        cost = part_cost(self.predictor.model)
        return (
            f"{counted(cost.parameters)} parameters · {'/'.join(cost.dtypes)} · {size(cost.bytes)} of weights"
            f" on {self.predictor.model.llm.device}"
        )

    def tokens(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> int:
        """Return the length of a prompt with its images; ``PageError`` if marks are not as many."""
        try:
            return self.predictor.num_tokens(Prompt(tuple(turns), tuple(images)))
        except PromptTooLong as error:
            return error.length
        except ValueError as error:
            marks = sum(turn.text.count("<image>") for turn in turns)
            raise PageError("marks", marks=marks, images=len(images)) from error


def counted(number: int) -> str:
    """``7.76 B``, ``303.5 M``, ``1.2 M``, ``914 k``."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.{2 if letter == 'B' else 1}f} {letter}"
    return str(number)


class Answering:
    """Answer exchanges with all models (one or two), one after the other; ``max_waiting`` may wait."""

    def __init__(self, models: Sequence[LoadedModel], *, max_waiting: int) -> None:
        self.models = tuple(models)
        self._queue = InferenceQueue(max_waiting=max_waiting)

    def check(self, session: Session, exchange: Exchange) -> None:
        """Raise ``PageError`` if the exchange is too long for a model, or a setting out of its range."""
        session.settings.checked()
        for number, model in enumerate(self.models):
            count = model.tokens(*session.history(number, exchange))
            limit = model.predictor.context_length
            room = limit - int(session.settings.max_new_tokens)
            if count > room:
                raise PageError("too_long", count=count, room=max(0, room), limit=limit)

    async def answer(
        self, session: Session, exchange: Exchange, changed: Callable[[int], None]
    ) -> None:
        """Fill in the answers of an exchange of the session, whose ``stop`` ends waiting and writing.

        ``changed`` is called with a model's number whenever its answer has changed.
        """

        def change_all(**values: Any) -> None:
            for number, answer in enumerate(exchange.answers):
                vars(answer).update(values)
                changed(number)

        ask = {
            "max_new_tokens": int(session.settings.max_new_tokens),
            "sampling": session.settings.checked(),
        }
        try:
            async with self._queue.turn(
                on_position=lambda ahead: change_all(ahead=ahead), give_up=session.stop
            ) as mine:
                for number, answer in enumerate(exchange.answers):
                    if not mine or session.stop.is_set():
                        answer.state = "stopped"
                    else:
                        await self._write(session, exchange, number, ask, changed)
                    changed(number)
        except QueueFull:
            change_all(state="failed", failure=PageError("busy"))

    async def _write(
        self,
        session: Session,
        exchange: Exchange,
        number: int,
        ask: Mapping[str, Any],
        changed: Callable[[int], None],
    ) -> None:
        answer = exchange.answers[number]
        answer.ahead, answer.state = 0, "writing"
        changed(number)
        history, predictor = session.history(number, exchange), self.models[number].predictor
        begin = time.monotonic()
        streams: list[AnswerStream] = []

        def start() -> AnswerStream:
            streams.append(predictor.stream(*history, **ask))
            return streams[0]

        try:
            async for piece in self._queue.pieces(start, session.stop):
                answer.text += piece
                changed(number)
            answer.state = "stopped" if session.stop.is_set() else "done"
            answer.is_cut = answer.state == "done" and streams[0].is_cut
        except Exception as error:  # whatever it was, the next visitor's question is to be answered
            _LOG.exception("the model failed")
            no_memory = isinstance(error, torch.cuda.OutOfMemoryError)
            key = "out_of_memory" if no_memory else "model_failed"
            answer.state, answer.failure = "failed", PageError(key, kind=type(error).__name__)
        finally:
            answer.seconds = time.monotonic() - begin
