# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import multiprocessing
import random
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from data_tools.writers.asking import step
from data_tools.writers.request import Request, Traits
from tests.api_server import ApiServer, completion, error, name_of, user_text
from tests.data_tools.writers import killed_run
from tests.data_tools.writers.stand_ins import Prompts, tasks, write_images, writer

pytestmark = pytest.mark.slow

KILLS = 20
TASKS = 900


def script(body: dict, number: int):
    """By the text alone, so that every run of the job sees the same: wrong answers, and some faults."""
    text = user_text(body)
    item = int(text.split()[0].removeprefix("item").rstrip("."))
    if item % 11 == 3:
        return completion('{"answer": "wrong"}')  # never right
    if item % 7 == 2 and "Not again" not in text:
        return completion('{"answer": "wrong"}')
    if item % 13 == 4 and number == 0:
        return error(500, "once")
    return None


def names(folder: Path, url: str) -> dict[str, str]:
    """The server's name of every payload that was answered -> the ledger's."""
    found, traits = {}, Traits("json_schema", "max_completion_tokens")
    made = writer(folder, url, prompts=Prompts(images=True), job="look")
    with made.ledger() as ledger:
        for task in tasks(TASKS, images=7):
            questions = made.questions(task)
            asked = step(questions)
            while isinstance(asked, Request):
                found[name_of(asked.body(traits)) + str(len(found))] = asked.key
                reply = ledger.answer(asked.key)
                assert reply is not None
                asked = step(questions, reply)
    return found


@pytest.mark.slow
def test_killed_at_twenty_moments_and_resumed(tmp_path):
    """The outcomes of an undisturbed run, and nothing asked twice but what was in flight at a kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["openai", "aiohttp", "httpx2", "tests.data_tools.writers.killed_run"]
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_images(whole, 7)
    write_images(broken, 7)
    with ApiServer(script, latency=0.04) as server:
        process = context.Process(target=killed_run.run, args=(whole, server.url, TASKS))
        process.start()
        process.join()
        assert process.exitcode == 0
    expected = killed_run.results(whole)
    assert len(expected) == TASKS

    rng = random.Random(4)
    in_flight: Counter[str] = Counter()
    worked = 0
    with ApiServer(script, latency=0.04) as server:
        for _ in range(KILLS):
            before = len(server.requests)
            process = context.Process(target=killed_run.run, args=(broken, server.url, TASKS))
            process.start()
            end = time.monotonic() + 20
            # From its first request on, so that each kill meets it at work.
            while len(server.requests) == before and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            with sqlite3.connect(broken / "cache" / "answers.sqlite") as ledger:
                rows = [key for (key,) in ledger.execute("SELECT key FROM under_way")]
            assert len(rows) <= 8 + 8 // 4 + 1
            worked += bool(rows)
            in_flight.update(rows)
        assert worked >= KILLS * 3 // 4
        left = TASKS - len(killed_run.results(broken))
        assert 0 < left < TASKS  # the kills came in the midst of it
        process = context.Process(target=killed_run.run, args=(broken, server.url, TASKS))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert killed_run.results(broken) == expected

    asked: Counter[str] = Counter()
    known = names(broken, server.url)
    # Attempts with the same text are one name at the server: allow it what its attempts may have had.
    allowed: Counter[str] = Counter()
    for name, key in known.items():
        text = name[:64]
        allowed[text] += 1 + in_flight[key]
    for body in server.requests:
        number = int(user_text(body).split()[0].removeprefix("item").rstrip("."))
        asked[name_of(body)] += 1
        if number % 13 == 4 and asked[name_of(body)] == 1:
            allowed[name_of(body)] += 1  # the server's own fault, once
    assert set(asked) == set(allowed)
    too_often = {
        name: (count, allowed[name]) for name, count in asked.items() if count > allowed[name]
    }
    assert too_often == {}
    assert sum(asked.values()) > len(known)  # some was asked again, or the kills were harmless
