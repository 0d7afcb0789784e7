# SPDX-License-Identifier: Apache-2.0

"""The page's elements, by what they are called in ``data-testid``, in a real Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # no name but this machine's is looked up, so that nothing could be loaded from elsewhere
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
WAIT = 60_000
"""Milliseconds for what takes a moment on two busy cores."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser that is installed; the test is skipped where none is."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield running
        running.close()


def at(page: Page, name: str) -> Locator:
    return page.get_by_test_id(name)


def upload(page: Page, *files: Path) -> None:
    at(page, "upload").locator("input[type=file]").set_input_files([str(file) for file in files])


def ask(page: Page, question: str) -> None:
    at(page, "question").fill(question)
    settled(page)
    at(page, "ask").click()


def settled(page: Page) -> None:
    """Wait until nothing moves: a button that slides away between press and release isn't clicked."""
    page.wait_for_function(
        "document.getAnimations().every("
        "one => !(one instanceof CSSTransition) || one.playState !== 'running')",
        timeout=WAIT,
    )


def done(page: Page, model: int, *, nth: int = -1, state: str = "done") -> Locator:
    """The answer of a model, when it has come to its end."""
    answer = at(page, f"answer-{model}").nth(nth)
    expect(answer).to_have_attribute("data-state", state, timeout=WAIT)
    return answer
