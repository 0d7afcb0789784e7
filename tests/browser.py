# SPDX-License-Identifier: Apache-2.0

"""A real Chromium, and what is measured in a report that it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # no name but this machine's is looked up, so that nothing could be loaded from elsewhere
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
MEASURE = """
() => {
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
  const view = window, page = document, all = [...page.body.querySelectorAll('*')];
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
    title: page.title,
  };
}
"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser that is installed; the test is skipped where none is."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield running
        running.close()


def look(
    browser: Browser, file: Path, *, dark: bool = False, widths: tuple[int, ...] = (1_280, 390)
) -> list[dict[str, Any]]:
    """What is measured in a report, one dict a width; nothing may be asked of anybody, no script run."""
    found = []
    for width in widths:
        opened = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        asked: list[str] = []
        opened.on("request", lambda request, asked=asked: asked.append(request.url))
        opened.on("dialog", lambda dialog, asked=asked: asked.append(dialog.message))
        opened.goto(file.as_uri())
        found.append(opened.evaluate(MEASURE))
        assert [one for one in asked if not one.startswith("data:")] == [file.as_uri()]
        opened.close()
    return found
