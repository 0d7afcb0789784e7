# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from data_tools.output import build as builder
from data_tools.output import files
from data_tools.output.build import build
from data_tools.records import Drop
from data_tools.store import FunnelRow, Usage
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.mixture import load_mixture
from gmai_xtuner.core.records import iter_raw
from tests.data_tools.conftest import files_of
from tests.data_tools.output.fake_store import FakeStore, corpus, draw, job, kept, record, rejected

ALWAYS = {"mixture.yaml", "held_out.yaml", "README.md", "report.html", "summary.json"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_the_same_store_gives_the_same_bytes(tmp_path):
    for name, seconds in (("a", 1.5), ("b", 77.0)):
        store = corpus(tmp_path / name)
        store.used = Usage(seconds=seconds)
        build(store, job(held_out=0.2, parquet=True), tmp_path / name)
    one, other = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert one == other
    assert len([name for name in one if name.endswith(".parquet")]) == 11
    assert {"README.md", "figures/modality.png", "held_out/caption.jsonl"} < set(one)


def test_everything_is_there_and_the_summary_is_the_file(tmp_path):
    store = corpus(tmp_path, 60)
    store.all_rejected = [rejected(one, "a refusal") for one in store.all_records[:7]]
    store.left_out = [("blood", Drop("read", "picture can't be read", "x.png", "truncated"))]
    summary = build(store, job(held_out=0.2), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= ALWAYS | {"figures", "held_out", "images", "rejected.jsonl", "dropped.jsonl"}
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    assert lines(tmp_path / "dropped.jsonl") == [{"source": "blood"} | asdict(store.left_out[0][1])]
    assert [line["id"] for line in lines(tmp_path / "records.jsonl")] == [
        one.id for one in store.all_records
    ]
    assert len(lines(tmp_path / "rejected.jsonl")) == 7
    for name, file in summary["files"].items():
        data = (tmp_path / name).read_bytes()
        assert (data.count(b"\n"), len(data)) == (file["lines"], file["bytes"])
        assert hashlib.sha256(data).hexdigest() == file["sha256"]


def test_records_that_share_a_stored_picture_are_on_one_side(tmp_path):
    """Two patients with the same file: the one takes the other along."""
    records = [record(n, group=f"blood/patient{n}") for n in range(80)]
    twins = [
        record(100 + n, group=f"blood/other{n}", image=one.image) for n, one in enumerate(records)
    ]
    for one in records:
        draw(tmp_path, one)
    store = FakeStore([*records, *twins], [kept(one) for one in (*records, *twins)])
    summary = build(store, job(held_out=0.3), tmp_path)
    images = [
        {line["image"] for line in lines(tmp_path / side / "caption.jsonl")}
        for side in ("", "held_out")
    ]
    assert all(images)
    assert not images[0] & images[1]
    assert summary["records"]["pictures"] == 80
    assert summary["split"]["linked"] == 160


def test_near_identical_pictures_are_on_one_side_if_asked_for(tmp_path):
    records = [record(n) for n in range(60)]
    for n, one in enumerate(records):
        draw(tmp_path, one, seed=n // 2)  # stored under two names: they differ in a few pixels
        with open(tmp_path / one.image, "ab") as file:
            file.write(bytes(n % 2))
    store = FakeStore(records, [kept(one) for one in records])

    def sides(**options) -> list[bool]:
        build(store, job(held_out=0.3, **options), tmp_path)
        held = {line["image"] for line in lines(tmp_path / "held_out" / "caption.jsonl")}
        return [one.image in held for one in records]

    apart, together = sides(), sides(near_duplicates=2)
    assert any(apart[n] != apart[n + 1] for n in range(0, 60, 2))
    assert all(together[n] == together[n + 1] for n in range(0, 60, 2))
    assert {True, False} == set(together)
    assert json.loads((tmp_path / "summary.json").read_text())["split"]["near_duplicates"] == 30


def test_a_refused_licence_is_nowhere_but_in_the_summary(tmp_path):
    store = corpus(tmp_path, 10)
    other = corpus(tmp_path, 10, source="private", licence="CC BY-NC 4.0")
    store.all_records += other.all_records
    store.all_accepted += other.all_accepted
    store.all_rejected = [rejected(one, "a refusal") for one in other.all_records]
    sources = {"blood": {}, "private": {"licence": "CC BY-NC 4.0"}}
    summary = build(store, job(sources, refuse=["non-commercial"]), tmp_path)
    for path in tmp_path.rglob("*.jsonl"):
        assert b"private" not in path.read_bytes()
    assert not (tmp_path / "rejected.jsonl").exists()
    assert summary["records"]["count"] == 10
    assert summary["sources"]["private"]["records"] == 0
    assert summary["left_out"] == {
        "private": {"reason": "licence is refused: non-commercial", "records": 10}
    }
    assert [row["licence"] for row in summary["licences"]] == ["MIT"]


def test_prompts_are_written_if_asked_for(tmp_path):
    store = corpus(tmp_path, 3)
    asked = store.all_accepted[0]
    store.all_accepted[0] = type(asked)(
        asked.item, asked.record, asked.conversation, (), "the prompt", "the answer"
    )
    build(store, job(prompts=True), tmp_path)
    assert lines(tmp_path / "prompts.jsonl") == [
        {"id": asked.item.id, "prompt": "the prompt", "answer": "the answer"}
    ]
    build(store, job(), tmp_path)
    assert not (tmp_path / "prompts.jsonl").exists()


def test_nothing_accepted_is_a_corpus_without_a_mixture_that_says_so(tmp_path):
    store = corpus(tmp_path, 5)
    store.all_rejected = [rejected(one, "a refusal") for one in store.all_records]
    store.all_accepted = []
    summary = build(store, job(), tmp_path)
    assert not (tmp_path / "mixture.yaml").exists()
    assert summary["warnings"][0].startswith("No conversation was accepted")
    assert "a refusal" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_record_at_all_still_makes_a_report(tmp_path):
    store = FakeStore([], [], rows=[FunnelRow("blood", "read", "picture can't be read", 3)])
    summary = build(store, job(near_duplicates=1, parquet=True), tmp_path)
    assert summary["files"] == {}
    assert "Source blood gave no record. Its funnel says why." in summary["warnings"]
    assert not (tmp_path / "figures").exists()
    assert "picture can&#39;t be read" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_stored_picture_that_is_gone_stops_and_leaves_the_old_corpus(tmp_path):
    store = corpus(tmp_path, 3)
    build(store, job(), tmp_path)
    before = files_of(tmp_path)
    for one in store.all_records:
        (tmp_path / one.image).unlink()
    with pytest.raises(CorpusError, match=r"blood_\d\.png: a stored image can't be read"):
        build(store, job(), tmp_path)
    gone = {name for name in before if name.startswith("images/")}
    assert files_of(tmp_path) == {name: before[name] for name in before.keys() - gone}


def test_a_text_without_a_picture_is_in_the_corpus_once(tmp_path):
    """The same words on both sides of the split would be learnt and then examined."""
    store = corpus(tmp_path, 40)
    same = "The result is a platelet."
    records = store.all_records
    store.all_accepted = [
        kept(one, form, answer=same) for one in records for form in ("caption", "text_single")
    ]
    store.rows.append(FunnelRow("blood", "check", "", 80))
    summary = build(store, job(held_out=0.3), tmp_path)
    found = [*tmp_path.rglob("text_single.jsonl")]
    assert sum(len(lines(path)) for path in found) == 1
    captions = [*tmp_path.rglob("caption.jsonl")]
    assert sum(len(lines(path)) for path in captions) == 40
    assert summary["conversations"]["count"] == 41
    assert summary["conversations"]["repeated"] == 39
    checks = [row for row in summary["sources"]["blood"]["funnel"] if row["stage"] == "check"]
    assert [(row["reason"], row["count"]) for row in checks] == [
        ("", 41), ("text that is in the corpus already", 39)
    ]  # fmt: skip


CAPTION, INSTRUCTION, TEXT = "Medical Captioning", "Medical Instruction", "Medical Text"


def read(file: Path) -> dict[str, list]:
    """Every dataset's conversations as a training reads them; pictures must be there."""
    found = {}
    for entry in load_mixture(file).entries:
        found[entry.name] = [
            parse_raw(raw, dataset=entry.name)
            for path in entry.annotations
            for raw in iter_raw(path)
        ]
        assert len(found[entry.name]) == entry.size
        for conversation in found[entry.name]:
            assert bool(conversation.images) == (entry.image_root is not None)
            for image in conversation.images:
                assert (entry.image_root / image).is_file()
    return found


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, FakeStore]:
    store = corpus(tmp_path, 60)
    builder.build(store, job(held_out=0.3), tmp_path)
    return tmp_path, store


def test_a_training_reads_every_conversation_and_none_that_is_held_out(built):
    folder, store = built
    training, held_out = read(folder / "mixture.yaml"), read(folder / "held_out.yaml")
    ids = [one.id for part in (training, held_out) for found in part.values() for one in found]
    assert sorted(ids) == sorted(kept.item.id for kept in store.all_accepted)
    images = [
        {image for found in part.values() for one in found for image in one.images}
        for part in (training, held_out)
    ]
    assert all(images)
    assert not images[0] & images[1]


def test_categories_and_ratios_are_those_of_the_papers_table_7(built):
    entries = {entry.name: entry for entry in load_mixture(built[0] / "mixture.yaml").entries}
    assert {
        name: (one.category, one.quality, *one.ratios.values()) for name, one in entries.items()
    } == {
        "demo-corpus-caption": (CAPTION, "high", 1, 1, 1),
        "demo-corpus-instruct": (INSTRUCTION, "high", 1, 1, 1),
        "demo-corpus-percept": (INSTRUCTION, "high", 1, 1, 1),
        "demo-corpus-text-single": (TEXT, "high", 0, 0, 1),
        "demo-corpus-text-multi": (TEXT, "high", 0, 0, 1),
    }


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Our Corpus: 2026 / v1", "our-corpus-2026-v1-percept"),
        ("眼底 数据", "眼底-数据-percept"),
        ("--- #!?", "corpus-percept"),
        ('a: "b"\n- c', "a-b-c-percept"),
    ],
)
def test_a_title_becomes_part_of_the_names(tmp_path, title, name):
    (tmp_path / "percept.jsonl").write_text("{}\n")
    files.write_mixtures(tmp_path, title=title, files={"percept.jsonl": {"lines": 1}})
    (entry,) = load_mixture(tmp_path / "mixture.yaml").entries
    assert entry.name == name
