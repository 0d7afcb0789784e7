# SPDX-License-Identifier: Apache-2.0

"""The page and its server: one process, one port, nothing from outside; and what it refuses.

* Requests that another web site makes through a visitor's browser are refused: the ``Origin`` must be the
  page's own, and on a loopback address the ``Host`` must be one too (else any site could point its name at
  127.0.0.1).
* A body that is too large is refused by what it says of its length, or cut off where it exceeds it.
* The browser is told to load and connect to nothing but this server (Content-Security-Policy).

Signing in is left to a proxy in front, which has the site's accounts and TLS.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from nicegui import Client, ui
from nicegui import app as nicegui_app
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gmai_xtuner.core.addresses import (
    IDLE_SECONDS,
    impatient_protocol,
    is_asked_at_home,
    is_loopback,
)
from gmai_xtuner.core.files import delete, remove_left_behind, staging
from gmai_xtuner.demo.chat_panel import ChatPanel
from gmai_xtuner.demo.conversation import Answering, Session
from gmai_xtuner.demo.files import Example
from gmai_xtuner.demo.i18n import BANNER, LANGUAGES, Language, say
from gmai_xtuner.demo.image_panel import ImagePanel
from gmai_xtuner.demo.studies import Limits, Memory

MULTIPART_OVERHEAD = 64 * 2**10
"""Bytes that boundaries and headers of an upload may add to its files."""

_HEADERS = {
    # NiceGUI compiles templates and sets styles in the browser, hence unsafe-*; all of it comes from here.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-robots-tag": "noindex",
}
RECONNECT = 60.0
"""Seconds for which a page whose connection broke keeps its images and conversation."""


STYLE = Path(__file__).with_name("style.css")


class Demo:
    """What all visitors share; a page begins with this ``language``."""

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
        sent = lambda: images.refresh_checkbox()  # noqa: E731 (another one for each image)
        chat = ChatPanel(session, self.memory, answering=self.answering, images_sent=sent)
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


class _Server(uvicorn.Server):
    """Tells when it can be visited."""

    def __init__(self, config: uvicorn.Config, *, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def serve(
    demo: Demo, *, own: socket.socket, names: Sequence[str], ready: Callable[[], None]
) -> None:
    """Serve by a reserved socket, and by these names (see `Guard`), until a signal ends it.

    ``ready`` is called when the page can be visited.
    """
    host = str(own.getsockname()[0])
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.page("/")(demo.page)
    ui.run_with(
        application,
        title="GMAI-VL",
        language="en-US",
        tailwind=False,
        reconnect_timeout=RECONNECT,
        show_welcome_message=False,
    )
    nicegui_app.on_shutdown(demo.stop)
    # A visitor's file names could be in a web server's log; only what goes wrong here is written.
    logging.getLogger("uvicorn.access").disabled = True
    guarded = Guard(
        application, upload_bytes=demo.limits.upload_bytes, loopback=is_loopback(host), names=names
    )
    config = uvicorn.Config(
        guarded,
        http=impatient_protocol(),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
        lifespan="on",
    )
    with _temporary_folder(), _closed_pages_forgotten():
        _Server(config, ready=ready).run(sockets=[own])


@contextmanager
def _closed_pages_forgotten() -> Iterator[None]:
    """Let Python forget closed pages, whose objects refer to each other.

    It looks for such only when there are a quarter more objects than before; model and libraries, which hold
    most of them, are not counted here.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _temporary_folder() -> Iterator[None]:
    """Let uploads pass through a folder of our own; the next page removes what a killed one has left."""
    before = tempfile.tempdir
    name = Path(tempfile.gettempdir(), "gmai_demo")
    remove_left_behind(name)
    folder = staging(name)
    folder.mkdir(mode=0o700)
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        delete(folder)


class Guard:
    """Refuse what does not belong to this page, and bound what is uploaded with one request.

    ``loopback``: only this machine is served; by ``names`` a proxy on it is visited, taken as if its own.
    """

    def __init__(
        self, application: ASGIApp, *, upload_bytes: int, loopback: bool, names: Sequence[str] = ()
    ) -> None:
        self._application = application
        self._limit = upload_bytes + MULTIPART_OVERHEAD
        self._loopback = loopback
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not is_asked_at_home(headers, loopback_only=self._loopback, names=self._names):
            words = "This address serves its own page only."
            if scope["type"] == "websocket":
                await receive()  # the request to connect
                await send({"type": "websocket.close", "code": 1008, "reason": words})
            else:
                await _refused(words, 403)(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._application(scope, receive, send)
        else:
            await self._serve(scope, receive, send, headers)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        too_large = _refused("The upload is too large.", 413)
        length = headers.get("content-length", "")
        # int() refuses some of what isdigit() takes, such as superscripts
        if length.isascii() and length.isdigit() and int(length) > self._limit:
            await too_large(scope, receive, send)
            return
        arrived, began, more = 0, False, True

        async def counted() -> Message:
            nonlocal arrived, more
            try:
                async with asyncio.timeout(IDLE_SECONDS if more else None):
                    message = await receive()
            except TimeoutError:  # an upload that has come to a halt
                return {"type": "http.disconnect"}
            more = message.get("more_body", False)
            arrived += len(message.get("body", b""))
            # Who reads on learns that nobody is there, and gives up.
            return {"type": "http.disconnect"} if arrived > self._limit else message

        async def with_headers(message: Message) -> None:
            nonlocal began
            if arrived > self._limit:
                return
            if message["type"] == "http.response.start":
                began = True
                message.setdefault("headers", [])
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            await self._application(scope, counted, with_headers)
        except ClientDisconnect:
            pass  # a visitor who left in the middle of an upload is no error of the page
        except Exception:
            if arrived <= self._limit:
                raise
        if arrived > self._limit and not began:
            await too_large(scope, receive, send)


def _refused(words: str, status: int) -> PlainTextResponse:
    return PlainTextResponse(words, status, headers={"connection": "close"})
