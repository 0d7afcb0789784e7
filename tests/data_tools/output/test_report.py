# SPDX-License-Identifier: Apache-2.0

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.items import Problem
from data_tools.output import report
from data_tools.output.build import build
from data_tools.output.report import Chosen, thumbnail
from data_tools.records import Label
from data_tools.store import FunnelRow, StoredConversation
from tests.browser import look
from tests.data_tools.output.fake_store import (
    FakeStore,
    corpus,
    draw,
    item,
    job,
    kept,
    record,
    rejected,
)

HOSTILE = (
    '"><img src=x onerror=alert(1)></style><script>alert(2)</script>{{ 7*7 }}&amp;\u202eabc\x00'
)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def hostile_corpus(folder: Path) -> tuple[FakeStore, object]:
    """Hostile text in every place that a source, a model or the job's author can write to."""
    one = record(
        0,
        id=f"2d#{HOSTILE}",
        modality=HOSTILE,
        department=HOSTILE,
        labels=(Label(HOSTILE, (0, 0, 9, 9)), Label("x" * 5_000)),
    )
    draw(folder, one)
    problem = Problem(HOSTILE, HOSTILE)
    store = FakeStore(
        [one],
        [
            kept(one, answer=HOSTILE),
            StoredConversation(item(one, "dialogue"), one, kept(one).conversation, (), HOSTILE, ""),
        ],
        [StoredConversation(item(one, "instruction"), one, None, (problem,), HOSTILE, HOSTILE)],
        [FunnelRow("blood", "read", HOSTILE, 3)],
    )
    demo = job(
        {"blood": {"dataset": HOSTILE, "licence": HOSTILE, "url": "javascript:alert(1)"}},
        held_out=0,
    )
    demo.title = demo.writer.model = HOSTILE
    return store, demo


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    build(*hostile_corpus(tmp_path), tmp_path)
    found = page(tmp_path)
    assert not found.all("script")
    assert all(
        str(image["src"]).startswith("data:image/jpeg;base64,") for image in found.all("img")
    )
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(str(a["href"]).startswith("#") for a in found.all("a"))
    shown = HOSTILE.replace("\x00", "␀").replace("\u202e", "�")
    assert found.text.count(shown) >= 12
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", raw)
    assert "49" not in found.text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    build(corpus(tmp_path, 5), job(), tmp_path)
    found = page(tmp_path)
    (policy,) = [m["content"] for m in found.all("meta") if m.get("http-equiv")]
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not found.all("link")
    assert "url(" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_boxes_lie_over_a_clean_picture(tmp_path):
    """The stored picture is the thumbnail; its boxes are shapes of their own, in pixels of the record."""
    one = record(0, labels=(Label("a", (2, 3, 20, 30)), Label("b", (30, 10, 40, 20))))
    draw(tmp_path, one)
    stored = np.asarray(Image.open(tmp_path / one.image)).astype(int)
    store = FakeStore([one], [kept(one, "region_caption", focus=1)])
    build(store, job(held_out=0), tmp_path)
    found = page(tmp_path)
    assert found.all("svg")[0]["viewbox"] == "0 0 64 48"
    shapes = [(r["x"], r["y"], r["width"], r["height"], r.get("class")) for r in found.all("rect")]
    assert shapes == [("2", "3", "18", "27", None), ("30", "10", "10", "10", "focus")]
    data = base64.b64decode(str(found.all("img")[0]["src"]).split(",")[1])
    shown = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(shown - stored).mean() < 6


def test_the_page_stays_small_with_large_pictures(tmp_path):
    records = [record(n, width=1_600, height=1_200) for n in range(30)]
    for n, one in enumerate(records):
        noise = np.random.default_rng(n).integers(0, 255, (1_200, 1_600, 3), dtype=np.uint8)
        path = tmp_path / one.image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path, quality=50, format="JPEG")
    many = [record(0, labels=tuple(Label("x", (n, n, n + 5, n + 5)) for n in range(900)))]
    accepted = [
        kept(one, form, answer="long " * 9_000)
        for one in records
        for form in ("caption", "dialogue")
    ]
    store = FakeStore([*records], [*accepted, kept(many[0], "perception")])
    build(store, job(), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert "the first 40 drawn" in page(tmp_path).text


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_thumbnails_of_every_kind_of_picture(tmp_path, mode):
    one = record()
    (tmp_path / one.image).parent.mkdir(parents=True)
    Image.new("RGBA", (64, 48), (200, 10, 10, 255)).convert(mode).save(tmp_path / one.image)
    data = base64.b64decode(thumbnail(tmp_path, kept(one)).split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (64, 48)


def test_examples_are_spread_over_sources_and_forms_and_chosen_by_their_seed():
    chosen = Chosen()
    for n in range(2_000):
        one = kept(record(n, source="large"), "caption")
        chosen.add(one, ("large", "caption"))
    for n in range(3):
        for form in ("caption", "dialogue"):
            chosen.add(kept(record(n, source="small"), form), ("small", form))
    keys = [(one.record.provenance.source, one.item.form) for one in chosen.spread(6)]
    assert (
        sorted(keys[:3])
        == sorted(keys[3:])
        == [("large", "caption"), ("small", "caption"), ("small", "dialogue")]
    )
    assert len(chosen.spread(4)) == 4
    assert chosen.spread(0) == []


def test_which_examples_are_chosen_does_not_depend_on_their_order():
    found = []
    for step in (1, -1):
        chosen = Chosen()
        for n in list(range(500))[::step]:
            chosen.add(kept(record(n)), "key")
        found.append([one.item.id for one in chosen.spread(9)])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_stage_shows_what_came_through_and_what_did_not():
    rows = [
        {"stage": "read", "reason": "", "count": 75},
        {"stage": "read", "reason": "picture can't be read", "count": 25},
        {"stage": "check", "reason": "a refusal", "count": 4},
    ]
    read, check = report.funnel(rows)
    assert (read["count"], read["dropped"], read["width"], read["lost"]) == (75, 25, 75, 25)
    assert (check["count"], check["dropped"], check["width"], check["lost"]) == (0, 4, 0, 100)
    # A set of classes has no regions, so no stage of them.
    rows = [
        {"stage": "read", "reason": "", "count": 4},
        {"stage": "clean", "reason": "", "count": 0},
    ]
    assert [stage["title"] for stage in report.funnel(rows)] == ["read"]
    rows.append({"stage": "clean", "reason": "empty mask", "count": 2})
    assert [stage["lost"] for stage in report.funnel(rows)] == [0, 100]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_on_wide_and_narrow_screens(browser, tmp_path, dark):
    store = corpus(tmp_path, 12)
    store.all_accepted.append(kept(store.all_records[0], "region_caption", focus=1, id="focus"))
    store.all_rejected = [
        rejected(one, "another label of the set is claimed") for one in store.all_records
    ]
    build(store, job(held_out=0.2), tmp_path)
    wide, narrow = look(browser, tmp_path / "report.html", dark=dark)
    assert (wide["width"] > 1_200, narrow["width"] < 400) == (True, True)
    for found in (wide, narrow):
        assert (found["overflow"], found["outside"], found["strange"]) == (0, 0, 0)
        assert found["links"]
        assert found["dark"] == dark
        assert found["texts"] > 150
        assert found["contrast"] >= 4.5  # WCAG AA
        assert len(found["pictures"]) >= 10
        assert set(found["pictures"]) == {64}
        expected = {(2 / 64, 3 / 48, 20 / 64, 30 / 48), (30 / 64, 10 / 48, 40 / 64, 20 / 48)}
        for box in found["boxes"]:
            near = [max(abs(a - b) for a, b in zip(box, one, strict=True)) for one in expected]
            assert min(near) < 0.02  # half of a line's width
        assert len(found["boxes"]) == 2 * len(found["pictures"])


@pytest.mark.slow
def test_a_hostile_report_breaks_neither_the_page_nor_its_layout(browser, tmp_path):
    build(*hostile_corpus(tmp_path), tmp_path)
    for found in look(browser, tmp_path / "report.html"):
        assert (found["overflow"], found["outside"], found["strange"]) == (0, 0, 0)
        assert set(found["pictures"]) == {64}
