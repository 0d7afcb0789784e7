# SPDX-License-Identifier: Apache-2.0

"""The one way out of this machine for content: clients whose transport asks a `Guard` before it sends.

A request is sent within ``guard.carrying(origins)`` and not otherwise. The host is resolved once, and nothing
but the addresses found then is ever connected to, whatever a redirect, a proxy, a name server or a spelling
says later; redirects are not followed.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import aiohttp
import httpx2
import openai
from aiohttp.abc import AbstractResolver
from openai._vendor.httpx_aiohttp import AiohttpTransport

from gmai_xtuner.core.agreements import Origin, plain_host
from gmai_xtuner.core.errors import EndpointError

_LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
_CARGO: ContextVar[tuple[Origin, ...] | None] = ContextVar("cargo", default=None)


class Guard:
    """Lets out to the server of a URL only what may be sent there.

    ``local``: every address that the host has is of this machine alone. ``hosts`` see what is sent: the
    server's, and a proxy's that the environment names for it.
    """

    def __init__(self, url: str) -> None:
        parts = httpx2.URL(url)
        proxies = {} if urllib.request.proxy_bypass(parts.host) else urllib.request.getproxies()
        found = proxies.get(parts.scheme) or proxies.get("all")
        self.addresses = _addresses(parts.host)
        self.local = bool(self.addresses) and all(map(_is_loopback, self.addresses))
        self.proxy: httpx2.Proxy | None = None
        self.hosts = [plain_host(parts.host)]
        if found and not self.local:
            self.proxy = httpx2.Proxy(found if "://" in found else f"http://{found}")
            self.addresses = _addresses(self.proxy.url.host)
            self.hosts.append(plain_host(self.proxy.url.host))

    def check(self, origins: Iterable[Origin]) -> None:
        """Check that content of these origins may go to this server.

        An ``EndpointError`` if one of them may not.
        """
        for origin in origins:
            for host in self.hosts if origin.forbidden and not self.local else ():
                if host not in origin.hosts:
                    raise EndpointError(
                        f"{origin.name} may not be sent to {host}: {origin.forbidden}. Nothing of it was "
                        "sent. Use a model on this machine (localhost), or, if the agreement allows this "
                        f"host, say so in the source: may_be_sent_to: {{host: {host}, retention: ..., "
                        "evidence: ...}"
                    )

    @contextmanager
    def carrying(self, origins: Iterable[Origin]) -> Iterator[None]:
        """Let the requests within carry content of these origins; of none: no content at all.

        An ``EndpointError`` if one of them may not be sent to this server.
        """
        cargo = tuple(origins)
        self.check(cargo)
        token = _CARGO.set(cargo)
        try:
            yield
        finally:
            _CARGO.reset(token)

    def admit(self) -> None:
        """Check what is about to be sent, in the transport."""
        cargo = _CARGO.get()
        if cargo is None:
            raise EndpointError("a request that does not say whose content it carries is not sent")
        self.check(cargo)

    def async_client(self) -> httpx2.AsyncClient:
        """Return the client for many requests at once; a third of httpx' processor time by aiohttp."""
        return openai.DefaultAioHttpClient(transport=_AsyncDoor(self), follow_redirects=False)

    def client(self) -> httpx2.Client:
        """Return the client for one request after the other, such as uploads."""
        return openai.DefaultHttpxClient(transport=_Door(self), follow_redirects=False)


class _AsyncDoor(httpx2.AsyncBaseTransport):
    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._inner = AiohttpTransport(limits=_LIMITS, proxy=guard.proxy, client=self._session)

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=_LIMITS.max_connections or 0,
            keepalive_timeout=_LIMITS.keepalive_expiry or 5.0,
            ssl=self._inner.ssl_context,
            resolver=_Resolver(self._guard),
            socket_factory=self._socket,
        )
        return aiohttp.ClientSession(connector=connector)

    def _socket(self, found: Any) -> socket.socket:
        """Open a socket for an address that was found at the start, and for no other."""
        family, kind, protocol, _, address = found
        if plain_host(str(address[0])) not in map(plain_host, self._guard.addresses):
            raise OSError(f"{address[0]} is no address that {self._guard.hosts} had at the start")
        return socket.socket(family=family, type=kind, proto=protocol)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self._guard.admit()
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Resolver(AbstractResolver):
    """Gives the addresses that were found at the start, whatever is asked for."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[Any]:
        if not self._guard.addresses:
            raise OSError(f"no address is known of {', '.join(self._guard.hosts)}")
        return [
            {
                "hostname": host, "host": address, "port": port, "proto": 0,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in self._guard.addresses
        ]  # fmt: skip

    async def close(self) -> None:
        pass


class _Door(httpx2.BaseTransport):
    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._inner = httpx2.HTTPTransport(limits=_LIMITS, proxy=guard.proxy)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self._guard.admit()
        if self._guard.proxy is not None:
            return self._inner.handle_request(request)
        fault: Exception = httpx2.ConnectError(f"no address is known of {self._guard.hosts[0]}")
        for address in self._guard.addresses:
            there = httpx2.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions=request.extensions | {"sni_hostname": request.url.host},
            )
            try:
                return self._inner.handle_request(there)
            except httpx2.ConnectError as error:  # nothing has been sent
                fault = error
        raise fault

    def close(self) -> None:
        self._inner.close()


def _addresses(host: str) -> tuple[str, ...]:
    """Return the addresses of a host; none if it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(one[4][0]) for one in found))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(plain_host(address).partition("%")[0]).is_loopback
