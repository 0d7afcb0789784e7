# SPDX-License-Identifier: Apache-2.0

"""A run of the writer that is killed by the test, in a process of its own, with a store beside it."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

from tests.data_tools.writers.stand_ins import Prompts, tasks, writer


def results(folder: Path) -> dict[str, str]:
    """Item -> what was stored of its outcome."""
    with sqlite3.connect(folder / "store.sqlite") as store:
        return dict(store.execute("SELECT item, outcome FROM outcomes"))


def run(folder: Path, url: str, count: int) -> None:
    """Write what the store lacks; every tenth outcome is committed."""
    store = sqlite3.connect(folder / "store.sqlite")
    store.execute("CREATE TABLE IF NOT EXISTS outcomes (item TEXT PRIMARY KEY, outcome TEXT)")
    store.commit()
    done = {item for (item,) in store.execute("SELECT item FROM outcomes")}
    missing = (task for task in tasks(count, images=7) if task.item.id not in done)
    made = writer(folder, url, prompts=Prompts(images=True))
    for number, outcome in enumerate(made.write(missing)):
        if outcome.pending:
            continue
        conversation = [asdict(turn) for turn in outcome.conversation or ()]
        problems = [problem.reason for problem in outcome.problems]
        kept = json.dumps([conversation, problems, outcome.answer, outcome.attempts])
        store.execute("INSERT INTO outcomes VALUES (?, ?)", (outcome.item.id, kept))
        if number % 10 == 0:
            store.commit()
    store.commit()
