# SPDX-License-Identifier: Apache-2.0

"""Conversations and records -> the corpus folder: files, split, mixture, card, figures, report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from gmai_xtuner.core.errors import CorpusError, ImageError
from gmai_xtuner.core.imaging.images import opened
from gmai_xtuner.core.templates import environment

# Control characters show as their symbols; NUL may not occur in a page at all. Marks that turn the
# direction of writing show as a replacement character: they could make an answer read otherwise.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)}
_VISIBLE |= {127: 0x2421, **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")


def templates(*, html: bool = False) -> Environment:
    """Return the environment of the templates; ``html``: escape values, show what is invisible in them."""
    made = environment(
        "data_tools",
        html=html,
        keep_trailing_newline=not html,
        finalize=lambda value: value.translate(_VISIBLE) if html and type(value) is str else value,
    )
    made.filters |= {
        "number": "{:,}".format,
        "share": lambda value: "–" if value is None else f"{value:.1%}",
        "duration": duration,
        "size": size,
        "web": lambda url: url if re.match(r"https?://", url) else "",
        "md": escaped,
        "link": link,
        "short": short,
        "printable": printable,
        "written_by": written_by,
    }
    return made


def written_by(writer: Mapping[str, str]) -> str:
    """Return who wrote the conversations, such as ``"written by openai (some-model)"``."""
    model = f" ({printable(writer['model'])})" if "model" in writer else ""
    return f"written by {writer['name']}{model}"


def duration(seconds: float) -> str:
    """Return ``"3 s"``, ``"4 min 10 s"``, ``"2 h 5 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """Return bytes for people: ``"812 B"``, ``"3.4 MB"``."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def printable(text: str) -> str:
    """Return the text without control characters, which could move the terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def short(text: str, width: int) -> str:
    """Return `printable` text of at most so many characters."""
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def escaped(text: str) -> str:
    """Return one line of plain text in Markdown: a label or a title is never taken as markup."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def link(text: str, url: str) -> str:
    """Return a link if it is to a web page, else the text alone."""
    if re.fullmatch(r"https?://[^\s<>()\[\]|\\\"'`]+", url):
        return f"[{escaped(text)}]({url})"
    return escaped(text)


@contextmanager
def stored_image(path: Path) -> Iterator[Image.Image]:
    """Open an image of the corpus; a `CorpusError` if it can't be read."""
    try:
        with opened(path) as image:
            yield image
    except ImageError as error:
        raise CorpusError(
            f"{path}: a stored image can't be read ({error}). Images of a corpus must not be changed by "
            "hand; remove its .work folder and run the job again."
        ) from error
