# SPDX-License-Identifier: Apache-2.0

"""Small widgets that both panels use."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from PIL import Image

from gmai_xtuner.demo.i18n import Language, PageError

LONGEST_SIDE = 1024
"""Of a picture on the screen; the model gets all of it."""


def data_url(picture: Image.Image, *, longest: int = LONGEST_SIDE) -> str:
    """An image as text: it goes to the page without ever being a file or having an address."""
    shown = picture
    if max(picture.size) > longest:
        share = longest / max(picture.size)
        size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
        shown = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_element(url: str, *, about: str, name: str) -> Any:
    """An ``<img>``.

    Args:
        url: of the image.
        about: what it is, for who can't see it.
        name: that tests find it by.
    """
    element = ui.element("img")
    element.props["src"] = url
    element.props["alt"] = about
    return named(element, name)


def named(element: Any, name: str) -> Any:
    """The element, with a name that tests find it by."""
    element.props["data-testid"] = name
    return element


class Notices:
    """Messages that stay until they are put away.

    Args:
        language: gives the interface's language.
        name: that tests find them by.
    """

    def __init__(self, language: Callable[[], Language], *, name: str) -> None:
        self._language = language
        self._name = name
        self._said: list[tuple[str, PageError]] = []
        self._holder: Any = None

    def place(self) -> None:
        """Here, on a page that is drawn anew."""
        self._holder = ui.element("div").classes("notices")
        self.draw()

    def say(self, errors: Sequence[tuple[str, PageError]]) -> None:
        """Show messages in the place of those before.

        Args:
            errors: what each is about, or an empty text, and the message.
        """
        self._said = list(errors)
        self.draw()

    def draw(self) -> None:
        """In the language of now."""
        self._holder.clear()
        with self._holder:
            for about, error in self._said:
                with named(ui.element("div").classes("notice"), self._name):
                    # role=alert: read out by a screen reader when it comes
                    ui.label(
                        f"{about}: {error.said(self._language())}"
                        if about
                        else error.said(self._language())
                    ).props("role=alert")
                    ui.button(icon="close", on_click=lambda: self.say([])).props(
                        "flat dense round size=sm aria-label=close"
                    )
