# SPDX-License-Identifier: Apache-2.0

"""Patterns of paths: ``{case}/ct.nii.gz`` with ``{case}/{label}.nii.gz``, ``png/{image ID:03d}.png``.

``{name}`` stands for one or more characters without ``/``, ``{name:path}`` for any, ``{name:03d}`` for digits
padded to three. A name that is there twice holds the same text both times. A name is that of a column in
tables, so it may hold blanks and any script. The letter case of a suffix doesn't matter.
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from data_tools.readers import SourceOptions
from data_tools.readers.files import files, folder_of, listed, wrong
from gmai_xtuner.core.errors import SourceError

_PLACE = re.compile(r"\{([^{}/:]+)(?::(path|0?\d*d))?\}")
_MOST_READINGS = 64
_SAID = ("label", "group", "dataset")  # pieces of a path that are told of the image itself

Places = dict[str, str]
"""Name of a placeholder -> its text in a path."""


def place_names(template: str) -> list[str]:
    """Return the names of the placeholders in their order, each once."""
    return list(dict.fromkeys(match[1] for match in _PLACE.finditer(template)))


def fill(template: str, known: Mapping[str, str]) -> str:
    """Return the pattern with known placeholders filled in; ValueError for no number where it is padded."""

    def text(match: re.Match[str]) -> str:
        if match[1] not in known:
            return match[0]
        value = known[match[1]]
        return value if match[2] in (None, "path") else format(int(value), match[2])

    return _PLACE.sub(text, template)


@dataclass(frozen=True)
class Pattern:
    """A pattern to compare paths with. Made by `pattern`."""

    template: str

    @cached_property
    def literal(self) -> int:
        """Number of characters that are fixed: of two patterns that a path fits, it is of the more exact."""
        return len(_PLACE.sub("", self.template))

    @cached_property
    def _tokens(self) -> list[tuple[str, str, str]]:
        """Fixed text, the placeholder behind it, and the expression of its text."""
        tokens, end = [], 0
        for match in _PLACE.finditer(self.template):
            digits = match[2][:-1] or "1" if match[2] and match[2] != "path" else ""
            text = f"[0-9]{{{int(digits)},}}" if digits else ".+" if match[2] else "[^/]+"
            tokens.append((self.template[end : match.start()], match[1], text))
            end = match.end()
        return tokens

    @cached_property
    def _end(self) -> str:
        """Return the expression behind the last placeholder; the suffix in any letter case."""
        last = _PLACE.split(self.template)[-1]
        stem, dot, suffix = last[last.rfind("/") + 1 :].partition(".")
        folders = last[: last.rfind("/") + 1]
        return re.escape(folders + stem) + (f"(?i:{re.escape(dot + suffix)})" if dot else "")

    @cached_property
    def _both(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Expressions that find the first and the last of all readings."""
        made = []
        for lazy in ("?", ""):
            expression, names = "", place_names(self.template)
            seen: set[str] = set()
            for literal, name, text in self._tokens:
                group = f"p{names.index(name)}"
                again = f"(?P={group})" if name in seen else f"(?P<{group}>{text}{lazy})"
                expression += re.escape(literal) + again
                seen.add(name)
            made.append(re.compile(expression + self._end))
        return made[0], made[1]

    def match(self, path: str) -> Places | None:
        """Return the texts of the placeholders, the shortest first; None if the path doesn't fit."""
        found = self._both[0].fullmatch(path)
        return found and dict(zip(place_names(self.template), found.groups(), strict=True))

    def readings(self, path: str) -> list[Places]:
        """Return every way in which the path fits, at most `_MOST_READINGS`."""
        first = self.match(path)
        last = self._both[1].fullmatch(path)
        # The two differ if there is more than one way: they are the first and the last of all.
        if first is None or last is None or tuple(first.values()) == last.groups():
            return [] if first is None else [first]
        return list(islice(self._walk(path, 0, {}), _MOST_READINGS))

    def _walk(self, path: str, number: int, places: Places) -> Iterator[Places]:
        if number == len(self._tokens):
            if re.fullmatch(self._end, path):
                yield places
            return
        literal, name, text = self._tokens[number]
        if not path.startswith(literal):
            return
        rest = path[len(literal) :]
        for length in range(1, len(rest) + 1):
            value = rest[:length]
            if re.fullmatch(text, value) and places.get(name, value) == value:
                yield from self._walk(rest[length:], number + 1, places | {name: value})


@lru_cache(maxsize=256)
def pattern(template: str) -> Pattern:
    """Return the pattern of a text."""
    return Pattern(template)


def one_reading(
    readings: Sequence[Places], labels: Collection[str] | None, *, path: str, key: str, source: str
) -> Places | None:
    """Return the one way in which a path is read; None if no reading is left.

    With ``labels``, codes or names that the job knows, a reading must have one of these. A SourceError if the
    path of the job's ``key`` can be read in two ways.
    """
    if len(readings) > 1 and labels is not None:
        readings = [reading for reading in readings if reading.get("label") in labels] or readings
    if len(readings) < 2:
        return readings[0] if readings else None
    ways = (", ".join(f"{name} {text!r}" for name, text in one.items()) for one in readings[:2])
    problem = f"can be read in more than one way: {path!r} may be {' or '.join(ways)}"
    advice = "or put another sign than these hold between the placeholders"
    raise SourceError(f"Source {source}: `{key}` {problem}. Name the labels in `labels`, {advice}.")


@dataclass(frozen=True, slots=True)
class Paired:
    """An image's path below the root and the places of its pattern; path and places of each of its masks."""

    path: str
    places: Places
    masks: list[tuple[str, Places]]


Patterns = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]
"""One pattern or several."""


def check_templates(*templates: str, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a pattern that leads out of the root, or ends in none of the suffixes, if there are any."""
    for template in templates:
        if template.startswith("/") or ".." in template.split("/"):
            raise ValueError(f"the pattern {template!r} leads out of the root")
        if suffixes and not template.lower().endswith((*suffixes, "}")):
            raise ValueError(f"the pattern {template!r} ends in none of {', '.join(suffixes)}")


def paired(
    source: SourceOptions,
    images: str,
    masks: Sequence[str],
    *,
    labels: Collection[str] | None = None,
) -> Iterator[Paired]:
    """Yield the images that fit a pattern, each with the files that its other patterns find.

    A path that fits both is of the one with more fixed text; ``labels`` as of `one_reading`, by default those
    of the job. A SourceError if no file fits, or one can be read in two ways.
    """
    labels = source.labels if labels is None else labels
    own = pattern(images)
    others = [pattern(template) for template in masks]
    folder = "/".join(images.split("{")[0].split("/")[:-1])
    folder_of(source, folder, key="images")
    empty, seen = True, list[str]()
    for name in files(source, folder):
        if not _is_of(own, name, others):
            seen += [name] if len(seen) < 3 else []
            continue
        empty = False
        meant = {_meaning(reading, masks): reading for reading in own.readings(name)}
        readings = list(meant.values())
        places = one_reading(readings, labels, path=name, key="images", source=source.name)
        known = {key: text for key, text in (places or {}).items() if key != "label"}
        found = [
            (path, texts)
            for other in others
            for path in _matching(source.root, other, known)
            if path != name and (not own.match(path) or other.literal >= own.literal)
            if (texts := _own_reading(source, own, other, path, known, labels)) is not None
        ]
        yield Paired(name, places or {}, found)
    if empty:
        problem = f"no file below {str(source.root / folder)!r} fits `images: {images}`"
        raise wrong(source, f"{problem}; there are {listed(seen)}.")


def masks_of(
    source: SourceOptions, masks: Sequence[str], known: Places
) -> list[tuple[str, Places]]:
    """Return the files that patterns find, whose ``known`` places are filled in, each with all places."""
    found = []
    for template in masks:
        for path in _matching(source.root, pattern(template), known):
            readings = pattern(fill(template, known)).readings(path)
            told = one_reading(readings, source.labels, path=path, key="masks", source=source.name)
            found.append((path, known | (told or {})))
    return found


def _is_of(own: Pattern, name: str, others: Sequence[Pattern]) -> bool:
    return own.match(name) is not None and not any(
        other.literal >= own.literal and other.match(name) is not None for other in others
    )


def _meaning(places: Places, masks: Sequence[str]) -> tuple[str, ...]:
    """Return all that a reading of an image's path decides."""
    said = [places.get(name, "") for name in _SAID]
    known = {name: text for name, text in places.items() if name != "label"}
    return (*said, *(fill(template, known) for template in masks))


def _own_reading(
    source: SourceOptions,
    images: Pattern,
    masks: Pattern,
    path: str,
    known: Places,
    labels: Collection[str] | None,
) -> Places | None:
    """Return the places of an image's mask; None if the mask is another image's."""
    shared = [name for name in place_names(masks.template) if name in known]
    meant: dict[tuple[str, ...], Places] = {}
    for reading in masks.readings(path):
        is_own = all(reading[name] == known[name] for name in shared)
        image = fill(images.template, known | reading)
        if is_own or (os.path.isfile(source.root / image) and _is_of(images, image, [masks])):
            key = tuple(reading.get(name, "") for name in (*shared, *_SAID))
            meant.setdefault(key, reading)
    found = one_reading(list(meant.values()), labels, path=path, key="masks", source=source.name)
    if found is None or any(found[name] != known[name] for name in shared):
        return None
    return known | found


def _matching(root: Path, other: Pattern, known: Places) -> list[str]:
    """Return the files below ``root`` that fit a pattern whose known places are filled in, sorted.

    A part of the path that is wholly known is looked up, only the others are listed, and a listing is kept
    for the next call; so a folder of a million masks is read once.
    """
    found: list[str] = []

    def walk(folder: str, parts: list[str], places: Places) -> None:
        part = fill(parts[0], places)
        names: Iterator[str] | list[str] = [part]
        if place_names(part):
            names = _listing(root / folder, part[: part.index("{")])
        elif len(parts) == 1 and not os.path.exists(root / folder / part):
            names = _listing(root / folder, part.partition(".")[0])
        own = pattern(part)
        for name in names:
            texts = own.match(name)
            path = f"{folder}/{name}" if folder else name
            if texts is None:
                continue
            if len(parts) > 1 and os.path.isdir(root / path):
                walk(path, parts[1:], places | texts)
            elif len(parts) == 1 and os.path.isfile(root / path):
                found.append(path)

    walk("", fill(other.template, known).split("/"), dict(known))
    return sorted(found)


def _listing(folder: Path, prefix: str) -> Iterator[str]:
    names = _names(str(folder))
    return takewhile(lambda n: n.startswith(prefix), names[bisect.bisect_left(names, prefix) :])


@lru_cache(maxsize=16)
def _names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []
