# SPDX-License-Identifier: Apache-2.0

"""What both panels of the page share. Tests find elements by ``data-testid``."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from nicegui import ui
from PIL import Image

from gmai_xtuner.demo.conversation import Session
from gmai_xtuner.demo.i18n import PageError, say
from gmai_xtuner.demo.studies import Memory

LONGEST_SIDE = 1024
"""Of an image on the screen; the model gets all of it."""


def data_url(picture: Image.Image, *, longest: int = LONGEST_SIDE) -> str:
    """Return an image as text: it goes to the page without ever being a file or having an address."""
    if max(picture.size) > longest:
        share = longest / max(picture.size)
        size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_element(url: str, *, about: str, name: str) -> ui.element:
    """Place an ``<img>``; ``about`` says what it is to those who can't see it."""
    element = ui.element("img").props(f"data-testid={name}")
    element.props.update({"src": url, "alt": about})
    return element


class Panel:
    """A side of the page, with messages (``notice`` to tests) that stay until they are put away."""

    def __init__(self, session: Session, memory: Memory, *, notice: str) -> None:
        self.session, self.memory = session, memory
        self._notice = notice
        self._told: list[tuple[str, PageError]] = []
        self._holder: Any = None

    def say(self, key: str, **values: Any) -> str:
        """Return words of the page in the visitor's language."""
        return say(key, self.session.language, **values)

    def place_notices(self) -> None:
        """Put the messages here, on a page that is drawn anew."""
        self._holder = ui.element("div").classes("notices")
        self.tell(*self._told)

    def tell(self, *errors: tuple[str, PageError] | PageError) -> None:
        """Show messages, alone or with what each is about, in the place of those before."""
        self._told = [("", one) if isinstance(one, PageError) else one for one in errors]
        self._holder.clear()
        with self._holder:
            for about, error in self._told:
                text = error.said(self.session.language)
                with ui.element("div").classes("notice").props(f"data-testid={self._notice}"):
                    # role=alert: read out by a screen reader when it comes
                    ui.label(f"{about}: {text}" if about else text).props("role=alert")
                    ui.button(icon="close", on_click=lambda: self.tell()).props(
                        "flat dense round size=sm aria-label=close"
                    )


def chips(title: str, buttons: Sequence[tuple[str, str, Any]]) -> None:
    """Place a row of small buttons: name for tests, text, what a press does."""
    with ui.element("div").classes("chips"):
        ui.label(title).classes("hint")
        for name, text, pressed in buttons:
            ui.button(text, on_click=pressed).props(
                f"outline no-caps dense size=12px data-testid={name}"
            )
