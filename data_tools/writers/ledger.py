# SPDX-License-Identifier: Apache-2.0

"""The ledger: every answer that was paid for, and what each job has spent. One SQLite file for all jobs.

```
answers   key -> answer      asked once, by whichever job; key: `request.Request.key`
under_way key -> run, job    written before a request is sent, with the most that it can cost
spent     job                tokens and dollars over all runs; "lost": of requests whose answer never came
servers   address, model     what the server was found not to understand
shards, shard_keys           batches, written before anything of them leaves this machine
```

A run holds a file lock as long as it lives. What it left ``under_way`` when it was killed is found by the
next run, which counts it as spent at its most, because the server may bill it, and asks again.
Answers are on the disk before anyone sees them (``synchronous=FULL``, many in one transaction). Neither
prompts nor images nor keys are in the file.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_tools.writers.options import Budget
from gmai_xtuner.core.errors import CorpusError

VERSION = 1
SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL,
    refusal TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, dollars REAL NOT NULL,
    prompt_at_most INTEGER NOT NULL, completion_at_most INTEGER NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE averages (
    model TEXT PRIMARY KEY, answers INTEGER NOT NULL, prompt_share REAL NOT NULL,
    completion_share REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE under_way (
    key TEXT PRIMARY KEY, run TEXT NOT NULL, job TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, dollars REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE spent (
    job TEXT NOT NULL, lost INTEGER NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, dollars REAL NOT NULL,
    PRIMARY KEY (job, lost)
) WITHOUT ROWID;
CREATE TABLE servers (
    address TEXT NOT NULL, model TEXT NOT NULL, traits TEXT NOT NULL, PRIMARY KEY (address, model)
) WITHOUT ROWID;
CREATE TABLE shards (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, job TEXT NOT NULL, address TEXT NOT NULL, state TEXT NOT NULL,
    file_id TEXT, batch_id TEXT, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE shard_keys (
    key TEXT PRIMARY KEY, shard TEXT NOT NULL, prompt_at_most INTEGER NOT NULL,
    completion_at_most INTEGER NOT NULL, dollars REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX keys_of_shard ON shard_keys (shard);
"""


@dataclass(frozen=True, slots=True)
class Expense:
    """Tokens and dollars of one request or of many."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def row(self) -> tuple[int, int, float]:
        return self.prompt_tokens, self.completion_tokens, self.dollars

    def __add__(self, other: Expense) -> Expense:
        return Expense(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.dollars + other.dollars,
        )

    def __sub__(self, other: Expense) -> Expense:
        return Expense(
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
            self.dollars - other.dollars,
        )


class Account:
    """What a job has spent and what its requests under way can still cost.

    Args:
        budget: over all runs.
        spent: by earlier runs.
    """

    def __init__(self, budget: Budget, spent: Expense) -> None:
        self.budget = budget
        self.spent = spent
        self.reserved = Expense()

    def fits(self, at_most: Expense) -> bool:
        """Return whether the budget bears ``at_most`` besides what is spent and reserved."""
        total = self.spent + self.reserved + at_most
        dollars, tokens = self.budget.dollars, self.budget.tokens
        # Sums of many small floats: a billionth of a dollar is no overdraft.
        return (dollars is None or total.dollars <= dollars + 1e-9) and (
            tokens is None or total.tokens <= tokens
        )

    def reserve(self, at_most: Expense) -> None:
        self.reserved = self.reserved + at_most

    def settle(self, at_most: Expense, actual: Expense) -> None:
        """Replace what was reserved as ``at_most`` by what it has cost."""
        self.reserved = self.reserved - at_most
        self.spent = self.spent + actual


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the model, as the ledger keeps it.

    Args:
        text: of the first choice; empty if it has none.
        finish: the API's ``finish_reason``; ``"no choice"`` for an answer without choices.
        refusal: the API's own field for it.
        prompt_tokens, completion_tokens, dollars: as the server counted them.
        new: asked of the server by this run.
    """

    text: str
    finish: str = "stop"
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    new: bool = field(default=True, compare=False)

    @property
    def expense(self) -> Expense:
        return Expense(self.prompt_tokens, self.completion_tokens, self.dollars)


@dataclass(frozen=True, slots=True)
class Spent:
    """A job's expenses over all of its runs. ``lost`` are requests whose answer never came."""

    requests: int
    expense: Expense
    lost_requests: int
    lost: Expense

    @property
    def total(self) -> Expense:
        return self.expense + self.lost


@dataclass(frozen=True, slots=True)
class Shard:
    """A batch. ``state`` is ``prepared``, ``uploaded`` or ``submitted``."""

    id: str
    run: str
    job: str
    state: str
    file_id: str | None
    batch_id: str | None


class Ledger:
    """Open the ledger for one run of one job; a context manager.

    Methods may be called from any thread. Those that write do so in a transaction of their own, or in that of
    `transaction`.

    Args:
        path: of the file; made with its folders if it is not there. A local disk: SQLite's log for several
            processes doesn't work over a network.
        job: whose expenses these are; the same in every run, such as the corpus folder's path.
    """

    def __init__(self, path: Path, *, job: str) -> None:
        self.path, self.job = path, job
        self.run = uuid.uuid4().hex
        self._lock = threading.RLock()
        self._reader_lock = threading.Lock()
        self._depth = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._locks = path.with_name(path.name + ".runs")
            self._locks.mkdir(exist_ok=True)
            self._alive = self._lock_of(self.run)
            # Under one lock, or another run could bury this one between its file and the lock on it.
            with FileLock(str(path) + ".lock"):
                self._alive.acquire()
                self._connection = self._open()
                # Looking an answer up doesn't wait for another thread's write to reach the disk.
                self._reader = self._connect()
                self._bury_dead_runs()
        except (OSError, sqlite3.Error) as error:
            raise CorpusError(
                f"{path}: the ledger of answers can't be opened ({error}); name another file in writer.cache"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)

    def _open(self) -> sqlite3.Connection:
        connection = self._connect()
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute("COMMIT")
        if version not in (0, VERSION):
            connection.close()
            raise CorpusError(
                f"{self.path}: a ledger of version {version}, this program writes version {VERSION}; name "
                "another file in writer.cache"
            )
        return connection

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read what this run has written, and may not have finished writing."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def _settled_row(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        """Read what is on the disk, without waiting for a write."""
        with self._reader_lock:
            row: tuple[Any, ...] | None = self._reader.execute(query, values).fetchone()
        return row

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Put all writes within on the disk together, or none of them. May be nested."""
        with self._lock:
            if self._depth == 0:
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self._connection
            except BaseException:
                self._depth -= 1
                if self._depth == 0:
                    self._connection.execute("ROLLBACK")
                raise
            self._depth -= 1
            if self._depth == 0:
                self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file and say that this run is over."""
        with self._lock:
            self._connection.close()
            self._reader.close()
        self._alive.release()
        (self._locks / self.run).unlink(missing_ok=True)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Runs

    def _lock_of(self, run: str) -> FileLock:
        return FileLock(str(self._locks / run), thread_local=False)

    def is_alive(self, run: str) -> bool:
        """Return whether the process of a run is still there."""
        if run == self.run:
            return True
        lock = self._lock_of(run)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    def _bury_dead_runs(self) -> None:
        for (run,) in self._rows("SELECT DISTINCT run FROM under_way"):
            if not self.is_alive(run):
                self.bury(run)
        for file in self._locks.iterdir():
            if file.name != self.run and not self.is_alive(file.name):
                file.unlink(missing_ok=True)

    def bury(self, run: str) -> None:
        """Count what a dead run left under way as spent by its job, so that it may be asked again."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT job, count(*), sum(prompt_tokens), sum(completion_tokens), sum(dollars) "
                "FROM under_way WHERE run = ? GROUP BY job",
                (run,),
            ).fetchall()
            for job, requests, *cost in rows:
                self._add(job, Expense(*cost), lost=True, requests=requests)
            connection.execute("DELETE FROM under_way WHERE run = ?", (run,))

    # Answers

    def answer(self, key: str) -> Reply | None:
        """Return the answer to a request, whichever job paid for it."""
        row = self._settled_row(
            "SELECT text, finish, refusal, prompt_tokens, completion_tokens, dollars "
            "FROM answers WHERE key = ?",
            key,
        )
        return replace(Reply(*row), new=False) if row else None

    def under_way(self, key: str) -> bool:
        """Return whether a run that lives is waiting for this answer."""
        row = self._settled_row("SELECT run FROM under_way WHERE key = ?", key)
        return row is not None and self.is_alive(row[0])

    def claim(self, key: str, at_most: Expense) -> str | None:
        """Write down that this run is going to ask; return the run that is asking already, if any."""
        with self.transaction() as connection:
            row = connection.execute("SELECT run FROM under_way WHERE key = ?", (key,)).fetchone()
            if row:
                return str(row[0])
            connection.execute(
                "INSERT INTO under_way VALUES (?, ?, ?, ?, ?, ?)",
                (key, self.run, self.job, *at_most.row()),
            )
        return None

    def settle(self, key: str, model: str, reply: Reply, at_most: Expense) -> None:
        """Keep an answer, add its cost, and take its request from those under way."""
        prompt, completion = at_most.prompt_tokens, at_most.completion_tokens
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    model,
                    reply.text,
                    reply.finish,
                    reply.refusal,
                    *reply.expense.row(),
                    prompt,
                    completion,
                    time.time(),
                ),
            )
            shares = (
                reply.prompt_tokens / max(prompt, 1),
                reply.completion_tokens / max(completion, 1),
            )
            connection.execute(
                "INSERT INTO averages VALUES (?, 1, ?, ?) ON CONFLICT (model) DO UPDATE SET "
                "answers = answers + 1, prompt_share = prompt_share + excluded.prompt_share, "
                "completion_share = completion_share + excluded.completion_share",
                (model, *shares),
            )
            self._add(self.job, reply.expense, lost=False)
            connection.execute("DELETE FROM under_way WHERE key = ?", (key,))

    def release(self, key: str, lost: Expense | None) -> None:
        """Give a claim up without an answer; ``lost`` is what it may have cost all the same."""
        with self.transaction() as connection:
            if lost is not None:
                self._add(self.job, lost, lost=True)
            connection.execute("DELETE FROM under_way WHERE key = ? AND run = ?", (key, self.run))

    def _add(self, job: str, cost: Expense, *, lost: bool, requests: int = 1) -> None:
        self._connection.execute(
            "INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (job, lost) DO UPDATE SET "
            "requests = requests + excluded.requests, "
            "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
            "completion_tokens = completion_tokens + excluded.completion_tokens, "
            "dollars = dollars + excluded.dollars",
            (job, int(lost), requests, *cost.row()),
        )

    def spent(self) -> Spent:
        """Return what this job has spent over all runs."""
        rows = self._rows(
            "SELECT lost, requests, prompt_tokens, completion_tokens, dollars FROM spent WHERE job = ?",
            self.job,
        )
        found = {lost: (requests, Expense(*rest)) for lost, requests, *rest in rows}
        nothing = (0, Expense())
        return Spent(*found.get(0, nothing), *found.get(1, nothing))

    def shares(self, model: str) -> tuple[float, float] | None:
        """Return the mean share of their upper bounds that this model's prompts and answers have had."""
        rows = self._rows(
            "SELECT prompt_share / answers, completion_share / answers FROM averages WHERE model = ?",
            model,
        )
        return (rows[0][0], rows[0][1]) if rows else None

    # Servers

    def traits(self, address: str, model: str) -> dict[str, str]:
        """Return what is known of a server, such as ``{"structured": "text"}``."""
        rows = self._rows(
            "SELECT traits FROM servers WHERE address = ? AND model = ?", address, model
        )
        return json.loads(rows[0][0]) if rows else {}

    def remember(self, address: str, model: str, **traits: str) -> None:
        """Add to what is known of a server."""
        with self.transaction() as connection:
            known = self.traits(address, model) | traits
            connection.execute(
                "INSERT OR REPLACE INTO servers VALUES (?, ?, ?)",
                (address, model, json.dumps(known, sort_keys=True)),
            )

    # Batches

    def add_shard(self, shard: str, address: str, keys: Iterable[tuple[str, Expense]]) -> None:
        """Write a batch down with all of its keys before any of it leaves this machine."""
        with self.transaction() as connection:
            connection.execute(
                "INSERT INTO shards VALUES (?, ?, ?, ?, 'prepared', NULL, NULL, ?)",
                (shard, self.run, self.job, address, time.time()),
            )
            connection.executemany(
                "INSERT INTO shard_keys VALUES (?, ?, ?, ?, ?)",
                ((key, shard, *cost.row()) for key, cost in keys),
            )

    def set_shard(
        self, shard: str, state: str, *, file_id: str, batch_id: str | None = None
    ) -> None:
        with self.transaction() as connection:
            connection.execute(
                "UPDATE shards SET state = ?, file_id = ?, batch_id = ? WHERE id = ?",
                (state, file_id, batch_id, shard),
            )

    def drop_shard(self, shard: str) -> None:
        """Forget a batch that is collected or never was submitted: its open keys may be asked again."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM shard_keys WHERE shard = ?", (shard,))
            connection.execute("DELETE FROM shards WHERE id = ?", (shard,))

    def shards(self, address: str) -> list[Shard]:
        """Return the batches at a server that this job's runs have made and not yet collected."""
        rows = self._rows(
            "SELECT id, run, job, state, file_id, batch_id FROM shards WHERE address = ? AND job = ? "
            "ORDER BY at, id",
            address,
            self.job,
        )
        return [Shard(*row) for row in rows]

    def all_shards(self) -> set[str]:
        """Return the ids of every job's batches."""
        return {row[0] for row in self._rows("SELECT id FROM shards")}

    def in_shard(self, key: str) -> bool:
        """Return whether a batch that is not collected yet, of any job, asks this."""
        return bool(self._rows("SELECT 1 FROM shard_keys WHERE key = ?", key))

    def shard_keys(self, shard: str) -> dict[str, Expense]:
        """Return each key of a batch with the most that it can cost."""
        rows = self._rows(
            "SELECT key, prompt_at_most, completion_at_most, dollars FROM shard_keys WHERE shard = ?",
            shard,
        )
        return {key: Expense(*rest) for key, *rest in rows}

    def reserved_in_shards(self) -> Expense:
        """Return the most that this job's batches under way can cost."""
        (row,) = self._rows(
            "SELECT sum(prompt_at_most), sum(completion_at_most), sum(dollars) FROM shard_keys "
            "WHERE shard IN (SELECT id FROM shards WHERE job = ?)",
            self.job,
        )
        return Expense(row[0] or 0, row[1] or 0, row[2] or 0.0)
