# SPDX-License-Identifier: Apache-2.0

"""The conversation's side of the page: asking, answers as they come, boxes, settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import background_tasks, ui

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.demo.answering import Answering
from gmai_xtuner.demo.boxes import UNITS, draw_boxes, read_boxes
from gmai_xtuner.demo.conversation import Answer, Exchange, Session
from gmai_xtuner.demo.i18n import PRESETS, PageError, say
from gmai_xtuner.demo.limits import Memory
from gmai_xtuner.demo.widgets import Notices, data_url, named, picture_element

_LOG = logging.getLogger(__name__)
_SEND = """(event) => {
  if (event.isComposing || event.shiftKey) return;
  event.preventDefault();
  emit();
}"""
"""Enter sends; Shift+Enter is a new line, and Enter that ends the input of Chinese characters only that."""


class ChatPanel:
    """Draws the conversation and asks.

    Args:
        session: of the visitor.
        answering: who answers.
        memory: of all visitors.
        images_sent: called when images went along, or are to go again.
    """

    def __init__(
        self,
        session: Session,
        answering: Answering,
        *,
        memory: Memory,
        images_sent: Callable[[], None],
    ) -> None:
        self.session = session
        self.answering = answering
        self.memory = memory
        self._images_sent = images_sent
        self._answers: dict[tuple[int, int], _AnswerView] = {}
        self.notices = Notices(lambda: session.language, name="chat-notice")

    def draw(self) -> None:
        """Everything, in the language of now."""
        session, language = self.session, self.session.language
        with ui.element("div").classes("panel-head"):
            ui.label(say("conversation", language)).classes("panel-title").props(
                "role=heading aria-level=2"
            )
            self._new = named(
                ui.button(say("new", language), icon="restart_alt", on_click=self._restart), "new"
            ).props("flat no-caps dense")
        self._talk = named(ui.element("div").classes("talk"), "talk")
        self.draw_talk()
        with ui.element("div").classes("composer"):
            self.notices.place()
            with ui.element("div").classes("chips"):
                ui.label(say("tasks", language)).classes("hint")
                for preset in PRESETS:
                    named(
                        ui.button(
                            preset.name[language],
                            on_click=lambda _, one=preset: self._set_draft(one.question[language]),
                        ).props("outline no-caps dense size=12px"),
                        f"preset-{preset.key}",
                    )
            with ui.element("div").classes("ask"):
                self._question = (
                    ui.textarea(
                        placeholder=say("question", language),
                        value=session.draft,
                        on_change=lambda e: setattr(session, "draft", e.value or ""),
                    )
                    .props("outlined dense autogrow rows=2")
                    .classes("question")
                )
                self._question.props["aria-label"] = say("question", language)
                self._question.on("keydown.enter", self.ask, args=[], js_handler=_SEND)
                named(self._question, "question")
                self._ask = named(
                    ui.button(say("ask", language), icon="send", on_click=self.ask), "ask"
                ).props("no-caps unelevated")
                self._stop = named(
                    ui.button(say("stop", language), icon="stop", on_click=self.session.stop.set),
                    "stop",
                ).props("no-caps unelevated color=negative")
        with ui.expansion(say("settings", language), icon="tune").classes("settings") as box:
            named(box, "settings")
            self._draw_settings()
        self._set_busy(session.busy)

    def draw_talk(self) -> None:
        """All exchanges."""
        self._talk.clear()
        self._answers.clear()
        with self._talk:
            if not self.session.exchanges:
                ui.label(say("empty_conversation", self.session.language)).classes("hint empty")
            for number in range(len(self.session.exchanges)):
                self._draw_exchange(number)

    def _draw_exchange(self, number: int) -> None:
        exchange = self.session.exchanges[number]
        with ui.element("div").classes("asked"):
            for shown in exchange.images:
                about = say("image_number", self.session.language, number=shown.number)
                with ui.element("figure"):
                    picture_element(
                        data_url(shown.picture, longest=256), about=about, name="sent-picture"
                    )
                    with ui.element("figcaption"):
                        ui.label(about)
            text = exchange.turn.text
            if exchange.images and text.startswith(f"{IMAGE_TOKEN}\n" * len(exchange.images)):
                text = text.removeprefix(f"{IMAGE_TOKEN}\n" * len(exchange.images))
            named(ui.label(text).classes("text"), "asked")
        columns = "answers two" if len(self.answering.models) > 1 else "answers"
        with ui.element("div").classes(columns):
            for model in range(len(self.answering.models)):
                view = _AnswerView(self.session, exchange, model, self._name(model))
                view.draw()
                self._answers[number, model] = view

    def _name(self, model: int) -> str:
        return self.answering.models[model].name if len(self.answering.models) > 1 else ""

    def _draw_settings(self) -> None:
        settings, language = self.session.settings, self.session.language

        def number(name: str, step: float, *, empty: bool = False) -> None:
            low, high = settings.RANGES[name]

            def changed(event: Any) -> None:
                value = event.value
                whole = isinstance(step, int) and value is not None
                setattr(settings, name, int(value) if whole else value)

            field = ui.number(
                say(name, language),
                value=getattr(settings, name),
                min=low,
                max=high,
                step=step,
                on_change=changed,
            ).props("dense outlined" + (" clearable" if empty else ""))
            named(field, f"setting-{name}")

        with ui.element("div").classes("fields"):
            number("max_new_tokens", 1)
            number("temperature", 0.1)
            number("top_p", 0.05)
            number("repetition_penalty", 0.05)
            number("seed", 1, empty=True)
            units = {key: say(key, language) for key in ("auto", *UNITS)}
            named(
                ui.select(
                    units,
                    value=settings.unit or "auto",
                    label=say("coordinates", language),
                    on_change=lambda e: self._set_unit(e.value),
                ).props("dense outlined options-dense"),
                "setting-unit",
            )
        named(
            ui.input(
                say("system", language),
                value=settings.system,
                on_change=lambda e: setattr(settings, "system", e.value or ""),
            ).props("dense outlined"),
            "setting-system",
        )

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
        except PageError as error:
            self._set_busy(False)
            self.notices.say([("", error)])
            return
        except Exception:  # nothing that a visitor does may show him a traceback
            _LOG.exception("a question could not be prepared")
            self._set_busy(False)
            self.notices.say([("", PageError("internal"))])
            return
        self.notices.say([])
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
            self.draw_talk()
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
        self.notices.say([])
        self.draw_talk()


class _AnswerView:
    """One model's answer; as it comes, only its text is changed."""

    def __init__(self, session: Session, exchange: Exchange, model: int, name: str) -> None:
        self._session = session
        self._exchange = exchange
        self._model = model
        self._name = name
        self._holder = named(ui.element("div").classes("answer"), f"answer-{model}")
        self._text: Any = None
        self._state = ""

    @property
    def _answer(self) -> Answer:
        return self._exchange.answers[self._model]

    def update(self) -> None:
        """After a change of the answer."""
        if (
            self._state == self._answer.state == "writing"
            and self._answer.text
            and self._text is not None
        ):
            self._text.text = self._answer.text
        else:
            self.draw()

    def draw(self) -> None:
        """All of it."""
        answer, language = self._answer, self._session.language
        self._state, self._text = answer.state, None
        self._holder.clear()
        self._holder.props["data-state"] = answer.state
        self._holder.update()
        with self._holder:
            if self._name:
                ui.label(self._name).classes("model-name")
            if answer.text:
                self._text = named(
                    ui.label(answer.text).classes("text").props("aria-live=polite"), "text"
                )
            match answer.state:
                case "waiting":
                    key = "waiting" if answer.ahead else "next"
                    ui.label(say(key, language, ahead=answer.ahead)).classes("hint")
                case "writing" if not answer.text:
                    ui.label(say("thinking", language)).classes("hint pulse")
                case "failed" if answer.failure is not None:
                    named(
                        ui.label(
                            say("failed", language, why=answer.failure.said(language))
                        ).classes("warning"),
                        "failure",
                    )
                case "stopped" | "done":
                    self._draw_end(answer)

    def _draw_end(self, answer: Answer) -> None:
        language = self._session.language
        if not answer.text and answer.state == "done":
            ui.label(say("empty_answer", language)).classes("hint")
        self._draw_boxes(answer)
        notes = (
            [say("seconds", language, seconds=f"{answer.seconds:.1f}")] if answer.seconds else []
        )
        if answer.state == "stopped":
            notes.append(say("stopped", language))
        if answer.is_cut:
            notes.append(say("cut", language))
        ui.label(" · ".join(notes)).classes("hint")

    def _draw_boxes(self, answer: Answer) -> None:
        language = self._session.language
        seen = self._session.seen(self._exchange)
        if not seen:
            return
        shown = next((one for one in seen if one.number == self._exchange.box_image), seen[-1])
        picture = shown.picture
        boxes = read_boxes(
            answer.text,
            width=picture.width,
            height=picture.height,
            unit=self._session.settings.unit,
        )
        if boxes.unit is None:
            return
        if boxes.drawn:
            caption = say(
                "boxes_drawn",
                language,
                count=len(boxes.drawn),
                number=shown.number,
                unit=say(boxes.unit, language),
            )
            picture_element(
                data_url(draw_boxes(picture, boxes.drawn)), about=caption, name="boxes"
            ).classes("boxes")
            named(ui.label(caption).classes("hint"), "boxes-caption")
        if len(seen) > 1:
            named(
                ui.select(
                    {one.number: str(one.number) for one in seen},
                    value=shown.number,
                    label=say("boxes_on", language),
                    on_change=lambda e: self._draw_on(e.value),
                ).props("dense outlined options-dense"),
                "boxes-on",
            ).classes("narrow")
        notes: Sequence[str] = [
            *(say("box_clipped", language, text=box.text) for box in boxes.drawn if box.clipped),
            *(say(bad.reason, language, text=bad.text) for bad in boxes.ignored[:10]),
        ]
        for note in notes:
            named(ui.label(note).classes("warning"), "box-note")

    def _draw_on(self, number: int) -> None:
        self._exchange.box_image = number
        self.draw()
