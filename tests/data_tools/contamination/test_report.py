# SPDX-License-Identifier: Apache-2.0

"""The page in a real browser, and texts that try to break it."""

import csv
import json
from pathlib import Path

import pytest

from tests.browser import look
from tests.data_tools.contamination.sides import (
    as_base64,
    compare,
    picture,
    write_benchmark,
    write_corpus,
    write_tsv,
)

HOSTILE = '</td><script>document.title="hit"</script><img src=x onerror=alert(1)> | \u202e x'


def write(tmp_path: Path, *, hostile: bool = False) -> Path:
    mixture, benchmark = write_corpus(tmp_path / "corpus"), write_benchmark(tmp_path / "bench")
    if hostile:
        name = "x" * 150 + "<script>.png"
        picture(0).save(tmp_path / "bench" / "imgs" / name)
        rows = json.loads((benchmark / "test.json").read_text())
        rows[0] |= {"img_name": name, "question": f"{HOSTILE} is here", "qid": HOSTILE}
        (benchmark / "test.json").write_text(json.dumps(rows))
        seen = mixture.with_name("seen.jsonl")
        told = {"id": HOSTILE, "image": "copy.png", "conversations": [
            {"from": "human", "value": f"{HOSTILE} is here"}, {"from": "gpt", "value": HOSTILE},
        ]}  # fmt: skip
        seen.write_text(seen.read_text() + json.dumps(told) + "\n")
    compare(mixture, benchmark, folder=tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_pairs_stand_side_by_side_on_wide_and_narrow_screens(browser, tmp_path, dark):
    for found in look(browser, write(tmp_path) / "report.html", dark=dark):
        assert (found["overflow"], found["outside"], found["strange"]) == (0, 0, 0)
        assert found["links"]
        assert found["dark"] == dark
        assert found["contrast"] >= 4.5
        assert len(found["pictures"]) == 12  # six pairs
        assert all(width > 0 for width in found["pictures"])


@pytest.mark.slow
def test_names_and_texts_that_are_html_stay_text(browser, tmp_path):
    out = write(tmp_path, hostile=True)
    for found in look(browser, out / "report.html"):
        assert (found["overflow"], found["outside"], found["strange"]) == (0, 0, 0)
        assert found["title"] != "hit"
    assert "<script>document" not in (out / "report.md").read_text(encoding="utf-8")


def test_pictures_out_of_a_table_are_shown_too(tmp_path: Path) -> None:
    mixture = write_corpus(tmp_path / "corpus")
    coded = as_base64(tmp_path / "corpus" / "images" / "copy.png")
    write_tsv(
        tmp_path / "b.tsv", [{"index": 0, "image": coded, "question": "What?", "answer": "x"}]
    )
    out = tmp_path / "out"
    compare(mixture, tmp_path / "b.tsv", folder=out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert (
        page.count("data:image/jpeg;base64,") == 4
    )  # copy.png and copy_as_rgb.tif, each beside the row's
    assert "b.tsv, row 1" in page
    rows = list(csv.DictReader((out / "near.tsv").open(), delimiter="\t"))
    assert [row["relation"] for row in rows] == ["same pixels"] * 2
