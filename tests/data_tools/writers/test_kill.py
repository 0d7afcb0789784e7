# SPDX-License-Identifier: Apache-2.0

"""Runs of the writer that are killed and go on. This file is also such a run: ``FOLDER URL``."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from data_tools.writers.asking import step
from data_tools.writers.request import Request, Traits
from tests.api_server import ApiServer, completion, error, name_of, user_text
from tests.data_tools.writers.stand_ins import Prompts, tasks, write_images, writer

TASKS = 300
MOMENTS = (
    lambda new: len(new) >= 1,  # the first request is under way
    lambda new: len(new) >= 30,  # answers are in the ledger, and the store lacks the last of them
    lambda new: any("Not again" in text for text in new[20:]),  # a wrong answer is asked again
    lambda new: new.count("item186") == 1,  # the server's own fault
)
"""Texts of the requests since the run began -> whether it is to be killed."""


def run(folder: Path, url: str) -> None:
    """Write what the store lacks; every tenth outcome is committed."""
    store = sqlite3.connect(folder / "store.sqlite")
    store.execute("CREATE TABLE IF NOT EXISTS outcomes (item TEXT PRIMARY KEY, outcome TEXT)")
    store.commit()
    done = results(folder)
    missing = (task for task in tasks(TASKS, images=7) if task.item.id not in done)
    for number, outcome in enumerate(
        writer(folder, url, prompts=Prompts(images=True)).write(missing)
    ):
        if not outcome.pending:
            conversation = [asdict(turn) for turn in outcome.conversation or ()]
            problems = [problem.reason for problem in outcome.problems]
            kept = json.dumps([conversation, problems, outcome.answer, outcome.attempts])
            store.execute("INSERT INTO outcomes VALUES (?, ?)", (outcome.item.id, kept))
        if number % 10 == 0:
            store.commit()
    store.commit()


def results(folder: Path) -> dict[str, str]:
    """Item -> what was stored of its outcome."""
    with sqlite3.connect(folder / "store.sqlite") as store:
        return dict(store.execute("SELECT item, outcome FROM outcomes"))


def number_of(body: dict) -> int:
    return int(user_text(body).split()[0].removeprefix("item").rstrip("."))


def script(body: dict, number: int):
    """By the text alone, so that every run of the job sees the same: wrong answers, and some faults."""
    item = number_of(body)
    if item % 11 == 3:
        return completion('{"answer": "wrong"}')  # never right
    if item % 7 == 2 and "Not again" not in user_text(body):
        return completion('{"answer": "wrong"}')
    if item % 13 == 4 and number == 0:
        return error(500, "once")
    return None


def keys_of_texts(folder: Path, url: str) -> list[tuple[str, str]]:
    """The server's name of every payload that was answered, and the ledger's."""
    found, traits = [], Traits("json_schema", "max_completion_tokens")
    made = writer(folder, url, prompts=Prompts(images=True), job="look")
    with made.ledger() as ledger:
        for task in tasks(TASKS, images=7):
            questions = made.questions(task)
            asked = step(questions)
            while isinstance(asked, Request):
                found.append((name_of(asked.body(traits)), asked.key))
                reply = ledger.answer(asked.key)
                assert reply is not None
                asked = step(questions, reply)
    return found


def start(folder: Path, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", __name__, str(folder), url])


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """The outcomes of an undisturbed run, and nothing asked twice but what was in flight at a kill."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        write_images(folder, 7)
    with ApiServer(script, latency=0.02) as server:
        assert start(whole, server.url).wait() == 0
    expected = results(whole)
    assert len(expected) == TASKS

    in_flight: Counter[str] = Counter()
    worked = 0
    with ApiServer(script, latency=0.02) as server:
        for reached in MOMENTS:
            before = len(server.requests)
            process = start(broken, server.url)
            while not reached([user_text(body) for body in server.requests[before:]]):
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.005)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            with sqlite3.connect(broken / "cache" / "answers.sqlite") as ledger:
                rows = [key for (key,) in ledger.execute("SELECT key FROM under_way")]
            assert len(rows) <= 8 + 8 // 4 + 1
            worked += bool(rows)
            in_flight.update(rows)
        assert worked >= len(MOMENTS) - 1
        assert 0 < len(results(broken)) < TASKS  # the kills came in the midst of it
        assert start(broken, server.url).wait() == 0
    assert results(broken) == expected

    known = keys_of_texts(broken, server.url)
    # Attempts with the same text are one name at the server: allow it what its attempts may have had.
    allowed: Counter[str] = Counter()
    for name, key in known:
        allowed[name] += 1 + in_flight[key]
    asked = Counter(map(name_of, server.requests))
    for name in {name_of(body) for body in server.requests if number_of(body) % 13 == 4}:
        allowed[name] += 1  # the server's own fault, once
    assert set(asked) == set(allowed)
    assert {name: count for name, count in asked.items() if count > allowed[name]} == {}
    assert asked.total() > len(known)  # some was asked again, or the kills were harmless


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
