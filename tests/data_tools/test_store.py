# SPDX-License-Identifier: Apache-2.0

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.items import Item, Problem, Turn
from data_tools.records import ANYTHING, NOTHING, Drop, Drops, Label, Provenance, Record
from data_tools.standardise import UnitResult
from data_tools.store import (
    ACCEPTED,
    MAX_ITEMS,
    PENDING,
    REJECTED,
    FunnelRow,
    ItemRow,
    Store,
    StoredConversation,
    StoredRecord,
    Usage,
    encode,
)
from data_tools.writers.asking import Outcome
from gmai_xtuner.core.errors import CorpusError, Unusable


def record(name: str, *, label: str = "cat") -> Record:
    provenance = Provenance(
        "set", "Set", "MIT", "", f"{name}.png", "0" * 64, {"slice": 3}, f"set/{name}"
    )
    labels = (Label(label, (1, 2, 3, 4), 5, {"side": "left"}),)
    return Record(
        name, f"images/{name}.png", 8, 9, "CT", "None", None, "2D detection", labels, {}, provenance
    )


def read(*records: Record, drops: tuple[Drop, ...] = (), duplicates: str = "") -> UnitResult:
    """What became of a unit; ``duplicates``: a letter each, the same letter for duplicates."""
    keys = [letter.encode() for letter in duplicates] or [r.id.encode() for r in records]
    made = (StoredRecord(r.id, encode(r), k, r.image) for r, k in zip(records, keys, strict=True))
    samples = len(records) + len(drops)
    return UnitResult(drops, samples, (), b"fingerprint", tuple(made), regions=len(records))


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "state.sqlite") as store:
        store.open_sources([("set", "1")])
        yield store


def number(store: Store, name: str = "set") -> int:
    return next(number for number, its in store.sources() if its == name)


def fill(store: Store, *units, source: str = "set", limit: int | None = None) -> None:
    """Adds units named u0, u1, ... in their order and arranges them."""
    its = number(store, source)
    placed = ((store.add_unit(its, f"u{at}", unit), at) for at, unit in enumerate(units))
    store.arrange(its, placed, limit=limit)


def write(store: Store, made: str, *states: int, answers: tuple[bytes, ...] = ()) -> None:
    """For every record an item of each state."""
    for source, _ in store.sources():
        for records in store.to_make(source, made):
            store.add_made(
                made,
                [
                    (stored, [row(stored, at, state, answers) for at, state in enumerate(states)])
                    for stored in records
                ],
            )


def row(stored: StoredRecord, place: int, state: int, answers: tuple[bytes, ...]) -> ItemRow:
    made = ItemRow(stored.row * MAX_ITEMS + place, state, f"#{place}", "caption", "en", "", None, 7)
    made.key = answers[place] if answers else None
    made.conversation = None if state == PENDING else encode((Turn("human", "?"), Turn("gpt", "!")))
    made.problems = encode((Problem("too short", "1"),)) if state == REJECTED else None
    return made


def test_records_come_back_as_they_were_in_the_order_of_units_not_of_arrival(store):
    a, b, c = record("a"), record("b"), record("c")
    its = number(store)
    late = store.add_unit(its, "late", read(b, c))
    early = store.add_unit(its, "early", read(a))
    store.arrange(its, [(early, 0), (late, 1)])
    assert list(store.records()) == [a, b, c]


def test_sources_come_in_the_order_of_the_job_whatever_it_was(store):
    store.open_sources([("set", "1"), ("other", "1")])
    fill(store, read(record("a")))
    fill(store, read(record("b")), source="other")
    assert [r.id for r in store.records()] == ["a", "b"]
    store.open_sources([("other", "1"), ("set", "1")])
    assert [r.id for r in store.records()] == ["b", "a"]
    store.open_sources([("other", "1"), ("set", "1")], only=["set"])
    assert [r.id for r in store.records()] == ["a"]


def test_of_duplicates_the_first_is_kept_and_the_others_are_counted(store):
    fill(
        store,
        read(record("a"), record("b"), duplicates="xy"),
        read(record("c"), record("d"), duplicates="zx"),
    )
    assert [r.id for r in store.records()] == ["a", "b", "c"]
    assert FunnelRow("set", "record", "duplicate picture", 1) in store.funnel()
    ((source, drop),) = store.drops()
    assert source == "set"
    assert (drop.reason, drop.where, drop.detail) == ("duplicate picture", "d.png", "d")


def test_equal_ids_are_made_unique_the_same_way_every_time(store):
    names = ["a", "a", "a~2", "b", "a"]
    fill(store, read(*(record(name) for name in names), duplicates="12345"))
    assert [r.id for r in store.records()] == ["a", "a~3", "a~2", "b", "a~4"]


def test_a_limit_puts_the_rest_aside(store):
    units = [read(record("a"), record("b")), read(record("c"))]
    fill(store, *units, limit=1)
    assert [r.id for r in store.records()] == ["a"]
    fill(store, *units)
    assert [r.id for r in store.records()] == ["a", "b", "c"]


def test_units_without_a_place_are_forgotten_with_all_that_belongs_to_them(store):
    fill(store, read(record("a"), drops=(Drop("read", "bad", "x"),)), read(record("b")))
    write(store, "m", ACCEPTED)
    its = number(store)
    unit, _, _ = store.known_unit(its, "u1")
    store.arrange(its, [(unit, 0)])
    assert [kept.record.id for kept in store.accepted()] == ["b"]
    assert list(store.drops()) == []
    assert store.known_unit(its, "u0") is None


def test_a_source_that_depends_on_something_else_is_forgotten_and_others_stay(store):
    store.open_sources([("set", "1"), ("other", "1")])
    fill(store, read(record("a")))
    fill(store, read(record("b")), source="other")
    store.open_sources([("set", "2"), ("other", "1")])
    assert [r.id for r in store.records()] == ["b"]
    assert store.known_unit(number(store), "u0") is None
    assert store.known_unit(number(store, "other"), "u0") is not None


def test_conversations_come_in_the_corpus_order_with_their_records(store):
    fill(store, read(record("a"), record("b")))
    write(store, "m", ACCEPTED, REJECTED, ACCEPTED)
    turns = (Turn("human", "?"), Turn("gpt", "!"))
    accepted = list(store.accepted())
    assert [kept.item.id for kept in accepted] == ["a#0", "a#2", "b#0", "b#2"]
    made = StoredConversation(Item("a#0", "caption", "en", "", None, 7), record("a"), turns)
    assert replace(accepted[0], row=0) == made
    assert [kept.problems for kept in store.rejected()] == [(Problem("too short", "1"),)] * 2


def test_only_records_made_with_something_else_are_made_again(store):
    fill(store, read(record("a"), record("b")))
    write(store, "m", ACCEPTED)
    its = number(store)
    assert list(store.to_make(its, "m")) == []
    assert [stored.id for records in store.to_make(its, "n") for stored in records] == ["a", "b"]


def test_a_record_that_was_read_again_is_made_again(store):
    """Even though nothing but the time of its file may have changed; it must not be taken for the old one."""
    fill(store, read(record("a"), record("b")))
    write(store, "m", ACCEPTED)
    fill(store, read(record("a", label="dog"), record("b")), read(record("c")))
    chunks = store.to_make(number(store), "m")
    assert [stored.record.id for records in chunks for stored in records] == ["a", "b", "c"]
    assert list(store.accepted()) == []


def test_a_record_that_was_not_read_again_keeps_its_items_when_others_come(store):
    fill(store, read(record("a")))
    write(store, "m", ACCEPTED)
    its = number(store)
    unit, _, _ = store.known_unit(its, "u0")
    new = store.add_unit(its, "new", read(record("0")))
    store.arrange(its, [(new, 0), (unit, 1)])
    assert [stored.id for records in store.to_make(its, "m") for stored in records] == ["0"]


def test_answers_survive_changes_that_do_not_concern_them(store):
    fill(store, read(record("a")))
    write(store, "m", PENDING, PENDING, answers=(b"k0", b"k1"))
    turns = (Turn("human", "q"), Turn("gpt", "a"))
    for kept in store.pending():
        assert kept.record == record("a")
        problems = () if kept.item.id == "a#0" else (Problem("refusal"),)
        store.add_outcome(kept.row, Outcome(kept.item, turns, problems, prompt="p", answer="r"))
    assert store.count_pending() == 0
    # planned anew: the second answer's key stays at another place, the first one's changes
    write(store, "n", PENDING, PENDING, answers=(b"k1", b"k9"))
    assert [(kept.item.id, kept.prompt, kept.answer) for kept in store.rejected()] == [
        ("a#0", "p", "r")
    ]
    assert [kept.item.id for kept in store.pending()] == ["a#1"]
    assert list(store.accepted()) == []


def test_pending_items_are_read_while_outcomes_are_written(store):
    fill(store, read(*(record(f"{i:03}") for i in range(150))))
    write(store, "m", PENDING, ACCEPTED, PENDING, answers=(b"0", b"1", b"2"))
    assert store.count_pending() == 300
    seen = []
    for kept in store.pending():
        seen.append(kept.item.id)
        with store.transaction():
            outcome = Outcome(kept.item, None, (Problem("x"),), requests=1, dollars=0.5)
            store.add_outcome(kept.row, outcome)
    assert seen == [f"{i:03}#{place}" for i in range(150) for place in (0, 2)]
    assert replace(store.usage(), seconds=0) == Usage(requests=300, dollars=150.0)


def test_the_funnel(store):
    drops = (
        Drop("read", "bad file", "x"),
        Drop("read", "bad file", "y"),
        Drop("clean", "small", "z"),
    )
    fill(store, read(record("a"), record("b"), record("c"), duplicates="xxy", drops=drops[:2]))
    its = number(store)
    store.arrange(
        its, [(store.add_unit(its, "u0", read(record("a"), record("c"), drops=drops)), 0)]
    )
    write(store, "m", ACCEPTED, REJECTED, PENDING)
    assert store.funnel() == [
        FunnelRow("set", "read", "", 3),
        FunnelRow("set", "read", "bad file", 2),
        FunnelRow("set", "clean", "", 2),
        FunnelRow("set", "clean", "small", 1),
        FunnelRow("set", "record", "", 2),
        FunnelRow("set", "write", "", 4),
        FunnelRow("set", "write", "pending", 2),
        FunnelRow("set", "check", "", 2),
        FunnelRow("set", "check", "too short", 2),
    ]


def test_what_is_not_committed_is_not_there(store, tmp_path):
    def half() -> None:
        with store.transaction():
            store.add_unit(number(store), "u", read(record("a")))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert store.known_unit(number(store), "u") is None
    store.add_unit(number(store), "u", read(record("a")))
    with sqlite3.connect(tmp_path / "state.sqlite") as other:
        assert other.execute("SELECT count(*) FROM units").fetchone() == (1,)


def test_reading_in_order_needs_no_sorting(store):
    """Else a million conversations would be sorted, in memory or on disk, each time they are read."""
    plans = []
    store._db.set_trace_callback(plans.append)
    list(store.accepted()), list(store.records()), list(store.pending())
    store._db.set_trace_callback(None)
    queries = [sql for sql in plans if sql.startswith("SELECT") and "source =" in sql]
    assert len(queries) >= 3
    for sql in queries:
        for row in store._db.execute(f"EXPLAIN QUERY PLAN {sql}"):
            assert "TEMP B-TREE" not in row[-1], (sql, row)


def test_a_state_of_another_version_or_of_another_tool(tmp_path):
    with sqlite3.connect(tmp_path / "a.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(CorpusError, match="another version"):
        Store(tmp_path / "a.sqlite")
    with sqlite3.connect(tmp_path / "b.sqlite") as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(CorpusError, match="not a database of this tool"):
        Store(tmp_path / "b.sqlite")


def test_an_annotation_that_falls_is_lost_in_the_images_of_its_scope():
    drops = Drops()
    seen = []
    with drops.annotation("table line 2", "cyst"):
        raise Unusable("row that can't be read", "x")
    for name in ("a", "b"):
        with drops.image(name):
            with drops.annotation(f"{name} object 1", "polyp"):
                if name == "a":
                    raise Unusable("box of no size")
            drops.add("duplicate row", name, lost=NOTHING)
            seen.append(sorted(drops.incomplete))
    assert seen == [["cyst", "polyp"], ["cyst"]]
    assert drops.incomplete == {"cyst"}
    assert drops.found == [
        Drop("read", "row that can't be read", "table line 2", "x"),
        Drop("read", "box of no size", "a object 1"),
        Drop("read", "duplicate row", "a"),
        Drop("read", "duplicate row", "b"),
    ]


def test_outside_of_an_annotation_the_image_falls_and_the_next_is_whole():
    drops = Drops()
    with drops.image("a", stage="record") as lost:
        drops.add("crowd annotation", "a", lost=["cell"])
        assert lost == {"cell"}
        raise Unusable("image is truncated", "half")
    with drops.image("b"):
        assert drops.incomplete == set()
    assert drops.found[-1] == Drop("record", "image is truncated", "a", "half")


@pytest.mark.parametrize("lost", [{}, {"lost": [""]}, {"lost": [" "]}])
def test_what_falls_without_a_name_may_be_anything(lost):
    drops = Drops()
    drops.add("row that can't be read", "line 2", **lost)
    assert drops.incomplete == {ANYTHING}
    drops = Drops()
    with drops.annotation("line 2"):
        raise Unusable("row that can't be read")
    assert drops.incomplete == {ANYTHING}
