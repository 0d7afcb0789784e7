# SPDX-License-Identifier: Apache-2.0

"""The page: a head with the models and the warning, images on the left, the conversation on the right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nicegui import Client, ui

from gmai_xtuner.demo.answering import Answering
from gmai_xtuner.demo.chat_panel import ChatPanel
from gmai_xtuner.demo.conversation import Session
from gmai_xtuner.demo.files import Example
from gmai_xtuner.demo.i18n import BANNER, LANGUAGES, Language, say
from gmai_xtuner.demo.image_panel import ImagePanel
from gmai_xtuner.demo.studies import Limits, Memory

STYLE = Path(__file__).with_name("style.css")


class Demo:
    """What all visitors share.

    Args:
        answering: the models.
        limits: of uploads.
        examples: to pick from.
        language: that a page begins with.
    """

    def __init__(
        self,
        answering: Answering,
        *,
        limits: Limits,
        examples: Sequence[Example] = (),
        language: Language = "en",
    ) -> None:
        self.answering, self.limits = answering, limits
        self.examples, self.language = tuple(examples), language
        self.memory = Memory(limits.memory_bytes)
        self.opening = asyncio.Semaphore(2)
        self._open: dict[int, Session] = {}

    def page(self, client: Client) -> None:
        """Build the page of one visitor, who has a session of his own."""
        session = Session(len(self.answering.models), self.limits, language=self.language)
        self._open[id(session)] = session
        client.on_delete(lambda: self._leave(session))
        ui.colors(primary="#0b6e75", negative="#b3261e")
        ui.add_css(STYLE.read_text(encoding="utf-8"))
        images = ImagePanel(session, self.memory, examples=self.examples, opening=self.opening)
        chat = ChatPanel(
            session, self.memory, answering=self.answering, images_sent=images.sent_changed
        )
        body = ui.element("div").classes("demo")

        def speak(event: Any) -> None:
            session.language = event.value
            ui.run_javascript(f"document.documentElement.lang = '{session.language}'")
            draw()

        def draw() -> None:
            body.clear()
            with body:
                self._draw_head(session, speak)
                with ui.element("main"):
                    with ui.element("section").classes("panel images"):
                        images.draw()
                    with ui.element("section").classes("panel chat"):
                        chat.draw()

        draw()

    def _draw_head(self, session: Session, speak: Callable[[Any], None]) -> None:
        title = "GMAI-VL · " + say("title", session.language)
        with ui.element("header"):
            with ui.element("div").classes("head"):
                ui.label(title).classes("title").props("role=heading aria-level=1")
                ui.toggle(LANGUAGES, value=session.language, on_change=speak).classes(
                    "language"
                ).props("no-caps dense flat data-testid=language")
            with ui.element("div").classes("banner").props("role=note data-testid=banner"):
                for language, words in BANNER.items():
                    ui.label(words).props(f"lang={language}")
            with ui.element("div").classes("models"):
                for model in self.answering.models:
                    text = f"{model.name}: {model.facts}"
                    ui.label(text).props("data-testid=model-facts")

    def stop(self) -> None:
        """End every answer, when the server ends."""
        for session in self._open.values():
            session.closed = True
            session.stop.set()

    def _leave(self, session: Session) -> None:
        self._open.pop(id(session), None)
        session.closed = True
        session.stop.set()
        images = [one.study for one in session.tray]
        self.memory.give_back(sum(one.nbytes for one in (*images, *session.exchanges)))
        session.tray.clear()
        session.exchanges.clear()
