"""The state of a job: one SQLite database, written by one process, after any stop as good as before it.

::

    sources   name, what its records depend on              a changed source is read again
    units     key, place in the source, stamp of its files  committed with its records and drops
    records   as they were read
    corpus    which records are in it, under which number   follows from the order of job, source and unit,
              and id; what their items were made with       never from the order in which work came in
    items     a conversation: accepted, rejected, pending   row number = record x 4096 + place in the record
    drops     what was left out: stage, reason

The number of a forgotten row is never given again (AUTOINCREMENT): items would pass to another record.
A unit is done if its row is there, a record's items are if ``made`` names what they were made with.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from data_tools.items import Conversation, Item, Problem
from data_tools.records import Drop, Record
from data_tools.standardise import UnitResult, duplicate_key
from gmai_xtuner.core.errors import CorpusError

VERSION = 1
MAX_ITEMS = 4096
"""Of one record."""

ACCEPTED, REJECTED, PENDING = 0, 1, 2
_BATCH = 500  # rows read at once

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE sources (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, place INTEGER NOT NULL,
    depends TEXT NOT NULL, arranged TEXT);
CREATE TABLE units (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER NOT NULL, place INTEGER, key TEXT NOT NULL,
    stamp BLOB NOT NULL, files BLOB NOT NULL, samples INTEGER NOT NULL,
    regions INTEGER NOT NULL, UNIQUE (source, key));
CREATE TABLE records (
    id INTEGER PRIMARY KEY AUTOINCREMENT, unit INTEGER NOT NULL, name TEXT NOT NULL, twin BLOB NOT NULL,
    image TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX records_unit ON records (unit);
CREATE TABLE corpus (
    source INTEGER NOT NULL, number INTEGER NOT NULL, record INTEGER NOT NULL, final TEXT, made TEXT,
    items INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (source, number)) WITHOUT ROWID;
CREATE UNIQUE INDEX corpus_record ON corpus (record);
CREATE TABLE items (
    id INTEGER PRIMARY KEY, state INTEGER NOT NULL, suffix TEXT NOT NULL, form TEXT NOT NULL,
    language TEXT NOT NULL, kind TEXT NOT NULL, focus INTEGER, seed INTEGER NOT NULL,
    key BLOB, conversation BLOB, problems BLOB, prompt TEXT, answer TEXT);
CREATE INDEX items_rejected ON items (id) WHERE state = 1;
CREATE INDEX items_pending ON items (id) WHERE state = 2;
CREATE TABLE drops (unit INTEGER NOT NULL, stage TEXT NOT NULL, reason TEXT NOT NULL,
    place TEXT NOT NULL, detail TEXT NOT NULL);
CREATE INDEX drops_unit ON drops (unit);
"""


class _Name(msgspec.Struct):
    name: str


class _Names(msgspec.Struct):
    labels: list[_Name]


_record_decoder = msgspec.json.Decoder(Record)
_conversation_decoder = msgspec.json.Decoder(Conversation)
_problems_decoder = msgspec.json.Decoder(tuple[Problem, ...])
_labels_decoder: msgspec.json.Decoder[_Names] = msgspec.json.Decoder(_Names)
_encoder = msgspec.json.Encoder()
encode = _encoder.encode
decode_names = msgspec.json.Decoder(list[str]).decode
decode_record = _record_decoder.decode


@dataclass(frozen=True, slots=True)
class Kept:
    """A conversation that was made, with all that led to it.

    Args:
        item: what was to be made.
        record: of what.
        conversation: None if the writer gave none that can be read.
        problems: why it was set aside; empty if it was accepted.
        prompt, answer: of a model; empty for a template's.
    """

    item: Item
    record: Record
    conversation: Conversation | None
    problems: tuple[Problem, ...] = ()
    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class FunnelRow:
    """``count`` came through a stage of a source (``reason`` empty) or were left out for a reason.

    ``read`` counts samples, ``clean`` regions, ``record`` records, ``write`` conversations that were to be
    made (with the reason ``pending`` those that a later run makes), ``check`` conversations.
    """

    source: str
    stage: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class DropRow:
    """One thing left out."""

    source: str
    stage: str
    reason: str
    where: str
    detail: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all runs of the job together; ``seconds`` of wall clock."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    seconds: float = 0.0


class Row(NamedTuple):
    """A record on its way from a worker."""

    id: str
    twin: bytes
    image: str
    body: bytes


class UnitRows(NamedTuple):
    """What became of a unit, as it is stored; `rows_of` makes it, in the worker."""

    rows: list[Row]
    drops: tuple[Drop, ...] = ()
    samples: int = 0
    regions: int = 0
    files: tuple[str, ...] = ()


def rows_of(result: UnitResult) -> UnitRows:
    """The result of `standardise.read_unit` as it is stored."""
    return UnitRows(
        [Row(r.id, duplicate_key(r), r.image, encode(r)) for r in result.records],
        result.drops,
        result.samples,
        sum(label.box is not None for r in result.records for label in r.labels),
        result.files,
    )


class Raw(NamedTuple):
    """A record that is to be made something of, as it is in the database.

    Args:
        source, number: where it is in the corpus.
        record: its row.
        final: its id, if it isn't the one in ``body``.
        body: JSON of the `Record`.
        has_items: whether there are items of it, made with something else.
    """

    source: int
    number: int
    record: int
    final: str | None
    body: bytes
    has_items: bool

    def decode(self) -> Record:
        record = decode_record(self.body)
        return record if self.final is None else replace(record, id=self.final)


# (state, id without the record's, form, language, kind, focus, seed, key, conversation, problems): of an item
# that was planned and, but for one of a model, written. A tuple, because processes exchange millions of it.
WrittenItem = tuple[
    int, str, str, str, str, int | None, int, bytes | None, bytes | None, bytes | None
]


class Store:
    """The database.

    Args:
        path: of the file; made if it isn't there.

    Raises:
        CorpusError: it is not a database of this tool, or damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._since = time.monotonic()
        self._depth = 0
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA cache_size = -65536")
            self._db.execute("PRAGMA temp_store = FILE")
            # Pages that change with every chunk are copied out of the log seldom: every 32 MiB of it.
            self._db.execute("PRAGMA wal_autocheckpoint = 8192")
            self._db.execute("PRAGMA journal_size_limit = 67108864")
            if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
                tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if tables:
                    raise CorpusError(f"{path} is not a database of this tool; move it away.")
                self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {VERSION};COMMIT;")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
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
        self._wanted: list[int] | None = None

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; one inside another belongs to it."""
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
            self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth = 0

    def _add(self, key: str, amount: float) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = value + excluded.value",
            (key, amount),
        )

    def _rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Rows of a cursor of its own, some at a time."""
        cursor = self._db.execute(query, values)
        try:
            while rows := cursor.fetchmany(_BATCH):
                yield from rows
        finally:
            cursor.close()

    # --- sources and units ------------------------------------------------------------------------

    def open_sources(self, depends: Sequence[tuple[str, str]], *, only: Iterable[str] = ()) -> None:
        """Say which sources the job has, in their order.

        What was read of a source that is no longer there, or that depends on something else, is forgotten.

        Args:
            depends: name and hash of everything that a source's records depend on, but for its files.
            only: names of the sources that the corpus is to hold; default all.
        """
        with self.transaction():
            known = {
                name: (number, old)
                for number, name, old in self._db.execute("SELECT id, name, depends FROM sources")
            }
            for name in set(known) - {name for name, _ in depends}:
                self._forget_source(known[name][0])
            for place, (name, new) in enumerate(depends):
                if name in known and known[name][1] != new:
                    self._forget_source(known[name][0])
                self._db.execute(
                    "INSERT INTO sources (name, place, depends) VALUES (?, ?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET place = excluded.place",
                    (name, place, new),
                )
        self.choose(only)

    def choose(self, names: Iterable[str]) -> None:
        """Look at these sources only; none: at all."""
        wanted = set(names)
        self._wanted = [
            number for number, name in self._all_sources() if not wanted or name in wanted
        ]

    def sources(self) -> list[tuple[int, str]]:
        """Number and name of the sources that the corpus is to hold, in their order."""
        return [
            row for row in self._all_sources() if self._wanted is None or row[0] in self._wanted
        ]

    def _all_sources(self) -> list[tuple[int, str]]:
        return self._db.execute("SELECT id, name FROM sources ORDER BY place").fetchall()

    def _forget_source(self, source: int) -> None:
        self._forget_units(
            row for (row,) in self._all("SELECT id FROM units WHERE source = ?", source)
        )
        self._db.execute("DELETE FROM corpus WHERE source = ?", (source,))
        self._db.execute("DELETE FROM drops WHERE unit = ?", (-source,))
        self._db.execute("DELETE FROM sources WHERE id = ?", (source,))

    def _forget_units(self, units: Iterable[int]) -> None:
        for unit in units:
            for (record,) in self._all("SELECT id FROM records WHERE unit = ?", unit):
                self._forget_items(record)
            self._db.execute("DELETE FROM records WHERE unit = ?", (unit,))
            self._db.execute("DELETE FROM drops WHERE unit = ?", (unit,))
            self._db.execute(
                "UPDATE sources SET arranged = NULL WHERE id = (SELECT source FROM units WHERE id = ?)",
                (unit,),
            )
            self._db.execute("DELETE FROM units WHERE id = ?", (unit,))

    def _forget_items(self, record: int) -> None:
        self._db.execute(
            "DELETE FROM items WHERE id BETWEEN ? AND ?",
            (record * MAX_ITEMS, record * MAX_ITEMS + MAX_ITEMS - 1),
        )

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._db.execute(query, values).fetchall()

    def known_unit(self, source: int, key: str) -> tuple[int, bytes, list[str]] | None:
        """Number, stamp and source files of a unit that was read."""
        row = self._db.execute(
            "SELECT id, stamp, files FROM units WHERE source = ? AND key = ?", (source, _valid(key))
        ).fetchone()
        return None if row is None else (row[0], row[1], decode_names(row[2]))

    def add_unit(self, source: int, key: str, stamp: bytes, result: UnitRows) -> int:
        """Keep what became of a unit and return its number; an older reading of it is forgotten."""
        key = _valid(key)
        with self.transaction():
            self._forget_units(
                row
                for (row,) in self._all(
                    "SELECT id FROM units WHERE source = ? AND key = ?", source, key
                )
            )
            unit = self._db.execute(
                "INSERT INTO units (source, key, stamp, files, samples, regions) VALUES (?, ?, ?, ?, ?, ?)",
                (source, key, stamp, encode(result.files), result.samples, result.regions),
            ).lastrowid
            assert unit is not None
            self._db.executemany(
                "INSERT INTO records (unit, name, twin, image, body) VALUES (?, ?, ?, ?, ?)",
                ((unit, row.id, row.twin, row.image, row.body) for row in result.rows),
            )
            self._add_drops(unit, result.drops)
            self._db.execute("UPDATE sources SET arranged = NULL WHERE id = ?", (source,))
        return unit

    def _add_drops(self, unit: int, drops: Iterable[Drop]) -> None:
        self._db.executemany(
            "INSERT INTO drops VALUES (?, ?, ?, ?, ?)",
            (
                (
                    unit,
                    *(_valid(text) for text in (drop.stage, drop.reason, drop.where, drop.detail)),
                )
                for drop in drops
            ),
        )

    def twins(self, unit: int) -> list[bytes]:
        """Of a unit's records."""
        return [twin for (twin,) in self._all("SELECT twin FROM records WHERE unit = ?", unit)]

    def begin_order(self) -> None:
        """Forget the order of units that `order` has been told."""
        self._db.execute(
            "CREATE TEMP TABLE IF NOT EXISTS seen (unit INTEGER PRIMARY KEY, place INTEGER)"
        )
        self._db.execute("DELETE FROM seen")

    def order(self, units: Iterable[tuple[int, int]]) -> None:
        """Say the place of units in their source."""
        self._db.executemany("INSERT INTO seen VALUES (?, ?)", units)

    def arrange(self, source: int, *, limit: int | None = None) -> None:
        """Decide which records of a source are in the corpus, under which numbers and ids.

        Units without a place are forgotten, or with a limit put aside. Of records with the same pixels and
        labels the first is kept. Ids that are there twice get a ``~2``.

        Args:
            source: its number.
            limit: records at most.
        """
        with self.transaction():
            if limit is None:
                self._forget_units(
                    unit
                    for (unit,) in self._all(
                        "SELECT id FROM units WHERE source = ? AND id NOT IN (SELECT unit FROM seen)",
                        source,
                    )
                )
            moved = self._db.execute(
                "UPDATE units SET place = (SELECT place FROM seen WHERE unit = id) "
                "WHERE source = ? AND place IS NOT (SELECT place FROM seen WHERE unit = id)",
                (source,),
            ).rowcount
            ((arranged,),) = self._all("SELECT arranged FROM sources WHERE id = ?", source)
            if moved == 0 and arranged == str(limit):
                return
            self._db.execute("DROP TABLE IF EXISTS temp.before")
            self._db.execute(
                "CREATE TEMP TABLE before AS SELECT record, final, made, items FROM corpus "
                "WHERE source = ? AND made IS NOT NULL",
                (source,),
            )
            self._db.execute("CREATE INDEX temp.before_record ON before (record)")
            self._db.execute("DELETE FROM corpus WHERE source = ?", (source,))
            self._db.execute("DELETE FROM drops WHERE unit = ?", (-source,))
            self._db.execute("DROP TABLE IF EXISTS temp.ranked")
            self._db.execute(
                "CREATE TEMP TABLE ranked AS SELECT record, copy, "
                "sum(copy = 1) OVER (ORDER BY place, record ROWS UNBOUNDED PRECEDING) AS number FROM ("
                "SELECT r.id AS record, u.place AS place, "
                "row_number() OVER (PARTITION BY r.twin ORDER BY u.place, r.id) AS copy "
                "FROM records r JOIN units u ON u.id = r.unit WHERE u.source = ? AND u.place IS NOT NULL)",
                (source,),
            )
            at_most = -1 if limit is None else limit
            self._db.execute(
                "INSERT INTO corpus (source, number, record) SELECT ?, number, record FROM ranked "
                "WHERE copy = 1 AND (? < 0 OR number <= ?) ORDER BY number",
                (source, at_most, at_most),
            )
            self._db.execute(
                "INSERT INTO drops SELECT ?, 'record', 'duplicate picture', "
                "json_extract(CAST(r.body AS TEXT), '$.provenance.file'), r.name "
                "FROM ranked k JOIN records r ON r.id = k.record "
                "WHERE k.copy > 1 AND (? < 0 OR k.number <= ?) ORDER BY k.number, k.record",
                (-source, at_most, at_most),
            )
            self._db.execute(
                "INSERT INTO drops SELECT ?, 'record', 'beyond the limit of this run', "
                "json_extract(CAST(r.body AS TEXT), '$.provenance.file'), r.name "
                "FROM ranked k JOIN records r ON r.id = k.record "
                "WHERE k.copy = 1 AND ? >= 0 AND k.number > ? ORDER BY k.number",
                (-source, at_most, at_most),
            )
            self._make_unique(source)
            self._db.execute(
                "UPDATE corpus SET (made, items) = (SELECT b.made, b.items FROM before b "
                "WHERE b.record = corpus.record AND b.final IS corpus.final) WHERE source = ? "
                "AND EXISTS (SELECT 1 FROM before b WHERE b.record = corpus.record "
                "AND b.final IS corpus.final)",
                (source,),
            )
            self._db.execute("DROP TABLE temp.before")
            self._db.execute("DROP TABLE temp.ranked")
            self._db.execute("UPDATE sources SET arranged = ? WHERE id = ?", (str(limit), source))

    def _make_unique(self, source: int) -> None:
        rows = self._all(
            "SELECT number, name FROM (SELECT c.number AS number, r.name AS name, "
            "row_number() OVER (PARTITION BY r.name ORDER BY c.number) AS copy "
            "FROM corpus c JOIN records r ON r.id = c.record WHERE c.source = ?) WHERE copy > 1 "
            "ORDER BY number",
            source,
        )
        if not rows:
            return
        taken = {
            name
            for (name,) in self._all(
                "SELECT r.name FROM corpus c JOIN records r ON r.id = c.record "
                "WHERE c.source = ? AND r.name LIKE '%~%'",
                source,
            )
        }
        last: dict[str, int] = {}
        for number, name in rows:
            copy = last.get(name, 1) + 1
            while f"{name}~{copy}" in taken:
                copy += 1
            last[name] = copy
            taken.add(f"{name}~{copy}")
            self._db.execute(
                "UPDATE corpus SET final = ? WHERE source = ? AND number = ?",
                (f"{name}~{copy}", source, number),
            )

    def images(self) -> Iterator[str]:
        """Every picture that a record of any source refers to, sorted, once each."""
        for (image,) in self._rows("SELECT DISTINCT image FROM records ORDER BY image"):
            yield image

    def forget_image(self, image: str) -> None:
        """Forget the units whose records refer to a picture that is no longer there."""
        with self.transaction():
            self._forget_units(
                row
                for (row,) in self._all("SELECT DISTINCT unit FROM records WHERE image = ?", image)
            )

    # --- conversations ----------------------------------------------------------------------------

    def count_to_make(self, source: int, made: str) -> int:
        return self._count(
            "SELECT count(*) FROM corpus WHERE source = ? AND made IS NOT ?", source, made
        )

    def to_make(self, source: int, made: str, *, chunk: int = 1000) -> Iterator[list[Raw]]:
        """Records whose items were made with something else than ``made``, some at a time."""
        last = 0
        while True:
            rows = self._all(
                "SELECT c.number, c.record, c.final, r.body, EXISTS (SELECT 1 FROM items i WHERE i.id "
                "BETWEEN c.record * 4096 AND c.record * 4096 + 4095) "
                "FROM corpus c CROSS JOIN records r ON r.id = c.record "
                "WHERE c.source = ? AND c.number > ? AND c.made IS NOT ? ORDER BY c.number LIMIT ?",
                source,
                last,
                made,
                chunk,
            )
            if not rows:
                return
            last = rows[-1][0]
            yield [
                Raw(source, number, record, final, body, bool(has_items))
                for number, record, final, body, has_items in rows
            ]

    def add_made(self, made: str, records: Iterable[tuple[Raw, Sequence[WrittenItem]]]) -> None:
        """Keep the items of records. A model's answer stays if its key is the same as before."""
        with self.transaction():
            rows: list[tuple[Any, ...]] = []
            marks = []
            for raw, items in records:
                if len(items) > MAX_ITEMS:
                    raise CorpusError(
                        f"more than {MAX_ITEMS} conversations of one record; make fewer."
                    )
                known = self._take_answers(raw.record) if raw.has_items else {}
                for place, item in enumerate(items):
                    answer = known.get(item[7]) if known and item[0] == PENDING else None
                    if answer is None:
                        rows.append((raw.record * MAX_ITEMS + place, *item, None, None))
                    else:
                        state, *found = answer
                        rows.append((raw.record * MAX_ITEMS + place, state, *item[1:8], *found))
                marks.append((made, len(items), raw.source, raw.number))
            self._db.executemany(
                "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            self._db.executemany(
                "UPDATE corpus SET made = ?, items = ? WHERE source = ? AND number = ?", marks
            )

    def _take_answers(self, record: int) -> dict[bytes | None, tuple[Any, ...]]:
        first = record * MAX_ITEMS
        rows = self._all(
            "SELECT key, state, conversation, problems, prompt, answer FROM items "
            "WHERE id BETWEEN ? AND ? AND key IS NOT NULL AND state != 2",
            first,
            first + MAX_ITEMS - 1,
        )
        self._forget_items(record)
        return {row[0]: row[1:] for row in rows}

    def pending(self) -> Iterator[tuple[int, Item, Record]]:
        """Items that a model is to write: row, item, record. May be written to while it is read."""
        for source, _ in self.sources():
            number, row = 0, -1
            while True:
                rows = self._all(
                    f"SELECT c.number, {_KEPT} FROM corpus c CROSS JOIN items i CROSS JOIN records r "
                    "WHERE c.source = ? AND r.id = c.record AND (c.number > ? OR c.number = ?) "
                    "AND i.state = 2 AND i.id BETWEEN c.record * 4096 AND c.record * 4096 + 4095 "
                    "AND (c.number > ? OR i.id > ?) ORDER BY c.number, i.id LIMIT 100",
                    source,
                    number,
                    number,
                    number,
                    row,
                )
                if not rows:
                    break
                for found in rows:
                    number, row = found[0], found[1]
                    kept = next(iter(_kept([found[1:]])))
                    yield row, kept.item, kept.record

    def count_pending(self) -> int:
        """Conversations of the corpus that a model is to write."""
        return sum(self._in_state(source, PENDING) for source, _ in self.sources())

    def _in_state(self, source: int, state: int) -> int:
        """For `REJECTED` and `PENDING`, which have an index."""
        return self._count(
            f"SELECT count(*) FROM items i CROSS JOIN corpus c ON c.record = i.id / 4096 "
            f"WHERE i.state = {state} AND c.source = ?",
            source,
        )

    def _count(self, query: str, *values: Any) -> int:
        return int(self._all(query, *values)[0][0] or 0)

    def set_outcome(
        self,
        row: int,
        *,
        conversation: Conversation | None,
        problems: Sequence[Problem],
        prompt: str,
        answer: str,
    ) -> None:
        """What came back for a pending item."""
        accepted = conversation is not None and not problems
        self._db.execute(
            "UPDATE items SET state = ?, conversation = ?, problems = ?, prompt = ?, answer = ? WHERE id = ?",
            (
                ACCEPTED if accepted else REJECTED,
                None if conversation is None else encode(conversation),
                encode(tuple(problems)) if problems else None,
                _valid(prompt),
                _valid(answer),
                row,
            ),
        )

    def add_usage(
        self,
        *,
        requests: int = 0,
        cached: int = 0,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        dollars: float = 0.0,
    ) -> None:
        """What outcomes cost; in the same transaction as they."""
        for key, value in locals().items():
            if key != "self" and value:
                self._add(key, value)

    # --- what the output is built from ------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """In the corpus' order."""
        for source, _ in self.sources():
            for final, body in self._rows(
                "SELECT c.final, r.body FROM corpus c CROSS JOIN records r ON r.id = c.record "
                "WHERE c.source = ? ORDER BY c.number",
                source,
            ):
                record = decode_record(body)
                yield record if final is None else replace(record, id=final)

    def accepted(self) -> Iterator[Kept]:
        """Conversations of the corpus, in its order."""
        return self._with_state(ACCEPTED)

    def rejected(self) -> Iterator[Kept]:
        """Conversations that were set aside, in the corpus' order."""
        return self._with_state(REJECTED)

    def _with_state(self, state: int) -> Iterator[Kept]:
        for source, _ in self.sources():
            yield from _kept(
                self._rows(
                    f"SELECT {_KEPT} FROM corpus c CROSS JOIN items i CROSS JOIN records r "
                    f"WHERE c.source = ? AND r.id = c.record AND i.state = {state} "
                    "AND i.id BETWEEN c.record * 4096 AND c.record * 4096 + 4095 "
                    "ORDER BY c.number, i.id",
                    source,
                )
            )

    def drops(self) -> Iterator[DropRow]:
        """Everything that was left out before a conversation was to be made of it, in the corpus' order."""
        for source, name in self.sources():
            for row in self._rows(
                "SELECT d.stage, d.reason, d.place, d.detail FROM units u CROSS JOIN drops d "
                "ON d.unit = u.id WHERE u.source = ? AND u.place IS NOT NULL ORDER BY u.place, d.rowid",
                source,
            ):
                yield DropRow(name, *row)
            for row in self._rows(
                "SELECT stage, reason, place, detail FROM drops WHERE unit = ? ORDER BY rowid",
                -source,
            ):
                yield DropRow(name, *row)

    def funnel(self) -> list[FunnelRow]:
        """Counts of every stage of every source; reasons by their number."""
        return [row for source, name in self.sources() for row in self._funnel(source, name)]

    def _funnel(self, source: int, name: str) -> Iterator[FunnelRow]:
        ((samples, regions),) = self._all(
            "SELECT total(samples), total(regions) FROM units WHERE source = ? AND place IS NOT NULL",
            source,
        )
        ((records, items),) = self._all(
            "SELECT count(*), total(items) FROM corpus WHERE source = ?", source
        )
        dropped = self._all(
            "SELECT d.stage, d.reason, count(*) FROM units u JOIN drops d ON d.unit = u.id "
            "WHERE u.source = ? AND u.place IS NOT NULL GROUP BY 1, 2 UNION ALL "
            "SELECT stage, reason, count(*) FROM drops WHERE unit = ? GROUP BY 1, 2 "
            "ORDER BY 3 DESC, 2",
            source,
            -source,
        )
        rejected = self._all(
            "SELECT 'check', coalesce(json_extract(CAST(i.problems AS TEXT), '$[0].reason'), "
            "'no conversation'), count(*) FROM items i CROSS JOIN corpus c ON c.record = i.id / 4096 "
            "WHERE i.state = 1 AND c.source = ? GROUP BY 2 ORDER BY 3 DESC, 2",
            source,
        )
        pending = self._in_state(source, PENDING)
        read_drops = sum(count for stage, _, count in dropped if stage == "read")
        through = {
            "read": samples - read_drops,
            "clean": regions,
            "record": records,
            "write": items - pending,
            "check": items - pending - sum(count for *_, count in rejected),
        }
        lost = [*dropped, *rejected, *([("write", "pending", pending)] if pending else [])]
        for stage, count in through.items():
            yield FunnelRow(name, stage, "", int(count))
            for its, reason, number in lost:
                if its == stage:
                    yield FunnelRow(name, stage, reason, number)

    def forms(self) -> list[dict[str, Any]]:
        """``form``, ``language`` and how many are ``accepted``, ``rejected`` and ``pending``."""
        counts: dict[tuple[str, str], list[int]] = {}
        for source, _ in self.sources():
            for form, language, state, count in self._all(
                "SELECT i.form, i.language, i.state, count(*) FROM corpus c CROSS JOIN items i "
                "WHERE c.source = ? AND i.id BETWEEN c.record * 4096 AND c.record * 4096 + 4095 "
                "GROUP BY 1, 2, 3",
                source,
            ):
                counts.setdefault((form, language), [0, 0, 0])[state] += count
        return [
            {
                "form": form,
                "language": language,
                "accepted": found[ACCEPTED],
                "rejected": found[REJECTED],
                "pending": found[PENDING],
            }
            for (form, language), found in sorted(counts.items())
        ]

    def usage(self) -> Usage:
        """Of all runs so far."""
        names = Usage.__dataclass_fields__
        values = dict(self._all("SELECT key, value FROM meta"))
        return Usage(**{key: value for key, value in values.items() if key in names})

    def vocabulary(self, source: int) -> tuple[str, ...]:
        """Label names of a source's records in the corpus, sorted."""
        names: set[str] = set()
        for (body,) in self._rows(
            "SELECT r.body FROM corpus c CROSS JOIN records r ON r.id = c.record WHERE c.source = ?",
            source,
        ):
            names.update(label.name for label in _labels_decoder.decode(body).labels)
        return tuple(sorted(names))


_KEPT = (
    "i.id, c.final, r.body, i.suffix, i.form, i.language, i.kind, i.focus, i.seed, i.conversation, "
    "i.problems, i.prompt, i.answer"
)


def _kept(rows: Iterable[tuple[Any, ...]]) -> Iterator[Kept]:
    last, record = None, None
    for (
        row,
        final,
        body,
        suffix,
        form,
        language,
        kind,
        focus,
        seed,
        conversation,
        problems,
        *texts,
    ) in rows:
        number = row // MAX_ITEMS
        if number != last or record is None:
            last, record = number, decode_record(body)
            if final is not None:
                record = replace(record, id=final)
        yield Kept(
            Item(record.id + suffix, form, language, kind, focus, seed),
            record,
            None if conversation is None else _conversation_decoder.decode(conversation),
            () if problems is None else _problems_decoder.decode(problems),
            *(text or "" for text in texts),
        )


def _valid(text: str) -> str:
    """Text that SQLite takes: a file name that is not valid Unicode is shown with escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
