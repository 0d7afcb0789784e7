# SPDX-License-Identifier: Apache-2.0

"""200 clients of server or page on loopback, half of them slow, broken or hostile -> what honest ones get.

The model is a stand-in that takes no time: what counts is the server. ``/health`` is asked all the time. An
honest visitor of the page (``--page``) opens it and uploads an image, with as many pages left behind; what
a browser would then show goes over a socket, which is not opened.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import io
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from printing import REPOSITORY, parser, show

KEY = "secret"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Stand:
    """A model that says the same to everybody."""

    context_length = 4096

    def pixels(self, image: Image.Image) -> Any:
        import torch

        return torch.zeros(1)

    def num_tokens(self, prompt: Any) -> int:
        return 10

    def stream(self, turns: Any, images: Any, **options: Any) -> Any:
        return Said()


class Said:
    prompt_tokens, new_tokens, is_cut = 10, 2, False

    def __iter__(self) -> Iterator[str]:
        yield "It is "
        yield "CT."

    def close(self) -> None:
        pass


def serve() -> None:
    """Run the server until it is killed; its first line is the port."""
    import uvicorn

    from gmai_xtuner.core.addresses import impatient_protocol, reserved
    from gmai_xtuner.serve.app import Server

    with reserved("127.0.0.1", 0) as own:
        server: Any = Server(Stand(), name="m", key=KEY, max_waiting=200, timeout=10)  # type: ignore[arg-type]
        print(own.getsockname()[1], flush=True)
        config = uvicorn.Config(server.app, http=impatient_protocol(), log_level="critical")
        uvicorn.Server(config).run(sockets=[own])


def serve_page() -> None:
    """Run the page until it is killed; its first line is the port."""
    from types import SimpleNamespace

    from gmai_xtuner.core.addresses import reserved
    from gmai_xtuner.demo.conversation import Answering
    from gmai_xtuner.demo.server import Demo, serve
    from gmai_xtuner.demo.studies import Limits

    with reserved("127.0.0.1", 0) as own:
        port = own.getsockname()[1]
        model: Any = SimpleNamespace(name="m", facts="a stand-in", predictor=Stand())
        limits = Limits(upload_bytes=8 * 2**20)
        demo = Demo(Answering([model], max_waiting=limits.waiting), limits=limits)
        serve(demo, own=own, names=[], ready=lambda: print(port, flush=True))


def png_file() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((300, 300), 40).save(out, "PNG")
    return out.getvalue()


def picture() -> str:
    return "data:image/png;base64," + base64.b64encode(png_file()).decode()


def post(
    body: bytes, *, key: str = KEY, host: str = "127.0.0.1", length: int | None = None
) -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


def question(**more: Any) -> bytes:
    parts = [
        {"type": "image_url", "image_url": {"url": picture()}},
        {"type": "text", "text": "What?"},
    ]
    return json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": parts}], **more}
    ).encode()


async def exchange(port: int, request: bytes, *, seconds: float = 60) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(seconds):
            writer.write(request)
            await writer.drain()
            answer = await reader.read()
        return int(answer[9:12] or 0), answer
    finally:
        writer.close()


# --- clients that mean no good, or can no better ----------------------------------------------------


async def slow_head(port: int, rng: random.Random) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for byte in b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 200:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.5)
    finally:
        writer.close()


async def abandon(port: int, request: bytes, seconds: float) -> None:
    """Send something, read nothing, and hang up after a while."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        await asyncio.sleep(seconds)
    finally:
        writer.transport.abort()


async def half_a_body(port: int, rng: random.Random) -> None:
    body = b'{"model": ' + b" " * rng.randrange(2**20)
    await abandon(port, post(body, length=60 * 2**20), rng.uniform(0, 20))


async def never_reads(port: int, rng: random.Random) -> None:
    await abandon(port, post(question(stream=True)), rng.uniform(1, 30))


def sends(make: Callable[[random.Random], bytes], *allowed: int) -> Callable[..., Awaitable[None]]:
    async def send(port: int, rng: random.Random) -> None:
        status, _ = await exchange(port, make(rng))
        if status not in (*allowed, 503):
            raise AssertionError(f"{make.__name__}: {status}")

    return send


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 4_000)) + b"\r\n\r\n"


def brackets(rng: random.Random) -> bytes:
    return post(b'{"model": "m", "messages": ' + b"[" * (8 * 2**20))


def wrong_items(rng: random.Random) -> bytes:
    return post(b'{"model": "m", "messages": [' + b"{}," * 2**21 + b"{}]}")


def wide_png(rng: random.Random) -> bytes:
    from attacks import png

    url = "data:image/png;base64," + base64.b64encode(png(10, 60_000)).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    return post(
        json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()
    )


def wrong_key(rng: random.Random) -> bytes:
    return post(question(), key="secres")


# --- the page ---------------------------------------------------------------------------------------


def get(path: str, *, origin: str = "") -> bytes:
    other = f"Origin: {origin}\r\n" if origin else ""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{other}Connection: close\r\n\r\n".encode()


def upload(path: str, content: bytes, *, name: str = "a.png", length: int | None = None) -> bytes:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n' % name.encode()
    body += b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--x--\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


async def place_of_upload(port: int) -> str:
    """Open the page; return where it takes files."""
    status, answer = await exchange(port, get("/"), seconds=120)
    found = re.search(rb"/_nicegui/client/[\w-]+/upload/\d+", answer)
    return found[0].decode() if status == 200 and found else ""


async def visit(port: int, content: bytes) -> tuple[int, bytes]:
    place = await place_of_upload(port)
    return await exchange(port, upload(place, content), seconds=120) if place else (-2, b"no page")


def uploads(
    content: Callable[[], bytes], *allowed: int, name: str
) -> Callable[..., Awaitable[None]]:
    async def send(port: int, rng: random.Random) -> None:
        place = await place_of_upload(port)
        status, _ = await exchange(port, upload(place or "/", content(), name=name))
        if status not in (*allowed, 503):
            raise AssertionError(f"{name}: {status}")

    return send


async def half_an_upload(port: int, rng: random.Random) -> None:
    place = await place_of_upload(port)
    begun = upload(place or "/", rng.randbytes(2**20), length=7 * 2**20)[: 2**20]
    await abandon(port, begun, rng.uniform(0, 20))


async def page_left(port: int, rng: random.Random) -> None:
    await abandon(port, get("/"), rng.uniform(0, 0.2))


def other_site(rng: random.Random) -> bytes:
    return get("/", origin="http://elsewhere.example")


def wide_file() -> bytes:
    from attacks import png

    return png(10, 60_000)


def nifti_of_extensions() -> bytes:
    from attacks import nifti, packed

    return packed(nifti(offset=2**31 - 2**20, extensions=2**22))


PAGE: dict[str, Callable[..., Awaitable[None]]] = {
    "slow head": slow_head,
    "half an upload": half_an_upload,
    "page left at once": page_left,
    "noise": sends(noise, 400, 0),
    "another site": sends(other_site, 403),
    "9 MiB of noise": uploads(lambda: bytes(9 * 2**20), 413, name="a.dcm"),
    "PNG of 10 x 60,000": uploads(wide_file, 200, name="a.png"),
    "NIfTI of far voxels": uploads(nifti_of_extensions, 200, name="a.nii.gz"),
}
HOSTILE: dict[str, Callable[..., Awaitable[None]]] = {
    "slow head": slow_head,
    "half a body": half_a_body,
    "never reads": never_reads,
    "noise": sends(noise, 400, 0),
    "8 MiB of brackets": sends(brackets, 400, 413),
    "6 MiB of wrong items": sends(wrong_items, 400, 413),
    "PNG of 10 x 60,000": sends(wide_png, 400, 413),
    "wrong key": sends(wrong_key, 401),
}


async def run(
    port: int, process: int, *, minutes: float, clients: int, seed: int, page: bool = False
) -> dict[str, Any]:
    end = time.monotonic() + 60 * minutes
    counts: collections.Counter[str] = collections.Counter()
    waits: list[float] = []
    health: list[float] = []
    memory: list[float] = []
    body, image = post(question()), png_file()
    attacks, pause = (PAGE, 10.0) if page else (HOSTILE, 0.5)

    async def honest() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                asked = visit(port, image) if page else exchange(port, body, seconds=120)
                status, answer = await asked
            except (OSError, TimeoutError) as error:
                status, answer = -1, str(error).encode()
            right = status == 200 and (page or b"It is CT." in answer)
            counts["answered" if right else f"not answered ({status})"] += 1
            waits.append(time.monotonic() - began)
            await asyncio.sleep(pause)

    async def hostile(name: str, rng: random.Random) -> None:
        while time.monotonic() < end:
            try:
                await attacks[name](port, rng)
            except (OSError, TimeoutError, ValueError):
                pass  # the server has hung up
            except AssertionError as error:
                counts[f"wrong: {error}"] += 1
            counts[f"attack: {name}"] += 1
            await asyncio.sleep(pause * rng.uniform(1, 4))

    async def watch() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            # The page has no such address: how fast it says so counts.
            status, _ = await exchange(port, get("/health"))
            health.append(
                time.monotonic() - began if status == (404 if page else 200) else float("inf")
            )
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            memory.append(pages * 4096 / 2**20)
            await asyncio.sleep(0.2)

    names = list(attacks)
    tasks = [honest() for _ in range(clients // 2)]
    tasks += [
        hostile(names[n % len(names)], random.Random(seed + n))
        for n in range(clients - clients // 2)
    ]
    await asyncio.gather(*tasks, watch())
    quarter = max(1, len(memory) // 4)
    peaks = [round(max(memory[at : at + quarter])) for at in range(0, len(memory), quarter)]
    return {
        "clients": clients,
        "minutes": minutes,
        "health, asked": len(health),
        "health, slowest s": max(health),
        "health, 99th percentile s": sorted(health)[int(len(health) * 0.99)],
        "honest, median s": sorted(waits)[len(waits) // 2],
        "honest, slowest s": max(waits),
        "MiB, peak by quarter": peaks,
        **counts,
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--clients", type=int, default=200)
    options.add_argument("--serve", action="store_true", help="the server alone")
    options.add_argument("--page", action="store_true", help="of the page, not the server")
    args = options.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    if args.serve:
        (serve_page if args.page else serve)()
        return
    command = [sys.executable, __file__, "--serve", *["--page"] * args.page]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = next(int(line) for line in server.stdout if line.strip().isdecimal())
            time.sleep(2)
            how = {"minutes": args.minutes, "clients": args.clients, "seed": args.seed}
            work = run(port, server.pid, page=args.page, **how)
            result = asyncio.run(work)
        finally:
            server.kill()
    show(result, as_json=args.json)


if __name__ == "__main__":
    main()
