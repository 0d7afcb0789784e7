# SPDX-License-Identifier: Apache-2.0

"""The page's elements, by what they are called in ``data-testid``."""

from pathlib import Path

from playwright.sync_api import Locator, Page, expect

WAIT = 60_000
"""Milliseconds for what takes a moment on two busy cores."""


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
