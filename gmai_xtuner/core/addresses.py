"""Where a server listens, and by which names it is asked; for the page and the API."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from gmai_xtuner.core.errors import GMAIError


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
