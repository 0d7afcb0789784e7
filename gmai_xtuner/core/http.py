# SPDX-License-Identifier: Apache-2.0

"""Asking an OpenAI-compatible server: one request, the meaning of its failures, and the speed of many.

The client's own retries are off, so that whoever asks counts, paces and pays for every request. All but
`each` runs in one event loop.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import queue
import random
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from gmai_xtuner.core.agreements import Origin
from gmai_xtuner.core.errors import EndpointError
from gmai_xtuner.core.strict_json import STRICT_JSON

if TYPE_CHECKING:
    from concurrent.futures import Future

    from anyio.from_thread import BlockingPortal

NO_KEY = "EMPTY"
"""Sent where a server needs no key, as vLLM and its like expect it."""
DEFAULT_KEY = "OPENAI_API_KEY"
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
"""Codes of a 429 that no waiting mends."""
_SAID = 10_000
"""Bytes of a reply that are looked at for a message: a key cut in two could not be found in it."""
BURST = 1.0
"""Seconds of its rate that a pace may fall behind and catch up with."""

Input = TypeVar("Input")
Result = TypeVar("Result")


def key_of(variable: str | None) -> str | None:
    """Return the key that an environment variable holds, without spaces and line ends around it.

    Without a ``variable`` it is that of :data:`DEFAULT_KEY`, which may be unset. An ``EndpointError`` if the
    named variable is not set, or no header can carry what it holds.
    """
    key = os.environ.get(variable or DEFAULT_KEY, "").strip()
    if (variable and not key) or not (key.isascii() and key.isprintable() and len(key.split()) < 2):
        raise EndpointError(
            f"the environment variable {variable or DEFAULT_KEY} holds no key: set it to one word of ASCII, "
            "or name another (or none, for a server that needs none)"
        )
    return key or None


@dataclass(eq=False)
class ServerFault(Exception):
    """The server failed; the same request may succeed later.

    ``reason`` is the same for all faults of the kind, ``detail`` what came, ``wait`` the seconds that the
    server asks for. ``billed``: it may have cost something. ``throttled``: the server has too much to do.
    """

    reason: str
    detail: str = ""
    wait: float | None = None
    billed: bool = False
    throttled: bool = False

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(eq=False)
class RequestRefused(Exception):
    """The server does not take this request, whenever it is sent; it says why in ``message``."""

    status: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.message}"


class ChatServer:
    """A Chat Completions server; to be made and used in one event loop.

    ``url`` is of the API, such as ``http://localhost:8000/v1``. The ``key`` is sent as bearer token and kept
    out of every message; None: the server needs none. A request may take ``timeout`` seconds to its last
    byte.
    """

    def __init__(
        self, url: str, *, model: str, key: str | None, key_variable: str | None, timeout: float
    ) -> None:
        import openai

        from gmai_xtuner.core.sending import Guard

        self.url, self.model, self.timeout = url, model, timeout
        self._guard = Guard(url)
        self._key, self._key_variable = key and key.strip(), key_variable
        self._client = openai.AsyncOpenAI(
            api_key=self._key or NO_KEY,
            base_url=url,
            max_retries=0,
            timeout=timeout,
            http_client=self._guard.async_client(),
        )

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, body: Mapping[str, Any], origins: Iterable[Origin]) -> dict[str, Any]:
        """Send one request, return its answer, which has ``choices``; ``origins`` are of all that it holds.

        Raises:
            ServerFault: it may be sent again.
            RequestRefused: it need not be sent again.
            EndpointError: nothing need be sent again, or an origin may not be sent there.
        """
        import httpx2
        import openai

        try:
            # The client's own time-out starts anew with each piece of the answer.
            with self._guard.carrying(origins):
                async with asyncio.timeout(self.timeout):
                    response = await self._client.post(
                        "/chat/completions", cast_to=httpx2.Response, body=dict(body)
                    )
        except openai.APIStatusError as error:
            response = error.response
            raise self._refusal(response.status_code, response.headers, response.content) from error
        except (TimeoutError, openai.APIConnectionError) as error:
            raise self._lost(error) from error
        try:
            values = STRICT_JSON.decode(response.content.decode())
            choices = values.get("choices")
            if not isinstance(choices, list) or ("error" in values and not choices):
                raise ValueError("no list of choices")
        except (ValueError, AttributeError) as error:
            said = self.clean(response.content[:_SAID].decode("utf-8", "replace"))
            raise ServerFault("an answer that isn't the API's", said, billed=True) from error
        return dict(values)

    def _lost(self, error: Exception) -> ServerFault:
        """Return the fault behind a request without an answer.

        The client's transport takes cut and refused connections for time-outs alike: only the exceptions
        that it began with say whether the request has left this machine.
        """
        import aiohttp

        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        said = self.clean(str(chain[-1]) or type(chain[-1]).__name__)
        unsent = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
        if any(isinstance(cause, unsent) for cause in chain):
            return ServerFault("no connection", said)
        if any(isinstance(cause, TimeoutError) for cause in chain):
            return ServerFault("no answer in time", f"after {self.timeout:g} s", billed=True)
        return ServerFault("connection cut", said, billed=True)

    def _refusal(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        """Return the meaning of a status other than 2xx."""
        try:
            code, message = error_of(STRICT_JSON.decode(content.decode()))
        except ValueError:
            code, message = "", content[:_SAID].decode("utf-8", "replace")
        message = self.clean(message)
        wait = retry_after(headers)
        if status == 429 and code not in NO_MONEY:
            return ServerFault("too many requests", message, wait=wait, throttled=True)
        if status in (408, 409, 425) or status >= 500:
            throttled = status == 503
            return ServerFault(f"server error {status}", message, wait=wait, throttled=throttled)
        if status in (400, 413, 415, 422):
            return RequestRefused(status, code, message)
        advice = {
            401: f"set the environment variable {self._key_variable} to a valid key"
            if self._key_variable
            else "name the environment variable that holds the key",
            402: "the account has no money left: charge it and run the same command again",
            403: "this key may not use this model or this server",
            404: "check the model's name and the address, which usually ends in /v1",
        }
        return EndpointError(
            f"{self.url} (model {self.model}) refuses every request, HTTP {status}: {message}; "
            + advice.get(402 if status == 429 else status, "check the address")
        )

    def redacted(self, text: str) -> str:
        """Return a text without the key, however a server has quoted it."""
        key = self._key
        if key and len(key) > 3:
            for form in (key, json.dumps(key)[1:-1], urllib.parse.quote(key, safe="")):
                text = text.replace(form, "[key]")
        return text

    def clean(self, text: str) -> str:
        """Return a server's words in one line of at most 500 characters, without the key."""
        text = " ".join(re.sub(r"\bsk-\S+", "[key]", self.redacted(text)).split())[:500]
        # JSON can carry half a surrogate pair, which no file and no terminal can.
        return text.encode("utf-8", "backslashreplace").decode()


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        content = "".join(part for part in parts if isinstance(part, str))
    return content.strip() if isinstance(content, str) else ""


def error_of(values: Any) -> tuple[str, str]:
    """Return the code in lower case and the message of an error's body, whatever its form."""
    error = values.get("error", values) if isinstance(values, dict) else values
    if not isinstance(error, dict):
        return "", str(error)
    message = error.get("message") or error.get("detail") or values
    parameter = error.get("param")
    text = message if isinstance(message, str) else json.dumps(message)
    if isinstance(parameter, str) and parameter not in text:
        text += f" ({parameter})"
    return str(error.get("code") or error.get("type") or "").lower(), text


def first_message(answer: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return the message of an answer's first choice, None if it has none, and its ``finish_reason``."""
    choices = answer.get("choices") or [None]
    choice = choices[0] if isinstance(choices[0], dict) else {}
    message = choice.get("message")
    return (message if isinstance(message, dict) else None), choice.get("finish_reason") or "stop"


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Return the seconds that the server asks to wait: ``Retry-After`` as a number or an HTTP date.

    ``retry-after-ms`` is what OpenAI and Azure add. None: not said, or neither number nor date.
    """
    value = headers.get("retry-after")
    for text, unit in ((headers.get("retry-after-ms"), 1000), (value, 1)):
        try:
            seconds = float(text) / unit if text else -1.0
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        when = email.utils.parsedate_to_datetime(value or "")
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, when.timestamp() - (time.time() if now is None else now))


def back_off(attempt: int, *, most: float = 60.0) -> float:
    """Return the seconds before the ``attempt``-th repetition (from 0): up to 0.5, 1, 2, ... ``most``.

    At least half of it; the jitter keeps requests that failed together from coming back together.
    """
    longest: float = min(most, 0.5 * 2 ** min(attempt, 20))
    return random.uniform(longest / 2, longest)


class Pace:
    """At most ``rate`` units a minute, evenly: each start is due as many minutes after the last as it took.

    Packages with token buckets let a whole minute's worth through at once and then go on at the full rate, so
    that the first minute has twice of what a server allows; and what a request was estimated at can't be
    given back when its true size is known. Without a rate there is no limit.
    """

    def __init__(self, rate: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 60 / rate if rate else 0.0
        self.clock = clock
        self.due = clock()

    def take(self, amount: float = 1) -> float:
        """Book ``amount`` units; return the seconds to wait before they may be sent."""
        now = self.clock()
        start = max(self.due, now - BURST)
        self.due = start + amount * self.seconds
        return max(0.0, start - now)

    def give_back(self, amount: float) -> None:
        """Return units that were booked and not needed; negative: more were needed."""
        self.due -= amount * self.seconds


class Concurrency:
    """The number of requests that may be under way: additive increase, multiplicative decrease.

    Begins with one, so that a wrong key or an unknown model shows in one request, and opens to ``limit`` with
    the first answer. A 429 takes it to seven tenths, once for all requests that were under way together; each
    answer raises it by its share of one. ``check`` is called while a slot is waited for; it raises if it need
    not be.
    """

    def __init__(self, limit: int, *, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self.most = limit
        self.limit = 1.0
        self.under_way = 0
        self.opened = False
        self.lowered = 0  # how often
        self.not_before = 0.0
        self._room = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Hold a slot; the value is to be handed to `lower`."""
        async with self._room:
            while True:
                await self._room.wait_for(lambda: self.under_way < max(1, int(self.limit)))
                wait = self.not_before - time.monotonic()
                if wait <= 0:
                    break
                self._room.release()
                try:
                    # A little apart, or all that waited would come in the same moment.
                    await asyncio.sleep(min(0.5, wait + random.uniform(0, 0.1 * wait)))
                finally:
                    await self._room.acquire()
                self.check()
            self.under_way += 1
        try:
            yield self.lowered
        finally:
            self.under_way -= 1
            async with self._room:
                self._room.notify(2)

    async def answered(self) -> None:
        """Make room for more: the server gave an answer."""
        if not self.opened:
            self.opened, self.limit = True, float(self.most)
            async with self._room:
                self._room.notify_all()
        elif self.limit < self.most:
            self.limit = min(self.most, self.limit + 1 / self.limit)

    def lower(self, seen: int) -> None:
        """Allow fewer; ``seen`` is what `slot` gave: an older complaint has been heard already."""
        if seen == self.lowered:
            self.lowered += 1
            self.limit = max(1.0, self.limit * 0.7)

    def pause(self, seconds: float) -> None:
        """Let no new request through for so long: the server's wish holds for all."""
        self.not_before = max(self.not_before, time.monotonic() + seconds)


def each(
    portal: BlockingPortal,
    function: Callable[[Input], Awaitable[Result]],
    inputs: Iterable[Input],
    *,
    window: int,
) -> Iterator[Result]:
    """Yield the function's results as they come, ``window`` calls under way at once; its first error ends it.

    The function runs in the event loop of ``portal``; inputs are read in the caller's thread, as results are
    taken.
    """
    found: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
    waiting, under_way = iter(inputs), 0
    while True:
        for value in islice(waiting, window - under_way):
            portal.start_task_soon(function, value).add_done_callback(found.put)
            under_way += 1
        if not under_way:
            return
        result = found.get().result()
        under_way -= 1
        yield result
