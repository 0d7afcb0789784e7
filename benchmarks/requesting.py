# SPDX-License-Identifier: Apache-2.0

"""The request loop against a local server of fixed latency: how much of the ideal rate is reached.

The server runs in a process of its own, reads each request whole and answers after ``--latency``. With N
requests in flight nothing can be faster than N / latency. Each request carries an image; prompts, checks,
ledger and budget are as in a job.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image
from printing import parser, quiet_stdout, show

from data_tools import taxonomy
from data_tools.checks import CheckOptions
from data_tools.items import Item, SourceContext
from data_tools.options import OpenAIOptions
from data_tools.records import Label, Provenance, Record
from data_tools.writers.asking import Task
from data_tools.writers.openai_writer import OpenAIWriter
from data_tools.writers.prompts import Prompts
from gmai_xtuner.core.agreements import Origin

CAPTION = (
    "A light microscopy image of one cell with a round nucleus. The cytoplasm is pale and finely granular, "
    "its border is sharp. The background is even and free of debris."
)


def serve(latency: float, pipe: Connection) -> None:
    """Send the port, then serve; on any word send the processor time and end."""
    from aiohttp import web

    reply = json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "local",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": json.dumps({"caption": CAPTION})},
                }
            ],
            "usage": {"prompt_tokens": 500, "completion_tokens": 90, "total_tokens": 590},
        }
    ).encode()
    now = most = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await request.read()
        await asyncio.sleep(latency)
        now -= 1
        return web.Response(body=reply, content_type="application/json")

    async def main() -> None:
        application = web.Application(client_max_size=2**30)
        application.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        pipe.send((processor_seconds(), most))

    asyncio.run(main())


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write_images(folder: Path, count: int, side: int, seed: int) -> None:
    """Smooth images, as medical ones are, in JPEG."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = rng.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{number}.jpg", quality=90)


def tasks(count: int, images: int, side: int) -> Iterator[Task]:
    context = SourceContext("bench", "Benchmark", ("cell",))
    provenance = Provenance("bench", "Benchmark", "CC0", "", "x.jpg", "0" * 64, {}, "bench/x")
    for number in range(count):
        record = Record(
            f"record{number}",
            f"images/{number % images}.jpg",
            side,
            side,
            "Microscopy",
            "Hematology",
            None,
            "2D classification",
            (Label("cell"),),
            {"field": str(number)},  # a request of its own for each
            provenance,
        )
        yield Task(Item(f"record{number}#caption", "caption", "en"), record, context)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=6400)
    options.add_argument("--in-flight", type=int, default=64)
    options.add_argument("--latency", type=float, default=0.2, help="seconds")
    options.add_argument("--images", type=int, default=200, help="different pictures")
    options.add_argument("--side", type=int, default=224, help="of a picture, pixels")
    arguments = options.parse_args()
    folder = arguments.work_dir / "requesting"
    shutil.rmtree(folder, ignore_errors=True)
    write_images(folder, arguments.images, arguments.side, arguments.seed)
    sizes = [file.stat().st_size for file in (folder / "images").iterdir()]

    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(arguments.latency, there), daemon=True)
    server.start()
    with quiet_stdout():
        port = here.recv()
        writer = OpenAIWriter(
            OpenAIOptions(
                model="local",
                base_url=f"http://127.0.0.1:{port}/v1",
                key_variable=None,
                in_flight=arguments.in_flight,
                cache=folder / "answers.sqlite",
                budget={"tokens": 10**12},
            ),
            Prompts(CheckOptions(), taxonomy.load(), grounded=True),
            folder=folder,
            job="benchmark",
            origins={("bench", "CC0"): Origin("the source bench")},
        )
        # Libraries are imported and connections made before the clock starts.
        warm = arguments.in_flight * 5
        outcomes = writer.write(tasks(arguments.requests, arguments.images, arguments.side))
        for _ in range(warm):
            next(outcomes)
        start, processor = time.perf_counter(), processor_seconds()
        done = sum(outcome.conversation is not None for outcome in outcomes)
        seconds, processor = time.perf_counter() - start, processor_seconds() - processor
        here.send("end")
        server_processor, most = here.recv()
        server.join()

        start = time.perf_counter()
        again = writer.write(tasks(arguments.requests, arguments.images, arguments.side))
        cached = sum(outcome.cached for outcome in again)
        cached_seconds = time.perf_counter() - start
    ideal = arguments.in_flight / arguments.latency
    rate = done / seconds
    show(
        {
            "requests": done,
            "in_flight": arguments.in_flight,
            "most_in_flight_at_server": most,
            "latency_seconds": arguments.latency,
            "picture_kilobytes": round(sum(sizes) / len(sizes) / 1000, 1),
            "seconds": round(seconds, 2),
            "requests_a_second": round(rate, 1),
            "ideal": ideal,
            "share_of_ideal": round(rate / ideal, 3),
            "processor_share_of_writer": round(processor / seconds, 3),
            "processor_milliseconds_a_request": round(1000 * processor / done, 3),
            "processor_seconds_of_server": round(server_processor, 2),
            "memory_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "from_the_ledger_a_second": round(cached / cached_seconds),
        },
        as_json=arguments.json,
    )


if __name__ == "__main__":
    sys.exit(main())
