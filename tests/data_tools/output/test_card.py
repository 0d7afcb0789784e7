# SPDX-License-Identifier: Apache-2.0

import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_tools.output import link
from data_tools.output.build import build
from data_tools.output.card import draw
from tests.data_tools.output.fake_store import corpus, job

HOSTILE = "a | b `c` <script>alert(1)</script> [x](http://evil) $\\alpha$ # **d**\n\n## e"


def read(folder: Path) -> tuple[dict, str]:
    """Front matter and body."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture
def built(tmp_path: Path) -> Path:
    store = corpus(tmp_path, 60)
    other = corpus(tmp_path, 5, source="nc", licence="CC BY-NC-SA 4.0")
    store.all_records += other.all_records
    store.all_accepted += other.all_accepted
    sources = {"blood": {}, "nc": {"licence": "CC BY-NC-SA 4.0", "url": "javascript:alert(1)"}}
    build(store, job(sources, held_out=0.2), tmp_path)
    return tmp_path


def test_front_matter_is_what_the_hub_reads(built):
    front, _ = read(built)
    assert front["license"] == ["cc-by-nc-sa-4.0", "mit"]
    assert front["pretty_name"] == "Demo corpus"
    assert set(front["language"]) == {"en", "zh"}
    assert front["size_categories"] == ["n<1K"]
    assert front["tags"] == ["medical"]
    assert [config["config_name"] for config in front["configs"]] == [
        "caption",
        "instruct",
        "percept",
        "text_single",
        "text_multi",
    ]
    for config in front["configs"]:
        for part in config["data_files"]:
            assert (built / part["path"]).is_file()
            assert (part["split"] == "test") == part["path"].startswith("held_out/")


def test_the_card_says_what_someone_must_know(built):
    _, body = read(built)
    assert "Not for clinical use" in body
    assert "**Share-alike:**" in body
    assert "**Restricted:**" in body
    assert "no commercial use" in body
    assert "python data_tools/generate.py demo.yaml" in body
    assert (
        "| blood | [Blood Cells](https://example.org/blood) | MIT | yes | 60 | 420 | 100.0% |"
        in body
    )
    for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", body):
        assert (built / figure).is_file()


def test_one_licence_is_one_name(tmp_path):
    build(corpus(tmp_path, 3), job(), tmp_path)
    assert read(tmp_path)[0]["license"] == "mit"
    assert "Share-alike" not in read(tmp_path)[1]


def test_hostile_names_stay_text(tmp_path):
    store = corpus(tmp_path, 3, modality=HOSTILE)
    demo = job({"blood": {"dataset": HOSTILE, "licence": HOSTILE}})
    demo.title = HOSTILE
    build(store, demo, tmp_path)
    front, body = read(tmp_path)
    assert front["pretty_name"] == HOSTILE
    assert "<script>" not in body
    assert "\n## e" not in body
    assert "](http://evil" not in body
    row = next(line for line in body.splitlines() if line.startswith("| blood "))
    assert len(re.findall(r"(?<!\\)\|", row)) == 8
    assert "may not be published or passed on" in body


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://example.org/a_b?c=d", "[x](https://example.org/a_b?c=d)"),
        ("", "x"),
        ("ftp://example.org", "x"),
        ("https://example.org/) [y](http://evil", "x"),
        ("https://a b", "x"),
    ],
)
def test_links(url, text):
    assert link("x", url) == text


BLUE = np.array([0x00, 0x72, 0xB2])


def bars(path) -> np.ndarray:
    """Lengths of the blue bars in pixels, from above."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    length = (np.abs(pixels - BLUE).sum(axis=2) < 12).sum(axis=1)
    edges = np.flatnonzero(np.diff((length > 0).astype(int)))
    return np.array(
        [length[a + 1 : b + 1].max() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    )


@pytest.mark.parametrize("count", [1, 2, 38])
def test_a_bar_for_each_name_as_long_as_its_count(tmp_path, count):
    counts = {f"A modality with a long name, number {n}": 1_000 - 20 * n for n in range(count)}
    draw(tmp_path / "a.png", counts, title="Modality")
    found = bars(tmp_path / "a.png")
    expected = np.array(list(counts.values())) / 1_000
    assert len(found) == count
    assert found / found[0] == pytest.approx(expected, abs=0.02)


def test_a_hostile_name_is_drawn_as_text_and_nothing_is_printed(tmp_path, caplog):
    counts = {r"$\frac{$": 2, "a\x00b\nc": 1, "x" * 500: 1, "眼底": 1, "\U00012000": 1}
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path / "a.png", counts, title="Modality")
    assert not caplog.records
    assert len(bars(tmp_path / "a.png")) == 5
    assert Image.open(tmp_path / "a.png").width == 1_080


def test_the_datasets_library_gives_images_of_a_corpus_in_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    build(corpus(tmp_path / "made", 30), job(held_out=0.2, parquet=True), tmp_path / "made")
    found = datasets.load_dataset(str(tmp_path / "made"), "caption", cache_dir=str(tmp_path / "c"))
    assert set(found) == {"train", "test"}
    row = found["train"][0]
    assert row["image"].size == (row["width"], row["height"])
