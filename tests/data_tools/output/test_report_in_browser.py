# SPDX-License-Identifier: Apache-2.0

"""The report in a real browser: nothing overflows, boxes lie where they belong, text can be read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data_tools.output.build import build
from tests.data_tools.output.fake_store import corpus, job, kept, rejected
from tests.data_tools.output.test_report import hostile_corpus

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=8000",
    "--window-size=1400,1000",
)
# Reports run in frames of a page that may run scripts; their own policy forbids them any.
MEASURE = """
function luminance(color) {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}
function background(element, view) {
  for (let e = element; e; e = e.parentElement) {
    const color = view.getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color;
  }
  return 'rgb(255, 255, 255)';
}
function measure(frame) {
  const view = frame.contentWindow, page = view.document, all = [...page.body.querySelectorAll('*')];
  const texts = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) &&
    e.getClientRects().length && e.tagName !== 'title');
  const contrast = texts.map(e => {
    const a = luminance(view.getComputedStyle(e).color), b = luminance(background(e, view));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  const width = page.documentElement.clientWidth;
  const scrolls = e => { for (; e; e = e.parentElement) if (e.className === 'card scroll') return true; };
  return {
    width, overflow: page.documentElement.scrollWidth - width,
    outside: all.filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e)).length,
    pictures: [...page.images].map(i => i.naturalWidth),
    boxes: [...page.querySelectorAll('rect')].map(r => {
      const i = r.closest('.picture').querySelector('img').getBoundingClientRect();
      const b = r.getBoundingClientRect();
      return [(b.left - i.left) / i.width, (b.top - i.top) / i.height,
              (b.right - i.left) / i.width, (b.bottom - i.top) / i.height];
    }),
    contrast: Math.min(...contrast), texts: texts.length, dark: luminance(
      view.getComputedStyle(page.body).backgroundColor) < 0.2,
    links: [...page.querySelectorAll('nav a')].every(a => page.getElementById(a.hash.slice(1))),
    strange: page.querySelectorAll('script, img:not([src^="data:"]), iframe, object').length,
    attacked: document.title,
  };
}
addEventListener('load', () => {
  document.body.dataset.found = JSON.stringify([...document.querySelectorAll('iframe')].map(measure));
});
"""


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")


def look(
    browser: str, folder: Path, *, dark: bool, widths: tuple[int, ...] = (1_280, 390)
) -> list[dict]:
    """What is measured in the report, one dict a width."""
    report = html.escape((folder / "report.html").read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{report}"></iframe>'
        for width in widths
    )
    page = folder / "look.html"
    page.write_text(f"<!doctype html><title>look</title><body><script>{MEASURE}</script>{frames}")
    done = subprocess.run(
        [
            browser,
            *FLAGS,
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("dark", [False, True])
def test_a_report_on_wide_and_narrow_screens(browser, tmp_path, dark):
    store = corpus(tmp_path, 12)
    store.all_accepted.append(kept(store.all_records[0], "region_caption", focus=1, id="focus"))
    store.all_rejected = [
        rejected(one, "another label of the set is claimed") for one in store.all_records
    ]
    build(store, job(held_out=0.2), tmp_path)
    wide, narrow = look(browser, tmp_path, dark=dark)
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


def test_a_hostile_report_breaks_neither_the_page_nor_its_layout(browser, tmp_path):
    build(*hostile_corpus(tmp_path), tmp_path)
    for found in look(browser, tmp_path, dark=False):
        assert (found["overflow"], found["outside"], found["strange"]) == (0, 0, 0)
        assert found["attacked"] == "look"
        assert set(found["pictures"]) == {64}
