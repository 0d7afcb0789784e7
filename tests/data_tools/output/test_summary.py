# SPDX-License-Identifier: Apache-2.0

import re
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from data_tools.output import duration, summary
from data_tools.output.build import build
from data_tools.records import Label
from data_tools.store import FunnelRow, Usage
from tests.data_tools.output.fake_store import FakeStore, draw, job, kept, record, rejected
from tests.tables import tables

TABLES = tables(__file__)
SOURCES = {
    "blood": {},
    "chest": {"dataset": "Chests", "licence": "CC BY-SA 4.0", "url": "", "negatives": False},
    "nothing": {"dataset": ""},
    "not asked for": {},
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    """Four blood records and two chest records, the two of one patient; counted by hand below."""
    folder = tmp_path_factory.mktemp("corpus")
    blood = [record(n) for n in range(4)]
    chest = [
        record(
            10 + n,
            source="chest",
            licence="CC BY-SA 4.0",
            modality="X-ray",
            department="Pulmonary Medicine",
            clinical_task=None,
            source_task="2D classification",
            labels=(Label("pneumonia"),),
            group="chest/patient1",
        )
        for n in range(2)
    ]
    for one in (*blood, *chest):
        draw(folder, one)
    accepted = [
        *(kept(one, "caption") for one in blood),
        kept(blood[0], "perception", kind="yes_no"),
        kept(blood[1], "perception", kind="detection", language="zh"),
        kept(chest[0], "dialogue"),
    ]
    refused = [rejected(one, "a refusal") for one in chest] + [rejected(chest[0], "too short")]
    store = FakeStore(
        [*blood, *chest],
        accepted,
        refused,
        rows=[
            FunnelRow("blood", "check", "", 6),
            FunnelRow("blood", "read", "picture can't be read", 1),
            FunnelRow("blood", "read", "", 4),
            FunnelRow("blood", "read", "no annotation", 2),
            FunnelRow("blood", "write", "pending", 5),
            FunnelRow("nothing", "read", "", 0),
        ],
        used=Usage(12, 3, 4_000, 500, 0.25, 65.4),
    )
    return build(store, job(SOURCES, held_out=0), folder)


@pytest.mark.parametrize("key", TABLES["counted"])
def test_what_is_counted(counted, key):
    assert reduce(getitem, key.split("/"), counted) == TABLES["counted"][key]


def test_each_source_has_its_own_counts(counted):
    assert list(counted["sources"]) == ["blood", "chest", "nothing"]
    blood = counted["sources"]["blood"]
    assert (blood["records"], blood["conversations"], blood["acceptance"]) == (4, 6, 1.0)
    # in the order of the stages, largest drops first
    found = [[row["stage"], row["reason"], row["count"]] for row in blood["funnel"]]
    assert found == TABLES["funnel of blood"]
    assert counted["sources"]["nothing"]["acceptance"] is None
    assert counted["sources"]["nothing"]["dataset"] == "nothing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 6}, "Every conversation is held out: the 3 group"),
        ({"records_held_out": 0}, "Nothing is held out: none of the 3 group"),
        ({"largest": 40, "groups": 100}, "40 of 100 groups hang together"),
    ],
)
def test_a_split_that_went_wrong_is_a_warning(counted, changes, message):
    values = {
        "conversations": {"count": 6, "held_out": changes.get("held_out", 1)},
        "records": {"count": 6, "pictures": 6, "held_out": changes.get("records_held_out", 1)},
        "split": {
            "share": 0.05,
            "groups": changes.get("groups", 3),
            "largest": changes.get("largest", 1),
        },
        "sources": {},
        "licences": [],
        "left_out": {},
    }
    (found,) = summary.warnings(values)
    assert found.startswith(message)


def test_every_key_is_documented(counted):
    text = (Path(__file__).parents[3] / "docs/corpus.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", text.split("Keys of `summary.json`")[1]))
    assert set(counted) <= documented
    for key in ("records", "conversations", "split", "usage"):
        assert set(counted[key]) <= documented
    assert set(counted["sources"]["blood"]) <= documented


def test_labels_are_bounded(monkeypatch):
    records = [record(n, labels=(Label(f"free text {n}"),)) for n in range(300)]
    monkeypatch.setattr(summary, "_DISTINCT_LABELS", 100)
    tally = summary.Tally()
    for one in records * 2:
        tally.record(one)
    assert set(tally._labels["blood"].values()) == {2}
    assert len(tally._labels["blood"]) == 100


def test_lines_for_a_terminal(counted):
    found = summary.as_text(counted).splitlines()
    assert found[:5] == [
        "Demo corpus",
        "  6 records of 6 pictures, 0 records held out",
        "  7 conversations, 0 held out; 3 rejected (70.0% accepted)",
        "  written by template",
        "  12 requests, 3 answered from the cache, $0.25, 1 min 5 s",
    ]
    assert (
        "chest                                      2              1         3     25.0%" in found
    )
    assert f"  {'read: no annotation':<62}{2:>12}" in found
    assert f"  Microscopy                                 4   66.7%  {'#' * 30}" in found
    assert found[-5:] == [f"  - {text}" for text in counted["warnings"]]


def test_a_hostile_name_cannot_move_the_terminals_cursor(counted):
    counted = counted | {"title": "a\x1b[2Jb", "warnings": ["c\rd\x9be"]}
    text = summary.as_text(counted)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.4, "59 s"), (59.6, "1 min 0 s"), (3_599.7, "1 h 0 min"), (7_500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_picture_of_two_classes_is_told(tmp_path):
    records = [record(number) for number in range(3)]
    other = replace(records[0], id="other", labels=(Label("platelet"),))
    store = FakeStore([*records, other], [kept(one) for one in (*records, other)])
    for one in records:
        draw(tmp_path, one)
    found = build(store, job(held_out=0), tmp_path)["warnings"]
    assert [line for line in found if "same picture" in line] == [
        "1 record(s) show the same picture as another record, with other labels or attributes (a file that "
        "lies in two class folders, say). Their answers may contradict each other: look at them."
    ]
