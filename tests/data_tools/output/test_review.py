# SPDX-License-Identifier: Apache-2.0

"""The review: a blinded page in a browser, its verdicts, and the error rate in card and report."""

from __future__ import annotations

import json
import shutil

import pytest

from data_tools.generate import main
from data_tools.output import review
from gmai_xtuner.core.errors import CorpusError


@pytest.fixture
def corpus(classes, make_job, tmp_path):
    job = make_job({}, make={"caption": 2, "perception": 2, "chinese": 0}, corpus={"held_out": 0})
    assert main([str(job)]) == 0
    return job, tmp_path / "out"


def test_wilson():
    assert review.wilson(0.1, 100) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert review.wilson(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)


def test_verdicts_become_the_error_rate(corpus, tmp_path):
    job, out = corpus
    assert main([str(job), "--review", "12"]) == 0
    page = (out / "review.html").read_text(encoding="utf-8")
    keys = page.split('data-key="')[1:]
    keys = [part.split('"')[0] for part in keys]
    assert len(set(keys)) == len(keys) == 12
    for hidden in ("tissue", "CC BY 4.0", "image 1.png", "annotated"):
        assert hidden not in page
    verdicts = [{"key": key, "verdict": "right"} for key in keys[:10]]
    verdicts += [
        {"key": keys[10], "verdict": "wrong", "what": "side"},
        {"key": keys[11], "verdict": "unclear"},
    ]
    file = tmp_path / "verdicts.json"
    file.write_text(
        json.dumps({"reviewer": "A", "verdicts": [*verdicts, {"key": "0", "verdict": "right"}]})
    )
    assert main([str(job), "--verdicts", str(file)]) == 0
    found = json.loads((out / "summary.json").read_text())["review"]
    assert (found["judged"], found["wrong"], found["unclear"], found["outdated"]) == (11, 1, 1, 1)
    assert 0 < found["low"] < found["error_rate"] < found["high"] < 0.6
    for name in ("README.md", "report.html"):
        assert "people judged 11" in (out / name).read_text().lower()


def test_a_file_that_is_no_review_changes_nothing(corpus, tmp_path):
    _, out = corpus
    file = tmp_path / "verdicts.json"
    for text in ("{}", '{"reviewer": "A", "verdicts": [{"key": "x", "verdict": "fine"}]}', "["):
        file.write_text(text)
        with pytest.raises(CorpusError, match="Nothing was taken in"):
            review.take(out, [file])
    assert not (out / review.VERDICTS).exists()


@pytest.mark.slow
def test_the_browser_saves_what_was_clicked(corpus, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or pytest.skip("no chromium")
    job, out = corpus
    assert main([str(job), "--review", "4"]) == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((out / "review.html").as_uri())
        page.fill("#reviewer", "B")
        page.locator("article").nth(1).locator("input[value=wrong]").check()
        page.locator("article").nth(1).locator("select").select_option("side")
        with page.expect_download() as saved:
            page.click("#save")
        saved.value.save_as(tmp_path / "saved.json")
        browser.close()
    (verdict,) = json.loads((tmp_path / "saved.json").read_text())["verdicts"]
    assert (verdict["verdict"], verdict["what"]) == ("wrong", "side")
    assert review.take(out, [tmp_path / "saved.json"]) == 1
