"""The page's server: one process, one port, nothing from outside."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence

import uvicorn
from fastapi import FastAPI
from nicegui import app as nicegui_app
from nicegui import ui

from gmai_xtuner.core.addresses import is_loopback
from gmai_xtuner.demo.guard import Guard
from gmai_xtuner.demo.page import Demo

RECONNECT = 60.0
"""Seconds for which a page whose connection broke keeps its images and conversation."""


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
    demo: Demo,
    *,
    own: socket.socket,
    names: Sequence[str],
    ready: Callable[[], None],
) -> None:
    """Serve until a signal ends it.

    Args:
        demo: what is served.
        own: see `gmai_xtuner.core.addresses.reserved`.
        names: see `Guard`.
        ready: called when the page can be visited.
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
        application,
        upload_bytes=demo.limits.upload_bytes,
        loopback=is_loopback(host),
        names=names,
    )
    config = uvicorn.Config(
        guarded,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
        lifespan="on",
    )
    _Server(config, ready=ready).run(sockets=[own])
