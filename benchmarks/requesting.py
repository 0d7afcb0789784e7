# SPDX-License-Identifier: Apache-2.0

"""The request loop against a local server of fixed latency: how much of the ideal rate is reached.

The server runs in a process of its own, reads each request whole and answers after ``--latency``. With N
requests in flight nothing can be faster than N / latency. Each request carries an image; prompts, checks,
ledger and budget are as in a job.

With ``--scale`` several engines serve one address, and ``--deaths`` times the busiest is killed in the midst
of its answers. Counted are outcomes that are lost or differ from those of a run without a server, requests
that engines were asked again without having died over them, and what the ledger says was spent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from printing import parser, quiet_stdout, show

from data_tools import taxonomy
from data_tools.checks import CheckOptions
from data_tools.items import Item, SourceContext, Task
from data_tools.options import OpenAIOptions
from data_tools.records import Label, Provenance, Record
from data_tools.writers.asking import step
from data_tools.writers.ledger import Reply
from data_tools.writers.openai_writer import OpenAIWriter
from data_tools.writers.prompts import Prompts
from data_tools.writers.request import Request
from gmai_xtuner.core.agreements import Origin

CAPTION = (
    "A light microscopy image of one cell with a round nucleus. The cytoplasm is pale and finely granular, "
    "its border is sharp. The background is even and free of debris."
)
TOKENS = 590
CAPTIONS = tuple(
    json.dumps({"caption": f"{CAPTION} {more}".strip()}) for more in ("", "No other cell is seen.")
)
ENGINES = 8
SLOTS = 1024
LINGER = 0.25
"""Seconds after which an answer is surely read: until then it may be lost with its engine."""


def completion(caption: str) -> dict[str, Any]:
    """What a server answers."""
    message = {"role": "assistant", "content": json.dumps({"caption": caption})}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "local",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 500, "completion_tokens": 90, "total_tokens": TOKENS},
    }


def serve(latency: float, pipe: Connection) -> None:
    """Send the port, then serve; on any word send the processor time and end."""
    from aiohttp import web

    reply = json.dumps(completion(CAPTION)).encode()
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


class Tally:
    """What the engines write down in memory that outlives them. Of each item how often it was asked and how
    often it was under way when its engine died; of each engine the items that it is at (0: none)."""

    def __init__(self, items: int, context: multiprocessing.context.SpawnContext) -> None:
        self.asked, self.died = (context.RawArray("B", items) for _ in range(2))
        self.at = [context.RawArray("q", SLOTS) for _ in range(ENGINES)]
        self.answers = context.RawArray("q", ENGINES)
        self.harmed = context.Value("q", 0, lock=False)


def engine(number: int, tally: Tally, latency: float, listening: socket.socket) -> None:
    """Serve until killed."""
    from aiohttp import web

    keeper = os.getppid()
    slots, free = tally.at[number], list(range(SLOTS))
    replies = [json.dumps(completion(json.loads(one)["caption"])).encode() for one in CAPTIONS]

    def leave(slot: int) -> None:
        slots[slot] = 0
        free.append(slot)

    async def answer(request: web.Request) -> web.Response:
        item = int(re.search(rb"- field: (\d+)", await request.read())[1])  # type: ignore[index]
        slot = free.pop()
        slots[slot] = item + 1
        tally.asked[item] += 1
        loop = asyncio.get_running_loop()
        await asyncio.sleep(latency)
        tally.answers[number] += 1
        loop.call_later(LINGER, leave, slot)
        return web.Response(body=replies[item % len(replies)], content_type="application/json")

    async def main() -> None:
        application = web.Application(client_max_size=2**30)
        application.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        while os.getppid() == keeper:
            await asyncio.sleep(1)

    asyncio.run(main())


def keep_engines(tally: Tally, latency: float, deaths: int, pipe: Connection) -> None:
    """Send the port; kill the busiest engine at even shares of the answers, and start another."""
    import aiohttp.web  # noqa: F401  what an engine needs is there when it is forked

    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listening.setblocking(False)

    def start(number: int) -> int:
        tally.at[number][:] = [0] * SLOTS
        if not (child := os.fork()):
            engine(number, tally, latency, listening)
            os._exit(0)
        return child

    running = [start(number) for number in range(ENGINES)]
    pipe.send(listening.getsockname()[1])
    done = 0
    while not pipe.poll(0.02):
        if done < deaths and sum(tally.answers) >= (done + 1) * len(tally.asked) // (deaths + 1):
            busiest = max(range(ENGINES), key=lambda n: SLOTS - tally.at[n][:].count(0))
            os.kill(running[busiest], signal.SIGKILL)
            os.waitpid(running[busiest], 0)
            items = [item - 1 for item in tally.at[busiest] if item]
            for item in items:
                tally.died[item] += 1
            tally.harmed.value += bool(items)
            running[busiest] = start(busiest)
            done += 1
    for child in running:
        os.kill(child, signal.SIGKILL)
    pipe.send(done)


def told(item: str, conversation: Any) -> int:
    """A number of 128 bits that stands for an outcome; their sum doesn't depend on their order."""
    text = f"{item} {[(turn.speaker, turn.text) for turn in conversation or ()]}"
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def memory_megabytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def measure_scale(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ask for ``--scale`` conversations of engines that die, and once more without a server."""
    count, in_flight = arguments.scale, arguments.in_flight
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    tally = Tally(count, context)
    asked = (tally, arguments.latency, arguments.deaths, there)
    keeper = context.Process(target=keep_engines, args=asked, daemon=True)
    keeper.start()
    budget = TOKENS * count + arguments.deaths * in_flight * 2_000
    writer = make_writer(here.recv(), arguments, folder, budget)
    made = partial(tasks, count, arguments.images, arguments.side)
    total = decided = pending = 0
    memory = []
    start, processor = time.perf_counter(), processor_seconds()
    for outcome in writer.write(made()):
        total = (total + told(outcome.item.id, outcome.conversation)) % 2**128
        decided += outcome.conversation is not None
        pending += outcome.pending
        if decided % max(1, count // 10) == 0:
            memory.append(memory_megabytes())
    seconds, processor = time.perf_counter() - start, processor_seconds() - processor
    here.send("end")
    died = here.recv()
    keeper.join()
    alone = 0
    for task in made():
        questions = writer.questions(task)
        found = step(questions)
        while isinstance(found, Request):
            number = int(task.record.attributes["field"])
            found = step(questions, Reply(CAPTIONS[number % len(CAPTIONS)]))
        alone = (alone + told(found.item.id, found.conversation)) % 2**128
    with writer.ledger() as ledger:
        spent = ledger.spent()
    times = np.frombuffer(tally.asked, np.uint8).astype(np.int64)
    excused = 1 + np.frombuffer(tally.died, np.uint8).astype(np.int64)
    ideal = in_flight / arguments.latency
    return {
        "requests": count,
        "engines": ENGINES,
        "deaths": died,
        "deaths_in_the_midst_of_answers": tally.harmed.value,
        "requests_under_way_at_a_death": int(excused.sum() - count),
        "asked_again": int(times.sum() - count),
        "lost": count - decided,
        "undecided": pending,
        "asked_twice_without_a_death": int(np.maximum(times - excused, 0).sum()),
        "same_as_without_a_server": total == alone,
        "budget_tokens": budget,
        "spent_tokens": spent.tokens,
        "of_them_for_answers_that_never_came": spent.tokens - TOKENS * count,
        "seconds": round(seconds, 1),
        "requests_a_second": round(decided / seconds, 1),
        "ideal": ideal,
        "share_of_ideal": round(decided / seconds / ideal, 3),
        "processor_milliseconds_a_request": round(1000 * processor / count, 3),
        "memory_megabytes_at_tenths": memory,
        "memory_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


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


def make_writer(
    port: int, arguments: argparse.Namespace, folder: Path, budget: int
) -> OpenAIWriter:
    """The writer of a job that asks the server."""
    return OpenAIWriter(
        OpenAIOptions(
            model="local",
            base_url=f"http://127.0.0.1:{port}/v1",
            key_variable=None,
            in_flight=arguments.in_flight,
            cache=folder / "answers.sqlite",
            budget={"tokens": budget},
        ),
        Prompts(CheckOptions(), taxonomy.load(), grounded=True),
        folder=folder,
        job="benchmark",
        origins={("bench", "CC0"): Origin("the source bench")},
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=6400)
    options.add_argument("--in-flight", type=int, default=64)
    options.add_argument("--latency", type=float, default=0.2, help="seconds")
    options.add_argument("--images", type=int, default=200, help="different pictures")
    options.add_argument("--side", type=int, default=224, help="of a picture, pixels")
    options.add_argument("--scale", type=int, help="so many conversations, of engines that die")
    options.add_argument("--deaths", type=int, default=100, help="of engines, with --scale")
    arguments = options.parse_args()
    folder = arguments.work_dir / "requesting"
    shutil.rmtree(folder, ignore_errors=True)
    write_images(folder, arguments.images, arguments.side, arguments.seed)
    if arguments.scale:
        with quiet_stdout():
            result = measure_scale(arguments, folder)
        show(result, as_json=arguments.json)
        return
    sizes = [file.stat().st_size for file in (folder / "images").iterdir()]

    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(arguments.latency, there), daemon=True)
    server.start()
    with quiet_stdout():
        port = here.recv()
        writer = make_writer(port, arguments, folder, 10**12)
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
