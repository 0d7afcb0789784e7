# SPDX-License-Identifier: Apache-2.0

"""One visitor's images and what was said about them; nothing of it is written anywhere."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.demo.boxes import Unit
from gmai_xtuner.demo.i18n import Language, PageError
from gmai_xtuner.demo.studies import Limits, Study, View, first_view
from gmai_xtuner.generate import Predictor, Prompt, PromptTooLong, Sampling, user_turn
from gmai_xtuner.inference_queue import InferenceQueue, QueueFull
from gmai_xtuner.model.costs import part_cost, size

State = Literal["waiting", "writing", "done", "stopped", "failed"]


@dataclass
class Attached:
    """An image in the tray, with a number from 1 that is never given twice in a session.

    The view is what is shown of it, and goes with the next question if ``send`` says so; ``sent``: the models
    have it.
    """

    number: int
    study: Study
    view: View
    send: bool = True
    sent: bool = False

    def turn_to(self, view: View) -> None:
        """Show something else, which the model has not seen."""
        if view != self.view:
            self.view = view
            self.send, self.sent = True, False


@dataclass(frozen=True)
class Shown:
    """An image of the tray as the model got it, kept as it was however the image is turned later."""

    number: int
    picture: Image.Image


@dataclass
class Answer:
    """What one model says so far; a failed one is not part of the conversation.

    ``ahead``: questions before this one while it waits; ``is_cut``: it ended at its greatest length.
    """

    text: str = ""
    state: State = "waiting"
    ahead: int = 0
    failure: PageError | None = None
    seconds: float = 0.0
    is_cut: bool = False

    @property
    def counts(self) -> bool:
        """Whether it is part of the conversation: not failed, and not stopped before anything was said."""
        return self.state in ("done", "stopped") and bool(self.text.strip())


@dataclass
class Exchange:
    """A question and each model's answer.

    ``box_image`` is the number of the image that boxes are drawn on; None: the last that was sent so far.
    """

    turn: Turn
    images: tuple[Shown, ...]
    answers: list[Answer]
    box_image: int | None = None

    @property
    def nbytes(self) -> int:
        """Memory of its images."""
        return sum(3 * shown.picture.width * shown.picture.height for shown in self.images)


@dataclass
class Settings:
    """How answers are made; fields as in `Sampling`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    system: str = ""
    unit: Unit | None = None

    RANGES = {  # noqa: RUF012 - not a field
        "max_new_tokens": (1, 4096),
        "temperature": (0, 2),
        "top_p": (0.01, 1),
        "repetition_penalty": (0.5, 2),
        "seed": (0, 2**31 - 1),
    }

    def checked(self) -> Sampling:
        """As the model takes it; a value that is missing or out of its range is a ``PageError``."""
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            empty = value is None
            if not (name == "seed" if empty else low <= value <= high):
                raise PageError("setting", name=name, low=low, high=high)
        seed = None if self.seed is None else int(self.seed)
        return Sampling(self.temperature, self.top_p, seed, self.repetition_penalty)


@dataclass
class Session:
    """All of one visitor, to whom so many ``models`` answer."""

    models: int
    limits: Limits
    language: Language = "en"
    settings: Settings = field(default_factory=Settings)
    tray: list[Attached] = field(default_factory=list)
    chosen: int | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    draft: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    busy: bool = False
    closed: bool = False
    _numbers: itertools.count = field(default_factory=lambda: itertools.count(1))

    def attach(self, study: Study) -> Attached:
        """Put an image into the tray and choose it; a full tray is a ``PageError``."""
        if len(self.tray) >= self.limits.images:
            raise PageError("too_many_images", limit=self.limits.images)
        attached = Attached(next(self._numbers), study, first_view(study))
        self.tray.append(attached)
        self.chosen = attached.number
        return attached

    def remove(self, number: int) -> Attached:
        """Take an image out of the tray; what was sent of it stays in the conversation."""
        attached = self.image(number)
        self.tray.remove(attached)
        if self.chosen == number:
            self.chosen = self.tray[-1].number if self.tray else None
        return attached

    def image(self, number: int) -> Attached:
        """The tray's image of a number."""
        return next(one for one in self.tray if one.number == number)

    def ask(self, question: str) -> Exchange:
        """A new exchange with the images that go with it; added by the caller when it is accepted.

        Raises:
            PageError: no question, a long one, or marks and images that differ in number.
        """
        question = question.strip()
        if not question:
            raise PageError("no_question")
        limit = self.limits.question_characters
        if len(question) > limit:
            raise PageError("long_question", count=len(question), limit=limit)
        sent = [one for one in self.tray if one.send]
        marks = question.count(IMAGE_TOKEN)
        if marks and marks != len(sent):
            raise PageError("marks", marks=marks, images=len(sent))
        images = tuple(Shown(one.number, one.study.render(one.view)) for one in sent)
        answers = [Answer() for _ in range(self.models)]
        return Exchange(user_turn(question, len(sent)), images, answers)

    def history(self, model: int, exchange: Exchange) -> tuple[tuple[Turn, ...], list[Image.Image]]:
        """Turns and images that a model gets for an exchange: with its own answers, up to the question."""
        system = self.settings.system.strip()
        turns = [Turn("system", system)] if system else []
        before = itertools.takewhile(lambda one: one is not exchange, self.exchanges)
        kept = [one for one in before if one.answers[model].counts]
        for one in kept:
            turns += [one.turn, Turn("assistant", one.answers[model].text)]
        images = [shown.picture for one in (*kept, exchange) for shown in one.images]
        return (*turns, exchange.turn), images

    def finish(self, exchange: Exchange) -> None:
        """After the answers: images of a question that a model could not answer go along once more."""
        if not all(answer.counts for answer in exchange.answers):
            self.send_again({shown.number for shown in exchange.images})

    def seen(self, exchange: Exchange) -> Sequence[Shown]:
        """Every image that was sent up to and with an exchange, the newest of each number last."""
        newest: dict[int, Shown] = {}
        for one in self.exchanges:
            for shown in one.images:
                newest.pop(shown.number, None)
                newest[shown.number] = shown
            if one is exchange:
                break
        return list(newest.values())

    def restart(self) -> None:
        """A new conversation about the same images."""
        self.exchanges.clear()
        self.send_again({one.number for one in self.tray})

    def send_again(self, numbers: set[int]) -> None:
        """Let images of the tray go with the next question."""
        for one in self.tray:
            if one.number in numbers:
                one.send, one.sent = True, False


# --- the models that answer ---


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
        try:
            stream = await self._queue.start(partial(predictor.stream, *history, **ask))
            async for piece in self._queue.pieces(stream, session.stop):
                answer.text += piece
                changed(number)
            answer.state = "stopped" if session.stop.is_set() else "done"
            answer.is_cut = answer.state == "done" and stream.is_cut
        except Exception as error:  # whatever it was, the next visitor's question is to be answered
            _LOG.exception("the model failed")
            no_memory = isinstance(error, torch.cuda.OutOfMemoryError)
            key = "out_of_memory" if no_memory else "model_failed"
            answer.state, answer.failure = "failed", PageError(key, kind=type(error).__name__)
        finally:
            answer.seconds = time.monotonic() - begin
