# SPDX-License-Identifier: Apache-2.0

"""YAML and JSON files as plain values that know their lines.

Keys are text as it is written, so that ``1: neutrophil`` and ``no: absent`` mean the keys ``"1"`` and
``"no"``; so are dates and times (``2024-01-01``, ``12:30``), which nothing here is about. A key that is there
twice is an error: YAML's own rule would silently take the last.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from gmai_xtuner.core.errors import GMAIError, is_unicode

MAX_BYTES = 16 * 2**20
MAX_NODES = 1_000_000

Place = tuple[str | int, ...]
"""Keys and positions that lead to a value: ``("sources", 0, "root")``."""

_TAG = "tag:yaml.org,2002:"
_LISTS = (f"{_TAG}seq", f"{_TAG}map")
_SCALARS = tuple(f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "timestamp"))
_PAIR = re.compile(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}", re.IGNORECASE)
"""A character of JSON, written as two of UTF-16, which YAML doesn't know."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast


class Document:
    """A file's values: dictionaries, lists and scalars as YAML types them; ``data`` is None if it is empty.

    ``as_text`` keeps scalars as they are written, so that a class called ``no`` is no False. Of a ``.json``
    file tabs are read as spaces, which YAML wants. ``what`` names such files in messages, of the class
    ``error``; ``remedy`` is for one that can't be opened.

    An error if the file can't be read, is too large, or isn't YAML; tags, merge keys and aliases of
    themselves are refused.
    """

    def __init__(
        self,
        path: Path,
        *,
        what: str,
        error: type[GMAIError] = GMAIError,
        remedy: str = "",
        as_text: bool = False,
    ) -> None:
        self.path, self.what, self._as_text = path, what, as_text
        self.data: Any = None
        self._error = error
        self._lines: dict[Place, int] = {(): 1}
        self._nodes = 0
        text = self._text(remedy)
        try:
            self._loader = _Loader(text)
            node = self._loader.get_single_node()
            if node is not None:
                self.data = self._value(node, (), ())
        except yaml.MarkedYAMLError as problem:
            mark = problem.problem_mark or problem.context_mark
            line = mark.line + 1 if mark else 1
            reason = problem.problem or problem.context
            raise error(f"{path}:{line}: not valid YAML: {reason}.") from problem
        except yaml.YAMLError as problem:
            raise error(f"{path}: not valid YAML: {problem}.") from problem
        except RecursionError as problem:  # without libyaml, which counts itself
            raise error(f"{path}: nested too deep for a {what}.") from problem

    def line(self, place: Place) -> int:
        """Return the line of a value's key, or of the nearest section around it."""
        while place not in self._lines:
            place = place[:-1]
        return self._lines[place]

    def fault(self, place: Place, text: str) -> GMAIError:
        """Return an error that begins with file and line."""
        return self._error(f"{self.path}:{self.line(place)}: {text}")

    def _text(self, remedy: str) -> str:
        path, what = self.path, self.what
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise self._error(
                    f"{path}: {size} bytes are no {what}; at most {MAX_BYTES} are read."
                )
            text = path.read_text(encoding="utf-8-sig")
        except OSError as problem:
            said = f"can't be read ({problem.strerror or problem}). {remedy}".rstrip()
            raise self._error(f"{path}: the {what} {said}") from problem
        except UnicodeDecodeError as problem:
            said = f"is not UTF-8 ({problem}). Save it as UTF-8."
            raise self._error(f"{path}: the {what} {said}") from problem
        if path.suffix.lower() != ".json":
            return text
        return _PAIR.sub(lambda pair: json.loads(f'"{pair[0]}"'), text.replace("\t", " "))

    def _value(self, node: yaml.Node, place: Place, above: tuple[int, ...]) -> Any:
        self._nodes += 1
        if id(node) in above:
            self._stop(node, "an alias that contains itself")
        if self._nodes > MAX_NODES:
            self._stop(node, f"more than {MAX_NODES} values (aliases count where they are used)")
        self._lines.setdefault(place, node.start_mark.line + 1)
        above = (*above, id(node))
        if node.tag not in (_SCALARS if isinstance(node, yaml.ScalarNode) else _LISTS):
            self._stop(node, f"not valid YAML: the tag {node.tag!r} is of no use in a {self.what}")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*place, i), above) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._stop(key, "a key must be plain text")
            if key.tag == "tag:yaml.org,2002:merge":
                self._stop(key, "merge keys (<<) are not supported; write the keys out")
            below = (*place, self._text_of(key))
            if key.value in values:
                first = self._lines[below]
                self._stop(key, f"the key {key.value!r} is there twice, first in line {first}")
            self._lines[below] = key.start_mark.line + 1
            values[key.value] = self._value(value, below, above)
        return values

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        is_number = node.tag in (f"{_TAG}int", f"{_TAG}float")
        if self._as_text or node.tag == f"{_TAG}timestamp" or (is_number and ":" in node.value):
            return self._text_of(node)
        try:
            value = self._loader.construct_object(node)
        except (ValueError, OverflowError):  # a number of 5,000 digits
            value = 2**64
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self._stop(node, "a number beyond 64 bits; put it in quotes if it is a text")
        return self._text_of(node) if isinstance(value, str) else value

    def _text_of(self, node: yaml.ScalarNode) -> str:
        if not is_unicode(node.value):
            self._stop(node, "a text with half a surrogate pair; write the whole character")
        return str(node.value)

    def _stop(self, node: yaml.Node, text: str) -> NoReturn:
        raise self._error(f"{self.path}:{node.start_mark.line + 1}: {text}.")


class Section:
    """A mapping of a document, whose errors name its lines, the place and its ``title``.

    ``names``: own name of each key that is read -> its name in the file; default: the keys as they are. An
    error of the document's class if there is no mapping.
    """

    def __init__(
        self,
        document: Document,
        place: Place = (),
        *,
        title: str,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.document, self.place, self.title = document, place, title
        content = document.data
        for part in place:
            content = content[part]
        if not isinstance(content, dict):
            raise self.error("a mapping was expected", "Write key: value.")
        self._names = names or {key: key for key in content}
        self.values = {own: content[key] for own, key in self._names.items() if key in content}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, problem: str, remedy: str, *, key: str | None = None) -> GMAIError:
        """Return an error that names the file, the line (of the key, if given) and the section."""
        place = self.place if key is None else (*self.place, self._names.get(key, key))
        return self.document.fault(place, f"{self.title}: {problem}. {remedy}")

    def section(
        self, key: str, *, title: str | None = None, names: Mapping[str, str] | None = None
    ) -> Section:
        """Return the mapping under a key."""
        place = (*self.place, self._names[key])
        return Section(self.document, place, title=title or repr(key), names=names)

    def check_keys(self, known: Iterable[str]) -> None:
        """Refuse any other key, naming the nearest known one."""
        known = tuple(known)
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
                raise self.error(f"unknown key {key!r}", remedy, key=key)

    def scalar(
        self,
        key: str,
        is_right: Callable[[Any], bool],
        expected: str,
        *,
        remedy: str = "Correct it, or leave it out.",
    ) -> Any:
        """Return the value of a key, neither mapping nor list; ``is_right`` knows what is ``expected``."""
        value, name = self.values[key], self._names.get(key, key)
        if isinstance(value, dict | list):
            raise self.error(f"{name} must be one value", "Write key: value.", key=key)
        if not is_right(value):
            raise self.error(f"{name} must be {expected}, got {value!r}", remedy, key=key)
        return value

    def texts(self, key: str, *, what: str) -> list[str]:
        """Return a text, or a list of texts, that are not empty; ``what`` names one of them in messages."""
        value = self.values[key]
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(one, str) and one for one in values):
            told = f"{key} must be {what} or a list of such, got {values!r}"
            raise self.error(told, "Write a name, or several in brackets.", key=key)
        return values
