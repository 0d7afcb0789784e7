# SPDX-License-Identifier: Apache-2.0

"""A Chat Completions and Batch API server on loopback that misbehaves as it is told to, and counts."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from PIL import Image


@dataclass
class Act:
    """What a request gets instead of an answer. ``status`` 0: see ``kind``."""

    kind: str = "status"  # status, cut, cut_at_once, stall, body
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None


def error(status: int, message: str, code: str | None = None, **headers: str) -> Act:
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return Act(
        status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}, body=body
    )


def name_of(body: dict[str, Any]) -> str:
    """The payload: everything that was asked, pictures included."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def completion(
    content: str | None, *, finish: str = "stop", refusal: str | None = None, usage: Any = (100, 20)
) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    values: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
    }
    if usage:
        values["usage"] = {
            "prompt_tokens": usage[0],
            "completion_tokens": usage[1],
            "total_tokens": sum(usage),
        }
    return values


def user_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def images_of(body: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """Media type and image of each attachment of the last message."""
    found = []
    for part in body["messages"][-1]["content"]:
        if part["type"] == "image_url":
            head, data = part["image_url"]["url"].split(";base64,")
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            found.append((head.removeprefix("data:"), image))
    return found


Script = Callable[[dict[str, Any], int], Act | dict[str, Any] | None]


class ApiServer:
    """A context manager; runs in a thread of its own.

    Args:
        script: ``(body, n)`` -> what the ``n``-th request (from 0) with this text gets: an `Act`, a body of
            status 200, or None for what ``answer`` says.
        answer: text of the prompt -> text of the answer.
        key: what the client must show.
        latency: seconds.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        answer: Callable[[str], str] = lambda text: json.dumps({"answer": f"It is {text}."}),
        key: str | None = None,
        latency: float = 0.0,
        port: int = 0,
    ) -> None:
        self.script, self.answer, self.key = script, answer, key
        self.latency, self.port = latency, port
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.payloads: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0
        self.files: dict[str, tuple[str, bytes]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        # What becomes of a batch when it is looked at for the second time; called with it and its lines.
        self.work: Callable[[dict[str, Any], list[dict[str, Any]]], None] = self.finish
        self.on_batch: Callable[[dict[str, Any]], Act | None] = lambda body: None
        self.looks: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    # Chat Completions

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            self.requests.append(body)
            said = f"Incorrect API key provided: {request.headers.get('Authorization', '')[7:]}"
            return self._error(error(401, said, "invalid_api_key"))
        text = user_text(body)
        number = self.texts[text]
        self.texts[text] += 1
        self.payloads[name_of(body)] += 1
        self.requests.append(body)
        self.times.append(time.monotonic())
        self.headers.append(dict(request.headers))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            act = self.script(body, number) if self.script else None
            if act is None:
                return web.json_response(completion(self.answer(text)))
            if isinstance(act, dict):
                return web.json_response(act)
            return await self._misbehave(request, act)
        finally:
            self.now -= 1

    async def _misbehave(self, request: web.Request, act: Act) -> web.StreamResponse:
        if act.kind == "status":
            return self._error(act)
        if act.kind == "body":
            return web.Response(body=act.body, content_type="application/json")
        if act.kind == "stall":
            await asyncio.sleep(60)
        assert request.transport is not None
        if act.kind == "cut":
            response = web.StreamResponse(headers={"Content-Length": "500"})
            await response.prepare(request)
            await response.write(b'{"id": "chatcmpl-1", "choices": [')
        request.transport.abort()
        return web.Response()

    @staticmethod
    def _error(act: Act) -> web.Response:
        if isinstance(act.body, str):
            return web.Response(text=act.body, status=act.status, headers=act.headers)
        return web.json_response(act.body, status=act.status, headers=act.headers)

    # Files and batches

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        upload = form["file"]
        assert isinstance(upload, web.FileField)
        name = f"file-{len(self.files)}"
        self.files[name] = (upload.filename, upload.file.read())
        return web.json_response(self._file(name))

    def _file(self, name: str) -> dict[str, Any]:
        filename, data = self.files[name]
        return {
            "id": name,
            "object": "file",
            "bytes": len(data),
            "created_at": 1,
            "filename": filename,
            "purpose": "batch",
            "status": "processed",
        }

    async def _list_files(self, request: web.Request) -> web.StreamResponse:
        return self._page(request, [self._file(name) for name in self.files])

    async def _content(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.files[request.match_info["id"]][1])

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        act = self.on_batch(body)
        name = f"batch_{len(self.batches)}"
        batch = {
            "id": name,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "created_at": 1,
            "status": "in_progress",
            "metadata": body.get("metadata"),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
        }
        if act is None or act.kind != "status":
            self.batches[name] = batch
        if act is not None:
            return await self._misbehave(request, act)
        return web.json_response(batch)

    def lines(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        data = self.files[batch["input_file_id"]][1]
        return [json.loads(line) for line in data.splitlines()]

    def result(self, line: dict[str, Any]) -> dict[str, Any]:
        text = user_text(line["body"])
        number = self.texts[text]
        self.texts[text] += 1
        self.payloads[name_of(line["body"])] += 1
        act = self.script(line["body"], number) if self.script else None
        if isinstance(act, Act):
            response = {"status_code": act.status, "request_id": "r", "body": act.body}
        else:
            body = act if act is not None else completion(self.answer(text))
            response = {"status_code": 200, "request_id": "r", "body": body}
        return {"id": "x", "custom_id": line["custom_id"], "response": response, "error": None}

    def finish(
        self,
        batch: dict[str, Any],
        lines: list[dict[str, Any]],
        *,
        status: str = "completed",
        done: int | None = None,
    ) -> None:
        """End a batch with its first ``done`` lines answered, the others in the error file."""
        results = [self.result(line) for line in lines[:done]]
        code = f"batch_{status}"
        missed = [] if done is None else lines[done:]
        lost = [
            {
                "id": "x",
                "custom_id": line["custom_id"],
                "response": None,
                "error": {"code": code, "message": "This request could not be executed."},
            }
            for line in missed
        ]
        failed = [row for row in results if row["response"]["status_code"] != 200] + lost
        good = [row for row in results if row["response"]["status_code"] == 200]
        for kind, rows in (("output_file_id", good), ("error_file_id", failed)):
            if rows:
                name = f"file-{len(self.files)}"
                data = "\n".join(json.dumps(row) for row in reversed(rows)) + "\n"
                self.files[name] = (f"{kind}.jsonl", data.encode())
                batch[kind] = name
        batch["status"] = status

    async def _retrieve(self, request: web.Request) -> web.StreamResponse:
        batch = self.batches[request.match_info["id"]]
        self.looks[batch["id"]] += 1
        if batch["status"] == "in_progress" and self.looks[batch["id"]] > 1:
            self.work(batch, self.lines(batch))
        return web.json_response(batch)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        return self._page(request, list(self.batches.values()))

    @staticmethod
    def _page(request: web.Request, items: list[dict[str, Any]]) -> web.StreamResponse:
        """Newest first, two a page, whatever is asked for: who reads the first page only shows."""
        items = items[::-1]
        after = request.query.get("after")
        start = next((n + 1 for n, item in enumerate(items) if item["id"] == after), 0)
        page = items[start : start + 2]
        values = {"object": "list", "data": page, "has_more": start + 2 < len(items)}
        if page:
            values |= {"first_id": page[0]["id"], "last_id": page[-1]["id"]}
        return web.json_response(values)

    # Running

    def application(self) -> web.Application:
        application = web.Application(client_max_size=2**30)
        application.router.add_post("/v1/chat/completions", self._chat)
        application.router.add_post("/v1/files", self._upload)
        application.router.add_get("/v1/files", self._list_files)
        application.router.add_get("/v1/files/{id}/content", self._content)
        application.router.add_post("/v1/batches", self._create)
        application.router.add_get("/v1/batches", self._list)
        application.router.add_get("/v1/batches/{id}", self._retrieve)
        return application

    def __enter__(self) -> ApiServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def start() -> None:
            self._runner = web.AppRunner(self.application(), access_log=None, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", self.port)
            await site.start()
            self.port = self._runner.addresses[0][1]

        asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
