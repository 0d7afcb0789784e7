# SPDX-License-Identifier: Apache-2.0

"""The page: a head with the models and the warning, images on the left, the conversation on the right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from nicegui import Client, ui

from gmai_xtuner.demo.answering import Answering
from gmai_xtuner.demo.chat_panel import ChatPanel
from gmai_xtuner.demo.conversation import Session
from gmai_xtuner.demo.examples import Example
from gmai_xtuner.demo.i18n import BANNER, LANGUAGES, Language, say
from gmai_xtuner.demo.image_panel import ImagePanel
from gmai_xtuner.demo.limits import Limits, Memory
from gmai_xtuner.demo.widgets import named

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
        self.answering = answering
        self.limits = limits
        self.examples = tuple(examples)
        self.language = language
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
        _Page(self, session).draw()

    def stop(self) -> None:
        """End every answer, when the server ends."""
        for session in self._open.values():
            session.closed = True
            session.stop.set()

    def _leave(self, session: Session) -> None:
        self._open.pop(id(session), None)
        session.closed = True
        session.stop.set()
        self.memory.give_back(
            sum(one.study.nbytes for one in session.tray)
            + sum(one.nbytes for one in session.exchanges)
        )
        session.tray.clear()
        session.exchanges.clear()


class _Page:
    def __init__(self, demo: Demo, session: Session) -> None:
        self.demo = demo
        self.session = session
        self.images = ImagePanel(session, demo.memory, examples=demo.examples, opening=demo.opening)
        self.chat = ChatPanel(
            session, demo.answering, memory=demo.memory, images_sent=self.images.told_sent
        )

    def draw(self) -> None:
        self._body = ui.element("div").classes("demo")
        self._fill()

    def _fill(self) -> None:
        self._body.clear()
        with self._body:
            with ui.element("header"):
                with ui.element("div").classes("head"):
                    ui.label("GMAI-VL · " + say("title", self.session.language)).classes(
                        "title"
                    ).props("role=heading aria-level=1")
                    named(
                        ui.toggle(
                            LANGUAGES,
                            value=self.session.language,
                            on_change=lambda e: self._speak(e.value),
                        )
                        .props("no-caps dense flat")
                        .classes("language"),
                        "language",
                    )
                with named(ui.element("div").classes("banner").props("role=note"), "banner"):
                    for language, words in BANNER.items():
                        ui.label(words).props(f"lang={language}")
                with ui.element("div").classes("models"):
                    for model in self.demo.answering.models:
                        named(ui.label(f"{model.name}: {model.facts}"), "model-facts")
            with ui.element("main"):
                with ui.element("section").classes("panel images"):
                    self.images.draw()
                with ui.element("section").classes("panel chat"):
                    self.chat.draw()

    def _speak(self, language: Language) -> None:
        self.session.language = language
        ui.run_javascript(f"document.documentElement.lang = '{language}'")
        self._fill()
