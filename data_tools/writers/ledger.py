"""The ledger: every answer that was paid for, and what each job has spent. One SQLite file for all jobs.

```
answers   key -> answer      asked once, by whichever job; key: `payload.Payload.key`
under_way key -> run, job    written before a request is sent, with the most that it can cost
spent     job                tokens and dollars over all runs; "lost": of requests whose answer never came
servers   address, model     what the server was found not to understand
shards, shard_keys           batches, written before anything of them leaves this machine
```

A run holds a file lock as long as it lives. What it left ``under_way`` when it was killed is found by the
next run, which counts it as spent at its most, because the server may bill it, and asks again.
Answers are on the disk before anyone sees them (``synchronous=FULL``, many in one transaction). Neither
prompts nor pictures nor keys are in the file.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from data_tools.writers.outcome import Reply
from data_tools.writers.prices import Expense
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
    """A batch. ``state`` is ``prepared``, ``uploaded``, ``submitted``."""

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
        path: of the file; made with its folders if it isn't there. A local disk: SQLite's log for several
            processes doesn't work over a network.
        job: whose expenses these are; the same in every run, such as the corpus folder's path.
    """

    def __init__(self, path: Path, *, job: str) -> None:
        self.path, self.job = path, job
        self.run = uuid.uuid4().hex
        self._lock = threading.RLock()
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
                self._reader = sqlite3.connect(
                    path, timeout=60, isolation_level=None, check_same_thread=False
                )
                self._reader_lock = threading.Lock()
                self._bury()
        except (OSError, sqlite3.Error) as error:
            raise CorpusError(
                f"{path}: the ledger of answers can't be opened ({error}); name another file in writer.cache"
            ) from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=60, isolation_level=None, check_same_thread=False
        )
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

    def _lock_of(self, run: str) -> FileLock:
        return FileLock(str(self._locks / run), thread_local=False)

    def _bury(self) -> None:
        """Count what dead runs left under way as spent, so that it may be asked again."""
        with self.transaction() as connection:
            runs = connection.execute("SELECT DISTINCT run FROM under_way").fetchall()
        for (run,) in runs:
            if not self.lives(run):
                self.bury(run)
        for file in self._locks.iterdir():
            if file.name != self.run and not self.lives(file.name):
                file.unlink(missing_ok=True)

    def lives(self, run: str) -> bool:
        """Whether the process of this run is still there."""
        if run == self.run:
            return True
        lock = self._lock_of(run)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    def bury(self, run: str) -> None:
        """What a dead run left under way is counted as spent, for its job."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT job, count(*), sum(prompt_tokens), sum(completion_tokens), sum(dollars) "
                "FROM under_way WHERE run = ? GROUP BY job",
                (run,),
            ).fetchall()
            for job, requests, prompt_tokens, completion_tokens, dollars in rows:
                expense = Expense(prompt_tokens, completion_tokens, dollars)
                self._add(job, expense, lost=True, requests=requests)
            connection.execute("DELETE FROM under_way WHERE run = ?", (run,))

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All within is on the disk when it is left, or nothing of it. May be nested."""
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

    def answer(self, key: str) -> Reply | None:
        """The answer to this payload, whichever job paid for it."""
        with self._reader_lock:
            row = self._reader.execute(
                "SELECT text, finish, refusal, prompt_tokens, completion_tokens, dollars "
                "FROM answers WHERE key = ?",
                (key,),
            ).fetchone()
        if row is None:
            return None
        text, finish, refusal, prompt_tokens, completion_tokens, dollars = row
        return Reply(text, finish, refusal, prompt_tokens, completion_tokens, dollars, new=False)

    def under_way(self, key: str) -> bool:
        """Whether a run that lives is waiting for this answer."""
        with self._reader_lock:
            row = self._reader.execute("SELECT run FROM under_way WHERE key = ?", (key,)).fetchone()
        return row is not None and self.lives(row[0])

    def claim(self, key: str, at_most: Expense) -> str | None:
        """Write down that this run is going to ask; None, or the run that is asking already."""
        with self.transaction() as connection:
            row = connection.execute("SELECT run FROM under_way WHERE key = ?", (key,)).fetchone()
            if row:
                return str(row[0])
            connection.execute(
                "INSERT INTO under_way VALUES (?, ?, ?, ?, ?, ?)",
                (
                    key,
                    self.run,
                    self.job,
                    at_most.prompt_tokens,
                    at_most.completion_tokens,
                    at_most.dollars,
                ),
            )
        return None

    def settle(self, key: str, model: str, reply: Reply, at_most: Expense) -> None:
        """The answer has come: keep it, add its cost, it's no longer under way."""
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    model,
                    reply.text,
                    reply.finish,
                    reply.refusal,
                    reply.prompt_tokens,
                    reply.completion_tokens,
                    reply.dollars,
                    at_most.prompt_tokens,
                    at_most.completion_tokens,
                    time.time(),
                ),
            )
            connection.execute(
                "INSERT INTO averages VALUES (?, 1, ?, ?) ON CONFLICT (model) DO UPDATE SET "
                "answers = answers + 1, prompt_share = prompt_share + excluded.prompt_share, "
                "completion_share = completion_share + excluded.completion_share",
                (
                    model,
                    reply.prompt_tokens / max(at_most.prompt_tokens, 1),
                    reply.completion_tokens / max(at_most.completion_tokens, 1),
                ),
            )
            cost = Expense(reply.prompt_tokens, reply.completion_tokens, reply.dollars)
            self._add(self.job, cost, lost=False)
            connection.execute("DELETE FROM under_way WHERE key = ?", (key,))

    def release(self, key: str, lost: Expense | None) -> None:
        """No answer came. ``lost``: what it may have cost all the same; None: nothing."""
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
            (job, int(lost), requests, cost.prompt_tokens, cost.completion_tokens, cost.dollars),
        )

    def spent(self) -> Spent:
        """By this job, over all runs."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT lost, requests, prompt_tokens, completion_tokens, dollars FROM spent WHERE job = ?",
                (self.job,),
            ).fetchall()
        found = {lost: (requests, Expense(*rest)) for lost, requests, *rest in rows}
        nothing = (0, Expense())
        return Spent(*found.get(0, nothing), *found.get(1, nothing))

    def shares(self, model: str) -> tuple[float, float] | None:
        """Mean share of the upper bounds that this model's prompts and answers have had; None: unknown."""
        with self._lock:
            row = self._connection.execute(
                "SELECT prompt_share / answers, completion_share / answers FROM averages WHERE model = ?",
                (model,),
            ).fetchone()
        return (row[0], row[1]) if row else None

    def traits(self, address: str, model: str) -> dict[str, str]:
        """What is known of a server, such as ``{"structured": "text"}``."""
        with self._lock:
            row = self._connection.execute(
                "SELECT traits FROM servers WHERE address = ? AND model = ?", (address, model)
            ).fetchone()
        return json.loads(row[0]) if row else {}

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
                (
                    (key, shard, cost.prompt_tokens, cost.completion_tokens, cost.dollars)
                    for key, cost in keys
                ),
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
        """It is collected, or it never was submitted: its keys without an answer may be asked again."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM shard_keys WHERE shard = ?", (shard,))
            connection.execute("DELETE FROM shards WHERE id = ?", (shard,))

    def shards(self, address: str) -> list[Shard]:
        """Batches at this server that this job's runs have made and not yet collected."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT id, run, job, state, file_id, batch_id FROM shards WHERE address = ? AND job = ? "
                "ORDER BY at, id",
                (address, self.job),
            ).fetchall()
        return [Shard(*row) for row in rows]

    def all_shards(self) -> set[str]:
        """Ids of every job's."""
        with self._lock:
            return {row[0] for row in self._connection.execute("SELECT id FROM shards")}

    def in_shard(self, key: str) -> bool:
        """Whether a batch that isn't collected yet, of any job, asks this."""
        with self._lock:
            row = self._connection.execute(
                "SELECT 1 FROM shard_keys WHERE key = ?", (key,)
            ).fetchone()
        return row is not None

    def shard_keys(self, shard: str) -> dict[str, Expense]:
        """Key -> the most that it can cost."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT key, prompt_at_most, completion_at_most, dollars FROM shard_keys WHERE shard = ?",
                (shard,),
            ).fetchall()
        return {key: Expense(*rest) for key, *rest in rows}

    def reserved_in_shards(self) -> Expense:
        """The most that this job's batches under way can cost."""
        with self._lock:
            row = self._connection.execute(
                "SELECT sum(prompt_at_most), sum(completion_at_most), sum(dollars) FROM shard_keys "
                "WHERE shard IN (SELECT id FROM shards WHERE job = ?)",
                (self.job,),
            ).fetchone()
        return Expense(row[0] or 0, row[1] or 0, row[2] or 0.0)

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
