# SPDX-License-Identifier: Apache-2.0

"""The conversation's side of the page: asking, answers as they come, boxes, settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import cast

from nicegui import background_tasks, ui

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.demo.boxes import UNITS, draw_boxes, read_boxes
from gmai_xtuner.demo.conversation import Answer, Answering, Exchange, Session
from gmai_xtuner.demo.i18n import PRESETS, PageError
from gmai_xtuner.demo.studies import Memory
from gmai_xtuner.demo.widgets import Panel, chips, data_url, image_element

_LOG = logging.getLogger(__name__)
_SEND = """(event) => {
  if (event.isComposing || event.shiftKey) return;
  event.preventDefault();
  emit();
}"""
"""Enter sends; Shift+Enter is a new line, and Enter that ends the input of Chinese characters only that."""
_STEPS = {
    "max_new_tokens": 1,
    "temperature": 0.1,
    "top_p": 0.05,
    "repetition_penalty": 0.05,
    "seed": 1,
}


class ChatPanel(Panel):
    """Draws the conversation and asks; calls ``images_sent`` when images went along, or are to go again."""

    def __init__(
        self,
        session: Session,
        memory: Memory,
        *,
        answering: Answering,
        images_sent: Callable[[], None],
    ) -> None:
        super().__init__(session, memory, notice="chat-notice")
        self.answering = answering
        self._images_sent = images_sent
        self._answers: dict[tuple[int, int], _AnswerView] = {}

    def draw(self) -> None:
        """Draw everything in the language of now."""
        session, language, flat = self.session, self.session.language, "no-caps unelevated"
        with ui.element("div").classes("panel-head"):
            ui.label(self.say("conversation")).classes("panel-title").props(
                "role=heading aria-level=2"
            )
            self._new = ui.button(
                self.say("new"), icon="restart_alt", on_click=self._restart
            ).props("flat no-caps dense data-testid=new")
        self._talk = ui.element("div").classes("talk").props("data-testid=talk")
        self._draw_talk()
        with ui.element("div").classes("composer"):
            self.place_notices()
            tasks = [
                (f"preset-{one.key}", one.name, partial(self._set_draft, one.question[language]))
                for one in PRESETS
            ]
            chips(self.say("tasks"), [(key, name[language], press) for key, name, press in tasks])
            with ui.element("div").classes("ask"):
                self._question = (
                    ui.textarea(placeholder=self.say("question"), value=session.draft)
                    .bind_value_to(session, "draft", lambda text: text or "")
                    .props("outlined dense autogrow rows=2 data-testid=question")
                    .classes("question")
                )
                self._question.props["aria-label"] = self.say("question")
                self._question.on("keydown.enter", self.ask, args=[], js_handler=_SEND)
                self._ask = ui.button(self.say("ask"), icon="send", on_click=self.ask)
                self._ask.props(f"{flat} data-testid=ask")
                self._stop = ui.button(self.say("stop"), icon="stop", on_click=session.stop.set)
                self._stop.props(f"{flat} color=negative data-testid=stop")
        with (
            ui.expansion(self.say("settings"), icon="tune")
            .classes("settings")
            .props("data-testid=settings")
        ):
            self._draw_settings()
        self._set_busy(session.busy)

    def _draw_talk(self) -> None:
        self._talk.clear()
        self._answers.clear()
        with self._talk:
            if not self.session.exchanges:
                ui.label(self.say("empty_conversation")).classes("hint empty")
            for number in range(len(self.session.exchanges)):
                self._draw_exchange(number)

    def _draw_exchange(self, number: int) -> None:
        exchange, models = self.session.exchanges[number], self.answering.models
        with ui.element("div").classes("asked"):
            for shown in exchange.images:
                about = self.say("image_number", number=shown.number)
                with ui.element("figure"):
                    url = data_url(shown.picture, longest=256)
                    image_element(url, about=about, name="sent-picture")
                    with ui.element("figcaption"):
                        ui.label(about)
            text = exchange.turn.text.removeprefix(f"{IMAGE_TOKEN}\n" * len(exchange.images))
            ui.label(text).classes("text").props("data-testid=asked")
        with ui.element("div").classes("answers two" if len(models) > 1 else "answers"):
            for model, loaded in enumerate(models):
                name = loaded.name if len(models) > 1 else ""
                self._answers[number, model] = _AnswerView(self, exchange, model, name)

    def _draw_settings(self) -> None:
        settings = self.session.settings
        with ui.element("div").classes("fields"):
            for name, step in _STEPS.items():
                low, high = settings.RANGES[name]
                value = getattr(settings, name)
                ui.number(self.say(name), value=value, min=low, max=high, step=step).bind_value_to(
                    settings, name
                ).props(
                    f"dense outlined data-testid=setting-{name}"
                    + (" clearable" if name == "seed" else "")
                )
            ui.select(
                {key: self.say(key) for key in ("auto", *UNITS)},
                value=settings.unit or "auto",
                label=self.say("coordinates"),
                on_change=lambda e: self._set_unit(e.value),
            ).props("dense outlined options-dense data-testid=setting-unit")
        ui.input(self.say("system"), value=settings.system).bind_value_to(
            settings, "system", lambda text: text or ""
        ).props("dense outlined data-testid=setting-system")

    def _set_unit(self, value: str) -> None:
        self.session.settings.unit = None if value == "auto" else value  # type: ignore[assignment]
        for view in self._answers.values():
            view.draw()

    def _set_draft(self, text: str) -> None:
        self._question.value = text
        self._question.run_method("focus")

    def _set_busy(self, busy: bool) -> None:
        self.session.busy = busy
        self._ask.set_visibility(not busy)
        self._stop.set_visibility(busy)
        self._new.set_enabled(not busy)

    async def ask(self) -> None:
        """Ask what is written, with the images that go along."""
        session = self.session
        if session.busy:
            return
        session.busy = True  # before anything is waited for: two presses are one question
        try:
            exchange = await asyncio.to_thread(session.ask, session.draft)
            await asyncio.to_thread(self.answering.check, session, exchange)
            self.memory.take(exchange.nbytes)
        except Exception as error:
            if not isinstance(error, PageError):  # no visitor is shown a traceback
                _LOG.exception("a question could not be prepared")
            self._set_busy(False)
            self.tell(error if isinstance(error, PageError) else PageError("internal"))
            return
        self.tell()
        session.stop.clear()
        if session.closed:
            self.memory.give_back(exchange.nbytes)
            return
        session.exchanges.append(exchange)
        for one in session.tray:
            if any(one.number == shown.number for shown in exchange.images):
                one.send, one.sent = False, True
        self._images_sent()
        self._question.value = ""
        if len(session.exchanges) == 1:
            self._draw_talk()
        else:
            with self._talk:
                self._draw_exchange(len(session.exchanges) - 1)
        self._set_busy(True)
        self._scroll()
        background_tasks.create(self._answer(exchange), name="answer")

    async def _answer(self, exchange: Exchange) -> None:
        number = self.session.exchanges.index(exchange)

        def changed(model: int) -> None:
            if not self.session.closed:
                self._answers[number, model].update()

        try:
            await self.answering.answer(self.session, exchange, changed)
        finally:
            self.session.finish(exchange)
            if self.session.closed:
                self.session.busy = False
            else:
                self._images_sent()
                self._set_busy(False)
                self._scroll()

    def _scroll(self) -> None:
        self._talk.client.run_javascript(
            "document.querySelector('.talk')?.scrollTo({top: 1e9, behavior: 'smooth'})"
        )

    def _restart(self) -> None:
        self.memory.give_back(sum(one.nbytes for one in self.session.exchanges))
        self.session.restart()
        self._images_sent()
        self.tell()
        self._draw_talk()


class _AnswerView:
    """One model's answer; as it comes, only its text is changed."""

    def __init__(self, panel: Panel, exchange: Exchange, model: int, name: str) -> None:
        self._session, self._say = panel.session, panel.say
        self._exchange, self._model, self._name = exchange, model, name
        self._holder = ui.element("div").classes("answer").props(f"data-testid=answer-{model}")
        self.draw()

    @property
    def _answer(self) -> Answer:
        return self._exchange.answers[self._model]

    def update(self) -> None:
        """Show what has changed of the answer."""
        if self._state == self._answer.state == "writing" and self._text is not None:
            self._text.text = self._answer.text
        else:
            self.draw()

    def draw(self) -> None:
        """Draw all of it."""
        answer = self._answer
        self._state, self._text = answer.state, cast("ui.label | None", None)
        self._holder.clear()
        self._holder.props["data-state"] = answer.state
        self._holder.update()
        with self._holder:
            if self._name:
                ui.label(self._name).classes("model-name")
            if answer.text:
                self._text = ui.label(answer.text).classes("text")
                self._text.props("aria-live=polite data-testid=text")
            match answer.state:
                case "waiting":
                    key = "waiting" if answer.ahead else "next"
                    ui.label(self._say(key, ahead=answer.ahead)).classes("hint")
                case "writing" if not answer.text:
                    ui.label(self._say("thinking")).classes("hint pulse")
                case "failed" if answer.failure is not None:
                    why = answer.failure.said(self._session.language)
                    ui.label(self._say("failed", why=why)).classes("warning").props(
                        "data-testid=failure"
                    )
                case "stopped" | "done":
                    self._draw_end(answer)

    def _draw_end(self, answer: Answer) -> None:
        if not answer.text and answer.state == "done":
            ui.label(self._say("empty_answer")).classes("hint")
        self._draw_boxes(answer)
        notes = {
            "seconds": answer.seconds > 0,
            "stopped": answer.state == "stopped",
            "cut": answer.is_cut,
        }
        seconds = f"{answer.seconds:.1f}"
        texts = [self._say(key, seconds=seconds) for key, holds in notes.items() if holds]
        ui.label(" · ".join(texts)).classes("hint")

    def _draw_boxes(self, answer: Answer) -> None:
        seen = self._session.seen(self._exchange)
        if not seen:
            return
        shown = next((one for one in seen if one.number == self._exchange.box_image), seen[-1])
        width, height = shown.picture.size
        unit = self._session.settings.unit
        boxes = read_boxes(answer.text, width=width, height=height, unit=unit)
        if boxes.unit is None:
            return
        if boxes.drawn:
            unit_name = self._say(boxes.unit)
            caption = self._say(
                "boxes_drawn", count=len(boxes.drawn), number=shown.number, unit=unit_name
            )
            url = data_url(draw_boxes(shown.picture, boxes.drawn))
            image_element(url, about=caption, name="boxes").classes("boxes")
            ui.label(caption).classes("hint").props("data-testid=boxes-caption")
        if len(seen) > 1:
            ui.select(
                {one.number: str(one.number) for one in seen},
                value=shown.number,
                label=self._say("boxes_on"),
                on_change=lambda e: self._draw_on(e.value),
            ).props("dense outlined options-dense data-testid=boxes-on").classes("narrow")
        notes = [("box_clipped", box.text) for box in boxes.drawn if box.clipped]
        notes += [(bad.reason, bad.text) for bad in boxes.ignored[:10]]
        for key, text in notes:
            ui.label(self._say(key, text=text)).classes("warning").props("data-testid=box-note")

    def _draw_on(self, number: int) -> None:
        self._exchange.box_image = number
        self.draw()
