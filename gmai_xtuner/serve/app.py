"""The web application: routes, keys, limits, and answers whole or as server-sent events."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gmai_xtuner.core.addresses import is_loopback, name_of
from gmai_xtuner.generate import Predictor
from gmai_xtuner.serve.answers import Answers, End, Job, Piece
from gmai_xtuner.serve.errors import ApiError
from gmai_xtuner.serve.protocol import ChatRequest, Limits, read_request

log = logging.getLogger(__name__)


class Server:
    """The application around one model.

    Args:
        predictor: the model.
        name: what clients call it.
        key: what clients must show, if anything.
        only_loopback_names: whether requests under any other name are refused: for a server without a key
            that only this machine reaches.
        limits: of a request.
        default_new_tokens: length of an answer whose request doesn't say.
        max_new_tokens: what a request may ask for.
        max_waiting: requests that may wait for the one that is computed.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        name: str,
        key: str | None = None,
        only_loopback_names: bool = False,
        limits: Limits | None = None,
        default_new_tokens: int = 512,
        max_new_tokens: int = 4096,
        max_waiting: int = 32,
    ) -> None:
        self.name, self._key = name, key
        self.limits = limits or Limits()
        self.default_new_tokens, self.max_new_tokens = default_new_tokens, max_new_tokens
        self.answers = Answers(predictor, max_waiting=max_waiting)
        self.started = int(time.time())
        # A decoded picture may take hundreds of MiB; what waits for the model is small.
        self._decoding = asyncio.Semaphore(2)
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
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
            self.answers.close()

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "gmai_xtuner",
            "max_model_len": self.answers.predictor.context_length,
        }

    async def _chat(self, request: Request) -> Response:
        self._check_key(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site can't send that unasked
            raise ApiError(f"the content type must be application/json, got {kind!r}", status=415)
        asked = read_request(await self._body(request))
        self._check_name(asked.model)
        self.answers.check_room()
        async with self._decoding:
            job = await asyncio.to_thread(self._job, asked)
        self.answers.check_room()
        frame = _Frame(self.name)
        if not asked.stream:
            return await self._whole(request, job, frame)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(
            self._stream(job, frame, with_usage=usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    def _job(self, asked: ChatRequest) -> Job:
        prompt = asked.prompt(self.limits, self.answers.predictor.pixels)
        self.answers.check_length(prompt)
        return Job(
            prompt=prompt,
            max_new_tokens=asked.new_tokens(
                default=self.default_new_tokens, limit=self.max_new_tokens
            ),
            sampling=asked.sampling(),
            stops=asked.stops(),
        )

    async def _whole(self, request: Request, job: Job, frame: _Frame) -> Response:
        """All at once; given up if the client leaves."""
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
        return JSONResponse(frame.whole(text, end))

    async def _collect(self, job: Job) -> tuple[str, End]:
        text = ""
        async with aclosing(self.answers.events(job)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, End):
                    return text, event
                text += event.text
        raise AssertionError("an answer without end")

    async def _stream(self, job: Job, frame: _Frame, *, with_usage: bool) -> AsyncIterator[str]:
        yield _sent(frame.chunk({"role": "assistant", "content": ""}))
        try:
            async with aclosing(self.answers.events(job)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, Piece):
                        yield _sent(frame.chunk({"content": event.text}))
                        continue
                    yield _sent(frame.chunk({}, event.finish_reason))
                    if with_usage:
                        yield _sent(frame.usage_chunk(event))
        except ApiError as error:  # the status is sent already
            log.error("%s", error.message)
            yield _sent(error.body())
        yield "data: [DONE]\n\n"

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.body_bytes
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ApiError(
                    f"the request is larger than {limit} bytes, this server's limit",
                    status=413,
                    code="request_too_large",
                )
        return bytes(body)

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(shown.strip().encode(), self._key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                "this server wants its key: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                f"there is no model {name!r} here, only {self.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )


class _Frame:
    """What all chunks of an answer share."""

    def __init__(self, model: str) -> None:
        self.shared = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, end: End) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": end.finish_reason,
            "logprobs": None,
        }
        return {
            **self.shared,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(end),
        }

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self.shared, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, end: End) -> dict[str, Any]:
        return {
            **self.shared,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": _usage(end),
        }


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.new_tokens,
        "total_tokens": end.prompt_tokens + end.new_tokens,
    }


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
    """Refuses a request whose ``Host`` is no name of this machine's loopback.

    Any web site could point its own name at 127.0.0.1; its pages, open in a browser on this machine, could
    then ask the model and read the answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        if is_loopback(name_of(f"//{host}")):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            f"without a key this server is asked as 127.0.0.1 or localhost, not as {host[:100]!r}. Start it "
            "with --api-key-env, or with --without-key if everyone may ask",
            status=403,
            code="host_not_allowed",
        )
        await JSONResponse(error.body(), status_code=error.status)(scope, receive, send)
