# SPDX-License-Identifier: Apache-2.0

"""The state of a job: one SQLite database, written by one process, consistent after any stop; see store.sql.

A unit is done if its row is there. A record's items are done if ``corpus.made``, a hash of all that they were
made with, is that of the run.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from data_tools.items import Conversation, Item, Problem
from data_tools.records import Drop, Record
from gmai_xtuner.core.errors import CorpusError

if TYPE_CHECKING:
    from data_tools.standardise import UnitResult
    from data_tools.writers.asking import Outcome

VERSION = 2
MAX_ITEMS = 4096
"""Conversations of one record."""

ACCEPTED, REJECTED, PENDING = 0, 1, 2

_SCHEMA = Path(__file__).with_suffix(".sql")
_ARRANGE = Path(__file__).with_name("arrange.sql")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The label names of a source's records, sorted, and how many of ``count`` records have each.

    ``one_class``: each record has exactly one label, of the image as a whole.
    """

    names: tuple[str, ...]
    one_class: bool
    records: Mapping[str, int]
    count: int

    @classmethod
    def of(cls, records: Iterable[Record]) -> Vocabulary:
        """Collect it."""
        found: Counter[str] = Counter()
        one_class, count = True, 0
        for record in records:
            count += 1
            found.update({label.name for label in record.labels})
            one_class &= len(record.labels) == 1 and record.labels[0].box is None
        return cls(tuple(sorted(found)), one_class, found, count)


encode = msgspec.json.Encoder().encode
_decode_record = msgspec.json.Decoder(Record).decode
_decode_conversation = msgspec.json.Decoder(Conversation).decode
_decode_problems = msgspec.json.Decoder(tuple[Problem, ...]).decode
_decode_files = msgspec.json.Decoder(list[str]).decode


class StoredRecord(msgspec.Struct):
    """A record, as JSON in ``body``, on its way between the workers and the store.

    ``id`` may differ from the one in ``body`` where two had the same; ``duplicate_key`` is equal for the same
    pixels and labels; ``row`` is of the store, 0 before it is stored.
    """

    id: str
    body: bytes
    duplicate_key: bytes = b""
    image: str = ""
    row: int = 0

    @property
    def record(self) -> Record:
        record = _decode_record(self.body)
        return record if record.id == self.id else replace(record, id=self.id)


class ItemRow(msgspec.Struct):
    """A planned conversation as a row of ``items``; but for one that a model is to write, it is written.

    ``id`` is the record's row x `MAX_ITEMS` + its place in the record, ``suffix`` the item's id without the
    record's. ``key`` hashes everything that a model's answer depends on; None for the template writer.
    Conversation and problems are JSON, prompt and answer a model's.
    """

    id: int
    state: int
    suffix: str
    form: str
    language: str
    kind: str
    focus: int | None
    seed: int
    key: bytes | None = None
    conversation: bytes | None = None
    problems: bytes | None = None
    prompt: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation as the store has it, accepted or not, with all that led to it.

    ``conversation`` is None if the writer gave none that can be read; ``problems`` say why it was rejected;
    ``prompt`` and ``answer`` are a model's, empty for a template's; ``row`` is the store's.
    """

    item: Item
    record: Record
    conversation: Conversation | None
    problems: tuple[Problem, ...] = ()
    prompt: str = ""
    answer: str = ""
    row: int = 0


class FunnelRow(NamedTuple):
    """``count`` came through a stage of a source (``reason`` empty) or were left out for a reason.

    ``read`` counts samples, ``clean`` regions, ``record`` records, ``write`` conversations that were to be
    made (with the reason ``pending`` those that a later run makes), ``check`` conversations.
    """

    source: str
    stage: str
    reason: str
    count: int  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Usage:
    """What all runs of the job together have used; ``seconds`` of wall clock."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    seconds: float = 0.0


_ITEMS_IN_STATE = (
    f"FROM items i CROSS JOIN corpus c ON c.record = i.id / {MAX_ITEMS} "
    "WHERE c.source = :source AND i.state = "
)
_LOST = f"""
SELECT stage, reason, count(*) FROM corpus_drops WHERE source = :source GROUP BY 1, 2
UNION ALL SELECT stage, reason, count(*) FROM drops WHERE unit = -:source GROUP BY 1, 2
UNION ALL SELECT 'check', coalesce(json_extract(CAST(i.problems AS TEXT), '$[0].reason'), 'no conversation'),
    count(*) {_ITEMS_IN_STATE}{REJECTED} GROUP BY 2
UNION ALL SELECT 'write', 'pending', count(*) {_ITEMS_IN_STATE}{PENDING} GROUP BY 1
ORDER BY 3 DESC, 2
"""
_CAME_THROUGH = """
SELECT total(samples), total(regions), (SELECT count(*) FROM corpus WHERE source = :source),
    (SELECT total(items) FROM corpus WHERE source = :source)
FROM units WHERE source = :source AND place IS NOT NULL
"""


class Store:
    """The database in a file, made if need be; a `CorpusError` for a damaged one, or one of another kind."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._since = time.monotonic()
        self._depth = 0
        self._chosen: set[str] = set()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA cache_size = -32768")
            self._db.execute("PRAGMA temp_store = FILE")
            # Pages that change with every chunk are copied out of the log seldom: every 32 MiB of it.
            self._db.execute("PRAGMA wal_autocheckpoint = 8192")
            self._db.execute("PRAGMA journal_size_limit = 67108864")
            version = self._value("PRAGMA user_version")
            if version == 0:
                if self._value("SELECT count(*) FROM sqlite_master"):
                    raise CorpusError(f"{path} is not a database of this tool; move it away.")
                schema = _SCHEMA.read_text(encoding="utf-8")
                self._db.executescript(f"BEGIN;{schema}PRAGMA user_version = {VERSION};COMMIT;")
                version = VERSION
        except sqlite3.DatabaseError as error:
            raise CorpusError(
                f"{path}, the state of this job, can't be opened ({error}). Free disk space and check the "
                "rights, or delete the file to begin anew: answers stay in the writer's cache."
            ) from error
        if version != VERSION:
            raise CorpusError(
                f"{path} was written by another version of this tool (state {version}, expected {VERSION}). "
                "Delete it to begin anew: answers stay in the writer's cache."
            )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all or nothing; a transaction inside another belongs to it.

        Each adds the wall clock since the one before to the job's seconds (`Usage.seconds`).
        """
        if self._depth:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
            now = time.monotonic()
            self._add("seconds", now - self._since)
            self._since = now
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # on a full disk SQLite has rolled back itself
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth = 0

    def _add(self, key: str, amount: float) -> None:
        self._rows(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = value + excluded.value",
            key,
            amount,
        )

    def remember(self, key: str, value: str) -> str:
        """Keep a text under a key unless there is one, and return what is kept."""
        with self.transaction():
            self._rows("INSERT OR IGNORE INTO meta VALUES (?, ?)", key, value)
        return str(self._value("SELECT value FROM meta WHERE key = ?", key))

    def _rows(self, query: str, *values: Any) -> sqlite3.Cursor:
        """Execute a statement; rows come as they are taken, and their columns have names."""
        return self._db.execute(query, values)

    def _value(self, query: str, *values: Any) -> Any:
        """Return the first column of the first row."""
        return self._rows(query, *values).fetchone()[0]

    # --- sources and units ------------------------------------------------------------------------

    def open_sources(self, depends: Sequence[tuple[str, str]], *, only: Iterable[str] = ()) -> None:
        """Say which sources the job has, in their order, and ``only`` which of them the corpus is to hold.

        ``depends`` are name and hash of everything that a source's records depend on, but for its files. What
        was read of a source that is no longer there, or that depends on something else, is forgotten.
        """
        new = dict(depends)
        with self.transaction():
            for row in self._rows("SELECT id, name, depends FROM sources").fetchall():
                if new.get(row["name"]) != row["depends"]:
                    self._rows("DELETE FROM sources WHERE id = ?", row["id"])
            self._db.executemany(
                "INSERT INTO sources (name, place, depends) VALUES (?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET place = excluded.place",
                [(name, place, hashed) for place, (name, hashed) in enumerate(depends)],
            )
        self.choose(only)

    def choose(self, names: Iterable[str]) -> None:
        """Restrict the corpus to these sources; without a name, to all."""
        self._chosen = set(names)

    def sources(self) -> list[tuple[int, str]]:
        """Return id and name of the sources that the corpus is to hold, in their order."""
        rows = self._rows("SELECT id, name FROM sources ORDER BY place")
        return [(id, name) for id, name in rows if not self._chosen or name in self._chosen]

    def known_unit(self, source: int, key: str) -> tuple[int, bytes, list[str]] | None:
        """Return id, fingerprint and source files of a unit that was read."""
        query = "SELECT id, fingerprint, files FROM units WHERE source = ? AND key = ?"
        row = self._rows(query, source, _valid(key)).fetchone()
        return row and (row["id"], row["fingerprint"], _decode_files(row["files"]))

    def add_unit(self, source: int, key: str, result: UnitResult) -> int:
        """Keep what became of a unit and return its id; an older reading of it is forgotten."""
        key = _valid(key)
        with self.transaction():
            self._rows("DELETE FROM units WHERE source = ? AND key = ?", source, key)
            unit = self._rows(
                "INSERT INTO units (source, key, fingerprint, files, samples, regions) "
                "VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
                *(source, key, result.fingerprint, encode(result.files)),
                *(result.samples, result.regions),
            ).fetchone()["id"]
            self._insert(
                "records",
                ("unit", "name", "duplicate_key", "image", "body"),
                [(unit, r.id, r.duplicate_key, r.image, r.body) for r in result.stored],
            )
            self._insert(
                "drops",
                ("unit", "stage", "reason", '"where"', "detail"),
                [
                    (unit, *map(_valid, (drop.stage, drop.reason, drop.where, drop.detail)))
                    for drop in result.drops
                ],
            )
            self._rows("UPDATE sources SET arranged = NULL WHERE id = ?", source)
        return int(unit)

    def _insert(self, table: str, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        places = ", ".join("?" * len(names))
        query = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places})"
        self._db.executemany(query, rows)

    def duplicate_keys(self, unit: int) -> list[bytes]:
        """Return the key of each record of a unit; duplicates have the same."""
        query = "SELECT duplicate_key FROM records WHERE unit = ?"
        return [key for (key,) in self._rows(query, unit)]

    def arrange(
        self, source: int, units: Iterable[tuple[int, int]], *, limit: int | None = None
    ) -> None:
        """Decide which records of a source are in the corpus, ``limit`` at most, under which numbers and ids.

        ``units`` are ids with their places; they may be added to the store as they are taken. Others are
        forgotten, or with a limit put aside. Of records with the same pixels and labels the first is kept.
        Ids that are there twice get a ``~2``.
        """
        self._rows("CREATE TEMP TABLE IF NOT EXISTS seen (unit INTEGER PRIMARY KEY, place INTEGER)")
        self._rows("DELETE FROM seen")
        for unit in units:
            self._rows("INSERT INTO seen VALUES (?, ?)", *unit)
        with self.transaction():
            if limit is None:
                unseen = "DELETE FROM units WHERE source = ? AND id NOT IN (SELECT unit FROM seen)"
                self._rows(unseen, source)
            moved = self._rows(
                "UPDATE units SET place = (SELECT place FROM seen WHERE unit = id) "
                "WHERE source = ? AND place IS NOT (SELECT place FROM seen WHERE unit = id)",
                source,
            ).rowcount
            arranged = self._value("SELECT arranged FROM sources WHERE id = ?", source)
            if moved == 0 and arranged == str(limit):
                return
            values = {"source": source, "most": 2**62 if limit is None else limit}
            for statement in filter(str.strip, _ARRANGE.read_text(encoding="utf-8").split(";")):
                self._db.execute(statement, values)
            self._make_ids_unique(source)
            self._rows(
                "UPDATE corpus SET made = b.made, items = b.items FROM before b "
                "WHERE corpus.source = ? AND b.record = corpus.record AND b.final IS corpus.final",
                source,
            )
            self._rows("DROP TABLE temp.before")
            self._rows("UPDATE sources SET arranged = ? WHERE id = ?", str(limit), source)

    def _make_ids_unique(self, source: int) -> None:
        rows = self._rows(
            "SELECT number, name FROM (SELECT c.number AS number, r.name AS name, "
            "row_number() OVER (PARTITION BY r.name ORDER BY c.number) AS copy "
            "FROM corpus c JOIN records r ON r.id = c.record WHERE c.source = ?) WHERE copy > 1 "
            "ORDER BY number",
            source,
        ).fetchall()
        there = "SELECT id FROM corpus_records WHERE source = ? AND id LIKE '%~%'"
        taken = {name for (name,) in self._rows(there, source)} if rows else set()
        last: dict[str, int] = {}
        for number, name in rows:
            copy = last.get(name, 1) + 1
            while f"{name}~{copy}" in taken:
                copy += 1
            last[name] = copy
            taken.add(f"{name}~{copy}")
            change = "UPDATE corpus SET final = ? WHERE source = ? AND number = ?"
            self._rows(change, f"{name}~{copy}", source, number)

    def compare_images(self, stored: Iterable[str]) -> tuple[bool, list[str]]:
        """Forget the units of any source with images that are not stored.

        Returns whether there were any, and the stored images that no record refers to.
        """
        with self.transaction():
            self._rows("CREATE TEMP TABLE stored (image TEXT PRIMARY KEY) WITHOUT ROWID")
            self._insert("stored", ["image"], ((image,) for image in stored))
            missing = self._rows(
                "DELETE FROM units WHERE id IN "
                "(SELECT unit FROM records WHERE image NOT IN (SELECT image FROM stored))"
            ).rowcount
            strays = self._rows("SELECT image FROM stored EXCEPT SELECT image FROM records")
            found = [image for (image,) in strays]
            self._rows("DROP TABLE temp.stored")
        return missing > 0, found

    # --- conversations ----------------------------------------------------------------------------

    def count_to_make(self, source: int, made: str) -> int:
        """Count the records whose items were made with something else than ``made``."""
        query = "SELECT count(*) FROM corpus WHERE source = ? AND made IS NOT ?"
        return int(self._value(query, source, made))

    def to_make(self, source: int, made: str, *, chunk: int = 1000) -> Iterator[list[StoredRecord]]:
        """Yield the records whose items were made with something else than ``made``, some at a time."""
        last = 0
        while rows := self._rows(
            "SELECT id, body, row, number FROM corpus_records "
            "WHERE source = ? AND number > ? AND made IS NOT ? ORDER BY number LIMIT ?",
            *(source, last, made, chunk),
        ).fetchall():
            last = rows[-1]["number"]
            yield [StoredRecord(row["id"], row["body"], row=row["row"]) for row in rows]

    def add_made(
        self, made: str, records: Iterable[tuple[StoredRecord, Sequence[ItemRow]]]
    ) -> None:
        """Keep the items of records. A model's answer stays if its key is the same as before."""
        with self.transaction():
            for record, items in records:
                if len(items) > MAX_ITEMS:
                    raise CorpusError(
                        f"more than {MAX_ITEMS} conversations of one record; make fewer."
                    )
                first = record.row * MAX_ITEMS
                old = self._rows(
                    "DELETE FROM items WHERE id BETWEEN ? AND ? "
                    "RETURNING key, state, conversation, problems, prompt, answer",
                    *(first, first + MAX_ITEMS - 1),
                )
                answers = {row["key"]: row for row in old if row["state"] != PENDING}
                for item in items:
                    if item.state == PENDING and (found := answers.get(item.key)):
                        for name in found.keys():  # noqa: SIM118 - a row of SQLite is no mapping
                            setattr(item, name, found[name])
                self._insert(
                    "items", ItemRow.__struct_fields__, map(msgspec.structs.astuple, items)
                )
                change = "UPDATE corpus SET made = ?, items = ? WHERE record = ?"
                self._rows(change, made, len(items), record.row)

    def pending(self) -> Iterator[StoredConversation]:
        """Yield the items that a model is to write. The store may be written to while they are read."""
        for source, _ in self.sources():
            number, last = 0, -1
            while rows := self._rows(
                f"SELECT * FROM conversations WHERE source = ? AND state = {PENDING} AND number >= ? "
                "AND (number > ? OR id > ?) ORDER BY number, id LIMIT 100",
                *(source, number, number, last),
            ).fetchall():
                number, last = rows[-1]["number"], rows[-1]["id"]
                yield from _kept(rows)

    def count_pending(self) -> int:
        """Count the conversations of the corpus that a model is to write."""
        return sum(row.count for row in self.funnel() if row.reason == "pending")

    def add_outcome(self, row: int, outcome: Outcome) -> None:
        """Keep what came back for a pending item, and what it cost."""
        if not outcome.pending:
            conversation, problems = outcome.conversation, outcome.problems
            self._rows(
                "UPDATE items SET state = ?, conversation = ?, problems = ?, prompt = ?, answer = ? "
                "WHERE id = ?",
                REJECTED if conversation is None or problems else ACCEPTED,
                None if conversation is None else encode(conversation),
                encode(problems) if problems else None,
                _valid(outcome.prompt),
                _valid(outcome.answer),
                row,
            )
        for field in fields(Usage):
            if amount := getattr(outcome, field.name, 0):
                self._add(field.name, amount)

    # --- what the output is built from ------------------------------------------------------------

    def records(self, source: int | None = None) -> Iterator[Record]:
        """Yield the records in the corpus' order, of one source or of all."""
        query = "SELECT id, body FROM corpus_records WHERE source = ? ORDER BY number"
        for number, _ in self.sources():
            if source in (None, number):
                for id, body in self._rows(query, number):
                    yield StoredRecord(id, body).record

    def accepted(self, state: int = ACCEPTED) -> Iterator[StoredConversation]:
        """Yield the accepted conversations, or those in another ``state``, in the corpus' order."""
        query = (  # the state in words: its index is of these rows alone
            f"SELECT * FROM conversations WHERE source = ? AND state = {state} ORDER BY number, id"
        )
        for source, _ in self.sources():
            yield from _kept(self._rows(query, source))

    def rejected(self) -> Iterator[StoredConversation]:
        """Yield the conversations that were set aside, in the corpus' order."""
        return self.accepted(REJECTED)

    def drops(self) -> Iterator[tuple[str, Drop]]:
        """Yield name of the source and what was left out before a conversation was to be made of it."""
        for source, name in self.sources():
            for query, key in (
                ("corpus_drops WHERE source = ? ORDER BY place, number", source),
                ("drops WHERE unit = ? ORDER BY rowid", -source),
            ):
                for row in self._rows(f'SELECT stage, reason, "where", detail FROM {query}', key):
                    yield name, Drop(*row)

    def funnel(self) -> list[FunnelRow]:
        """Count what came through every stage of every source, and what was lost by its reason."""
        found = []
        for source, name in self.sources():
            values = {"source": source}
            lost = self._db.execute(_LOST, values).fetchall()
            samples, regions, records, items = self._db.execute(_CAME_THROUGH, values).fetchone()
            count_lost = Counter[str]()
            for stage, _, count in lost:
                count_lost[stage] += count
            written = items - count_lost["write"]
            for stage, count in (
                ("read", samples - count_lost["read"]),
                ("clean", regions),
                ("record", records),
                ("write", written),
                ("check", written - count_lost["check"]),
            ):
                found.append(FunnelRow(name, stage, "", int(count)))
                found += [FunnelRow(name, *row) for row in lost if row[0] == stage]
        return found

    def forms(self) -> list[dict[str, Any]]:
        """Return rows of ``form``, ``language``, and how many are ``accepted``, ``rejected``, ``pending``."""
        rows = self._rows(
            f"SELECT form, language, sum(state = {ACCEPTED}) AS accepted, "
            f"sum(state = {REJECTED}) AS rejected, sum(state = {PENDING}) AS pending FROM corpus_items "
            "WHERE source IN (SELECT value FROM json_each(?)) GROUP BY 1, 2 ORDER BY 1, 2",
            encode([source for source, _ in self.sources()]).decode(),
        )
        return [dict(row) for row in rows]

    def usage(self) -> Usage:
        """Return what all runs so far have used."""
        known = dict(tuple(row) for row in self._rows("SELECT * FROM meta"))
        return Usage(**{f.name: known[f.name] for f in fields(Usage) if f.name in known})

    def vocabulary(self, source: int) -> Vocabulary:
        """Return the labels of a source's records in the corpus."""
        return Vocabulary.of(self.records(source))


def _kept(rows: Iterable[sqlite3.Row]) -> Iterator[StoredConversation]:
    """Decode rows of the view ``conversations``; a record's rows follow each other."""
    last, record = None, None
    for row in rows:
        if record is None or row["record"] != last:
            last, record = row["record"], StoredRecord(row["record_id"], row["body"]).record
        conversation, problems = row["conversation"], row["problems"]
        own = {name: row[name] for name in ("form", "language", "kind", "focus", "seed")}
        yield StoredConversation(
            Item(id=record.id + row["suffix"], **own),
            record,
            None if conversation is None else _decode_conversation(conversation),
            () if problems is None else _decode_problems(problems),
            prompt=row["prompt"] or "",
            answer=row["answer"] or "",
            row=row["id"],
        )


def _valid(text: str) -> str:
    """Return text that SQLite takes: a file name that is not valid Unicode is shown with escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
