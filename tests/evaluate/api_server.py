"""A real HTTP server on loopback that answers chat completions, and misbehaves on request."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Reply:
    """What the server does with a request.

    Args:
        status: of HTTP.
        text: content of the message, or of the error.
        headers: further ones.
        cut: the connection is cut in the middle.
        seconds: waits before.
        body: instead of a completion.
    """

    status: int = 200
    text: str | None = "A"
    headers: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    seconds: float = 0.0
    body: dict[str, Any] | None = None


@dataclass
class Server:
    """What has been asked; ``behave`` gets the text, how often it came before, and the whole request."""

    url: str
    behave: Callable[[str, int, dict[str, Any]], Reply]
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def texts(self) -> list[str]:
        return [text_of(request) for request in self.requests]


def text_of(request: dict[str, Any]) -> str:
    content = request["messages"][-1]["content"]
    return "".join(part["text"] for part in content if part["type"] == "text")


def pictures_of(request: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """Media type and picture of each image."""
    found = []
    for part in request["messages"][-1]["content"]:
        if part["type"] == "image_url":
            head, data = part["image_url"]["url"].split(";base64,")
            found.append(
                (head.removeprefix("data:"), Image.open(io.BytesIO(base64.b64decode(data))))
            )
    return found


@contextmanager
def serve(behave: Callable[[str, int, dict[str, Any]], Reply]) -> Iterator[Server]:
    """Serve on a free port of loopback until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = text_of(request)
            with server.lock:
                before = server.seen[text]
                server.seen[text] += 1
                server.requests.append(request)
                server.keys.append(self.headers["Authorization"])
                server.times.append(time.monotonic())
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            reply = server.behave(text, before, request)
            time.sleep(reply.seconds)
            with server.lock:
                server.at_once -= 1
            if reply.cut:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            body = json.dumps(reply.body or _body(reply, request)).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in reply.headers:
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that gave up
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Many(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    http = Many(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1", behave)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def _body(reply: Reply, request: dict[str, Any]) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": reply.text, "type": "error", "code": None, "param": None}}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": reply.text},
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
