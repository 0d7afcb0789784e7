"""The page's server: one process, one port, nothing from outside."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from nicegui import app as nicegui_app
from nicegui import ui

from gmai_xtuner.demo.guard import Guard, is_loopback
from gmai_xtuner.demo.page import Demo
from gmai_xtuner.errors import GMAIError

RECONNECT = 60.0
"""Seconds for which a page whose connection broke keeps its images and conversation."""


@contextmanager
def reserved(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address, and does not listen yet.

    Raises:
        GMAIError: the address can't be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise GMAIError(
            f"--host {host!r} is no address of this machine ({error.strerror})"
        ) from error
    with own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(address)
        except OSError as error:
            raise GMAIError(
                f"port {port} of {host} can't be had ({error.strerror}). Choose another with --port"
            ) from error
        yield own


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
    credentials: str | None,
    ready: Callable[[], None],
) -> None:
    """Serve until a signal ends it.

    Args:
        demo: what is served.
        own: see `reserved`.
        names: see `Guard`.
        credentials: ``user:password``, or None.
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
        credentials=credentials,
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
