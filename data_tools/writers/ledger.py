# SPDX-License-Identifier: Apache-2.0

"""The ledger: every answer that was paid for, and what each job has spent. One SQLite file for all jobs.

Its tables are in ledger.sql. A run holds a file lock as long as it lives. What it left ``under_way`` when it
was killed is found by the next run, which counts it as spent at its most, because the server may bill it, and
asks again. Answers are on the disk before anyone sees them (``synchronous=FULL``, many in one transaction).
Neither prompts nor images nor keys are in the file.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from gmai_xtuner.core.errors import CorpusError

VERSION = 1
_SCHEMA = Path(__file__).with_suffix(".sql")


class Expense(NamedTuple):
    """Tokens and dollars of one request or of many."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: Expense, *, times: int = 1) -> Expense:
        return Expense(
            self.prompt_tokens + times * other.prompt_tokens,
            self.completion_tokens + times * other.completion_tokens,
            self.dollars + times * other.dollars,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the model, as the ledger keeps it.

    ``text`` is the first choice's; ``finish`` the API's ``finish_reason``, ``"no choice"`` without choices;
    ``refusal`` the API's own field; ``cost`` as the server counted it; ``new``: asked by this run.
    """

    text: str
    finish: str = "stop"
    refusal: str = ""
    cost: Expense = field(default_factory=Expense)
    new: bool = field(default=True, compare=False)


class Shard(NamedTuple):
    """A batch. ``state`` is ``prepared``, ``uploaded`` or ``submitted``; ``run`` has made it."""

    id: str
    run: str
    state: str
    file_id: str | None
    batch_id: str | None


class Ledger:
    """Open the ledger for one run of one job; a context manager. Methods may be called from any thread.

    Its file is made if need be, on a local disk: SQLite's log for several processes doesn't work over a
    network. ``job`` is whose expenses these are, the same in every run. A `CorpusError` if it can't be
    opened.
    """

    def __init__(self, path: Path, *, job: str) -> None:
        self.path, self.job = path, job
        self.run = uuid.uuid4().hex
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_folder = path.with_name(path.name + ".runs")
            self._lock_folder.mkdir(exist_ok=True)
            self._own_lock = self._lock_of(self.run)
            # Under one lock, or another run could bury this one between its file and the lock on it.
            with FileLock(str(path) + ".lock"):
                self._own_lock.acquire()
                self._connection = self._connect()
                self._prepare()
                # Looking an answer up doesn't wait for another thread's write to reach the disk.
                self._reader = self._connect()
                self._bury_dead_runs()
        except (OSError, sqlite3.Error) as error:
            raise CorpusError(
                f"{path}: the ledger of answers can't be opened ({error}); name another file in writer.cache"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)

    def _prepare(self) -> None:
        self._rows("PRAGMA journal_mode=WAL")
        self._rows("PRAGMA synchronous=FULL")
        with self.transaction():
            ((version,),) = self._rows("PRAGMA user_version")
            if version == 0:
                for statement in _SCHEMA.read_text(encoding="utf-8").split(";"):
                    self._rows(statement)
                self._rows(f"PRAGMA user_version={VERSION}")
        if version not in (0, VERSION):
            self._connection.close()
            raise CorpusError(
                f"{self.path}: a ledger of version {version}, this program writes version {VERSION}; name "
                "another file in writer.cache"
            )

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read or write; outside of `transaction` a statement is a transaction of its own."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Put all writes within on the disk together, or none of them. May be nested."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                yield

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file and say that this run is over."""
        with self._lock:
            self._connection.close()
            self._reader.close()
        self._own_lock.release()
        (self._lock_folder / self.run).unlink(missing_ok=True)

    def _lock_of(self, run: str) -> FileLock:
        return FileLock(str(self._lock_folder / run), thread_local=False)

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
        for file in self._lock_folder.iterdir():
            if file.name != self.run and not self.is_alive(file.name):
                file.unlink(missing_ok=True)

    def bury(self, run: str) -> None:
        """Count what a dead run left under way as spent by its job, so that it may be asked again."""
        with self.transaction():
            for job, requests, *cost in self._rows(
                "SELECT job, count(*), sum(prompt_tokens), sum(completion_tokens), sum(dollars) "
                "FROM under_way WHERE run = ? GROUP BY job",
                run,
            ):
                self._add(job, Expense(*cost), lost=True, requests=requests)
            self._rows("DELETE FROM under_way WHERE run = ?", run)

    def answer(self, key: str) -> Reply | None:
        """Return the answer to a request, whichever job paid for it."""
        row = self._reader.execute(
            "SELECT text, finish, refusal, prompt_tokens, completion_tokens, dollars "
            "FROM answers WHERE key = ?",
            (key,),
        ).fetchone()
        if row is None:
            return None
        text, finish, refusal, *cost = row
        return Reply(text, finish, refusal, Expense(*cost), new=False)

    def under_way(self, key: str) -> bool:
        """Return whether a batch that is not collected yet, or a run that lives, asks this."""
        if self._rows("SELECT 1 FROM shard_keys WHERE key = ?", key):
            return True
        rows = self._rows("SELECT run FROM under_way WHERE key = ?", key)
        return bool(rows) and self.is_alive(rows[0][0])

    def claim(self, key: str, at_most: Expense) -> str | None:
        """Write down that this run is going to ask; return the run that is asking already, if any."""
        with self.transaction():
            rows = self._rows("SELECT run FROM under_way WHERE key = ?", key)
            if not rows:
                values = (key, self.run, self.job, *at_most)
                self._rows("INSERT INTO under_way VALUES (?, ?, ?, ?, ?, ?)", *values)
        return str(rows[0][0]) if rows else None

    def settle(self, key: str, model: str, reply: Reply, at_most: Expense) -> None:
        """Keep an answer, add its cost, and take its request from those under way."""
        cost, bounds = reply.cost, at_most[:2]
        shares = (used / max(bound, 1) for used, bound in zip(cost[:2], bounds, strict=True))
        row = (key, model, reply.text, reply.finish, reply.refusal, *cost, *bounds, time.time())
        with self.transaction():
            self._rows(f"INSERT OR REPLACE INTO answers VALUES (?{', ?' * 10})", *row)
            self._rows(
                "INSERT INTO averages VALUES (?, 1, ?, ?) ON CONFLICT (model) DO UPDATE SET "
                "answers = answers + 1, prompt_share = prompt_share + excluded.prompt_share, "
                "completion_share = completion_share + excluded.completion_share",
                model,
                *shares,
            )
            self._add(self.job, cost, lost=False)
            self._rows("DELETE FROM under_way WHERE key = ?", key)

    def release(self, key: str, lost: Expense | None) -> None:
        """Give a claim up without an answer; ``lost`` is what it may have cost all the same."""
        with self.transaction():
            if lost is not None:
                self._add(self.job, lost, lost=True)
            self._rows("DELETE FROM under_way WHERE key = ? AND run = ?", key, self.run)

    def _add(self, job: str, cost: Expense, *, lost: bool, requests: int = 1) -> None:
        self._rows(
            "INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (job, lost) DO UPDATE SET "
            "requests = requests + excluded.requests, "
            "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
            "completion_tokens = completion_tokens + excluded.completion_tokens, "
            "dollars = dollars + excluded.dollars",
            *(job, int(lost), requests, *cost),
        )

    def spent(self) -> Expense:
        """Return what this job has spent over all runs, and may have spent on answers that never came."""
        query = "SELECT prompt_tokens, completion_tokens, dollars FROM spent WHERE job = ? ORDER BY lost"
        total = Expense()
        for row in self._rows(query, self.job):
            total = total.plus(Expense(*row))
        return total

    def shares(self, model: str) -> tuple[float, float] | None:
        """Return the mean share of their upper bounds that this model's prompts and answers have had."""
        rows = self._rows(
            "SELECT prompt_share / answers, completion_share / answers FROM averages WHERE model = ?",
            model,
        )
        return (rows[0][0], rows[0][1]) if rows else None

    def traits(self, address: str, model: str) -> dict[str, str]:
        """Return what is known of a server, such as ``{"structured": "text"}``."""
        query = "SELECT traits FROM servers WHERE address = ? AND model = ?"
        rows = self._rows(query, address, model)
        return json.loads(rows[0][0]) if rows else {}

    def remember(self, address: str, model: str, traits: dict[str, str]) -> None:
        """Add to what is known of a server."""
        self._rows(
            "INSERT INTO servers VALUES (?, ?, ?) ON CONFLICT (address, model) DO UPDATE SET "
            "traits = json_patch(traits, excluded.traits)",
            *(address, model, json.dumps(traits)),
        )

    def add_shard(self, shard: str, address: str, keys: Iterable[tuple[str, Expense]]) -> None:
        """Write a batch down with all of its keys before any of it leaves this machine."""
        with self.transaction():
            self._rows(
                "INSERT INTO shards VALUES (?, ?, ?, ?, 'prepared', NULL, NULL, ?)",
                *(shard, self.run, self.job, address, time.time()),
            )
            rows = ((key, shard, *cost) for key, cost in keys)
            self._connection.executemany("INSERT INTO shard_keys VALUES (?, ?, ?, ?, ?)", rows)

    def set_shard(
        self, shard: str, state: str, *, file_id: str, batch_id: str | None = None
    ) -> None:
        """Write down how far a batch has come."""
        query = "UPDATE shards SET state = ?, file_id = ?, batch_id = ? WHERE id = ?"
        self._rows(query, state, file_id, batch_id, shard)

    def drop_shard(self, shard: str) -> None:
        """Forget a batch that is collected or never was submitted: its open keys may be asked again."""
        with self.transaction():
            self._rows("DELETE FROM shard_keys WHERE shard = ?", shard)
            self._rows("DELETE FROM shards WHERE id = ?", shard)

    def shards(self, address: str) -> list[Shard]:
        """Return the batches at a server that this job's runs have made and not yet collected."""
        query = (
            "SELECT id, run, state, file_id, batch_id FROM shards WHERE address = ? AND job = ? "
            "ORDER BY at, id"
        )
        return [Shard(*row) for row in self._rows(query, address, self.job)]

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
