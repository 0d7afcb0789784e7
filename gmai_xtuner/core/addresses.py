# SPDX-License-Identifier: Apache-2.0

"""Where a server listens, by which names it is asked, and how long it waits; for the page and the API."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from gmai_xtuner.core.errors import GMAIError

IDLE_SECONDS = 20.0
"""For which a connection may be open without a whole request, or without taking an answer."""


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def name_of(url: str) -> str:
    """The host that a URL names, in small letters; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such as an IPv6 address without its bracket
        return ""


def is_asked_at_home(
    headers: Mapping[str, str], *, loopback_only: bool, names: Collection[str] = ()
) -> bool:
    """Tell whether a request is for this server, by its ``Host``, and of its own page, by its ``Origin``.

    Any web site could point its own name at 127.0.0.1, or ask through the browser of whoever visits it. With
    ``loopback_only`` any ``Host`` but loopback and ``names``, by which a proxy here is visited, is refused.
    """
    host = headers.get("host", "")
    name = name_of(f"//{host}")
    if loopback_only and name not in names and not is_loopback(name):
        return False
    origin = headers.get("origin")
    return (
        origin is None
        or name_of(origin) in names
        or origin in (f"http://{host}", f"https://{host}")
    )


def impatient_protocol() -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol, which closes a connection that neither asks nor listens in time.

    uvicorn alone waits for ever for the first request, for the rest of its headers, and for a client to read.
    How long a body may take is the application's business.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait(True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._wait(False)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle is None or self.cycle.response_complete:
                self._wait(True)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(True)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._wait(False)

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait(False)
            super().connection_lost(exc)

        def _wait(self, begin: bool) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(IDLE_SECONDS, self._leave) if begin else None

        def _leave(self) -> None:
            if self.transport.get_protocol() is self:  # no web socket has taken it over
                self.transport.abort()

    return Impatient


@contextmanager
def reserved(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address, and does not listen yet; a ``GMAIError`` if the address can't be had."""
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
