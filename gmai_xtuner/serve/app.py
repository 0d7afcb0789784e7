# SPDX-License-Identifier: Apache-2.0

"""The web application: routes, keys, limits, and answers whole or as server-sent events."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gmai_xtuner.core.addresses import is_asked_at_home
from gmai_xtuner.generate import Predictor, Prompt, PromptTooLong, Sampling
from gmai_xtuner.inference_queue import InferenceQueue, QueueFull
from gmai_xtuner.serve.protocol import ApiError, ChatRequest, Limits, busy, read_request

log = logging.getLogger(__name__)

_BODIES_AT_ONCE = 4
"""Requests of the largest size that may arrive at the same time."""


class Job(NamedTuple):
    """What is asked of the model."""

    prompt: Prompt
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()


class End(NamedTuple):
    """How an answer ended: ``"stop"``, or ``"length"`` at its greatest length."""

    finish_reason: str
    prompt_tokens: int
    new_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """As the API has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }


class Server:
    """The application around one model.

    Args:
        predictor, name: the model, and what clients call it.
        key: what clients must show, if anything.
        only_loopback_names: whether requests under any other name, or from a page of another site, are
            refused: for a server without a key that only this machine reaches.
        limits, max_waiting: of a request, and of those that may wait for the one that is computed.
        max_new_tokens: what a request may ask for; one that doesn't say gets 512 at the most.
        timeout: seconds in which a request must arrive, and then be read and its images decoded.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        name: str,
        key: str | None = None,
        only_loopback_names: bool = False,
        limits: Limits | None = None,
        max_new_tokens: int = 4096,
        max_waiting: int = 32,
        timeout: float = 60.0,
    ) -> None:
        self.name, self._key = name, key
        self.limits, self.max_new_tokens = limits or Limits(), max_new_tokens
        self.predictor, self.queue = predictor, InferenceQueue(max_waiting=max_waiting)
        self._described = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "gmai_xtuner",
            "max_model_len": predictor.context_length,
        }
        self._timeout, self._arriving = timeout, 0
        # A decoded image may take hundreds of MiB; what waits for the model is small.
        self._decoding = asyncio.Semaphore(2)
        self.app = Starlette(
            routes=[
                Route("/health", lambda _: JSONResponse({"status": "ok"})),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={
                ApiError: _told,
                HTTPException: _http_error,
                Exception: _unexpected,
            },
            middleware=[Middleware(OnlyLoopbackNames)] if only_loopback_names else [],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self.queue.close()

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._described]})

    async def _model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described)

    async def _chat(self, request: Request) -> Response:
        self._check_key(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site can't send that unasked
            raise ApiError(f"the content type must be application/json, got {kind!r}", status=415)
        # What runs in a thread can't be stopped: it keeps its place among the two until it is done.
        preparing = asyncio.ensure_future(self._prepare(await self._body(request)))
        # What is wrong with a request that nobody waits for any more is no error of the server.
        preparing.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            asked, job = await asyncio.wait_for(asyncio.shield(preparing), self._timeout)
        except TimeoutError as error:
            raise busy(
                f"the request could not be read within {self._timeout:g} s: the server has much to do, or "
                "its images are too large"
            ) from error
        self._check_room()
        shared = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        if not asked.stream:
            return await self._whole(request, job, shared)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(
            self._stream(job, shared, with_usage=usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _prepare(self, body: bytes) -> tuple[ChatRequest, Job]:
        async with self._decoding:
            return await asyncio.to_thread(self._read, body)

    def _read(self, body: bytes) -> tuple[ChatRequest, Job]:
        asked = read_request(body)
        self._check_name(asked.model)
        self._check_room()
        sampling, stops = asked.sampling(), asked.stops()  # before any image is decoded
        length = asked.new_tokens(limit=self.max_new_tokens)
        try:
            prompt = asked.prompt(self.limits, self.predictor.pixels)
            tokens, limit = self.predictor.num_tokens(prompt), self.predictor.context_length
            if tokens >= limit:
                raise PromptTooLong(tokens, limit)
        except PromptTooLong as error:
            raise ApiError(str(error), code="context_length_exceeded", param="messages") from error
        except MemoryError as error:
            raise ApiError(
                "there is not enough memory for these images: send fewer or smaller ones",
                status=413,
                code="image_too_large",
            ) from error
        return asked, Job(prompt, length, sampling, stops)

    async def _whole(self, request: Request, job: Job, shared: dict[str, Any]) -> Response:
        """Answer all at once; give up if the client leaves."""
        answer = asyncio.ensure_future(self._collect(job))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=499)  # nobody reads it
            text, end = answer.result()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        choice = _choice(end.finish_reason, message={"role": "assistant", "content": text})
        whole = {"object": "chat.completion", "choices": [choice], "usage": end.usage}
        return JSONResponse(shared | whole)

    async def _events(self, job: Job) -> AsyncIterator[str | End]:
        """Yield the answer as it comes, and how it ended.

        Closing the iterator takes a waiting job out, and stops the model after the token that it is at. A
        model that failed, or too many requests that wait, is an ``ApiError``.
        """
        stops, (turns, images) = StopTexts(job.stops), (job.prompt.turns, job.prompt.images)
        start = partial(
            self.predictor.stream, max_new_tokens=job.max_new_tokens, sampling=job.sampling
        )
        try:
            async with self.queue.turn():
                stream = await self.queue.start(partial(start, turns, images))
                async with aclosing(self.queue.pieces(stream)) as pieces:
                    async for piece in pieces:
                        if text := stops.add(piece):
                            yield text
                        if stops.found:
                            break
        except QueueFull as error:
            raise self._full() from error
        except Exception as error:
            raise ApiError(f"the model failed: {error}", status=500, code="model_failed") from error
        if text := stops.rest():
            yield text
        reason = "length" if stream.is_cut and not stops.found else "stop"
        yield End(reason, stream.prompt_tokens, stream.new_tokens)

    def _check_room(self) -> None:
        """Refuse when too many requests wait: 503, with ``Retry-After``."""
        if self.queue.is_full:
            raise self._full()

    def _full(self) -> ApiError:
        return busy(f"{self.queue.length} requests are computed or wait, this server's limit")

    async def _collect(self, job: Job) -> tuple[str, End]:
        text = ""
        async with aclosing(self._events(job)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, End):
                    return text, event
                text += event
        raise AssertionError("an answer without end")

    async def _stream(
        self, job: Job, shared: dict[str, Any], *, with_usage: bool
    ) -> AsyncIterator[str]:
        """Answer as it comes. The model doesn't wait for a client that doesn't read."""
        events: asyncio.Queue[str | End | ApiError] = asyncio.Queue()

        async def compute() -> None:
            try:
                async with aclosing(self._events(job)) as found:  # type: ignore[type-var]
                    async for event in found:
                        events.put_nowait(event)
            except ApiError as error:
                events.put_nowait(error)

        def chunk(*choices: dict[str, Any], **more: Any) -> str:
            return _sent(shared | {"object": "chat.completion.chunk", "choices": choices} | more)

        yield chunk(_choice(None, delta={"role": "assistant", "content": ""}))
        computing = asyncio.ensure_future(compute())
        try:
            while isinstance(event := await events.get(), str):
                yield chunk(_choice(None, delta={"content": event}))
            if isinstance(event, ApiError):  # the status is sent already
                log.error("%s", event.message)
                yield _sent(event.body())
            else:
                yield chunk(_choice(event.finish_reason, delta={}))
                if with_usage:
                    yield chunk(usage=event.usage)
            yield "data: [DONE]\n\n"
        finally:
            computing.cancel()
            await asyncio.gather(computing, return_exceptions=True)

    async def _body(self, request: Request) -> bytes:
        limit, body = self.limits.body_bytes, bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                async for chunk in request.stream():
                    body += chunk
                    self._arriving += len(chunk)
                    if len(body) > limit:
                        raise ApiError(
                            f"the request is larger than {limit} bytes, this server's limit",
                            status=413,
                            code="request_too_large",
                        )
                    if self._arriving > _BODIES_AT_ONCE * limit:
                        raise busy("too many large requests arrive")
            return bytes(body)
        except TimeoutError as error:
            message = f"the request did not arrive within {self._timeout:g} s"
            raise ApiError(message, status=408, code="request_timeout") from error
        finally:
            self._arriving -= len(body)

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(shown.strip().encode(), self._key.encode())
        if scheme.lower() != "bearer" or not same:
            message = "this server wants its key: Authorization: Bearer KEY"
            raise ApiError(message, status=401, code="invalid_api_key")

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"there is no model {name!r} here, only {self.name!r}"
            raise ApiError(message, status=404, code="model_not_found", param="model")


def _choice(finish_reason: str | None, **content: dict[str, str]) -> dict[str, Any]:
    return {"index": 0, **content, "finish_reason": finish_reason, "logprobs": None}


def _sent(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return await _told(request, ApiError(what, status=error.status_code))


async def _unexpected(request: Request, error: Exception) -> Response:
    return await _told(request, ApiError("an error of the server; its log has more", status=500))


class OnlyLoopbackNames:
    """Refuses a request whose ``Host`` is no name of this machine's loopback, or of another site's page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if not headers or is_asked_at_home(headers, loopback_only=True):
            await self._app(scope, receive, send)
            return
        shown = headers.get("host", "")[:100], headers.get("origin", "no page")[:100]
        error = ApiError(
            f"without a key this server is asked as 127.0.0.1 or localhost, by no other site's page; not as "
            f"{shown[0]!r} from {shown[1]!r}. Start it with --api-key-env, or with --without-key if everyone "
            "may ask",
            status=403,
            code="host_not_allowed",
        )
        await JSONResponse(error.body(), status_code=error.status)(scope, receive, send)


class StopTexts:
    """Hand text on up to the first of the stop texts (none empty), and hold back what may become one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.found = False
        self._held = ""

    def add(self, piece: str) -> str:
        """Return what can be handed on now; nothing after a stop text."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        # The longest end of the text with which a stop text begins.
        begun = (n for s in self.texts for n in range(1, len(s)) if text.endswith(s[:n]))
        kept = max(begun, default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """Return what was held back, when no more comes."""
        text, self._held = self._held, ""
        return text
