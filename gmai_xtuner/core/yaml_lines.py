"""YAML and JSON whose every key knows its line, and in which no key is given twice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gmai_xtuner.core.errors import MixtureError


def parse(path: Path) -> yaml.Node:
    """The file's tree of nodes, not yet values.

    Raises:
        MixtureError: it can't be read, is not UTF-8, not YAML, or empty.
    """
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise MixtureError(f"{path}: a mixture file ends in .yaml, .yml or .json.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MixtureError(
            f"mixture file {path} can't be read ({error.strerror}). Name yours in GMAI_MIXTURE; the "
            "default is found from the repository's root."
        ) from error
    except UnicodeDecodeError as error:
        raise MixtureError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    if path.suffix.lower() == ".json":
        text = text.replace("\t", " ")  # YAML knows no tabs; in JSON they can only be spacing
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise MixtureError(f"{path}, line {line}: not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise MixtureError(f"{path}: not valid YAML: {error}.") from error
    if node is None:
        raise MixtureError(f"{path} is empty. List at least one dataset under 'datasets'.")
    return node


class Section:
    """A mapping of the file that knows its lines.

    Args:
        path: the file.
        node: what should be a mapping.
        title: how errors call it.
        line: where it begins, from 1; default the node's own first line.

    Raises:
        MixtureError: it is no mapping, or a key is given twice.
    """

    def __init__(self, path: Path, node: yaml.Node, *, title: str, line: int | None = None) -> None:
        self.path, self.node, self.title = path, node, title
        self.line = node.start_mark.line + 1 if line is None else line
        self.values: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        if not isinstance(node, yaml.MappingNode):
            raise self.error("a mapping (key: value) was expected", remedy="Write key: value.")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error("a key must be a text", remedy="Write key: value.")
            if key.value in self.values:
                raise MixtureError(
                    f"{path}, line {key.start_mark.line + 1}: {title}: {key.value!r} is given "
                    f"twice (first on line {self._lines[key.value]}). Rename or remove one."
                )
            self.values[key.value] = value
            self._lines[key.value] = key.start_mark.line + 1

    def error(self, problem: str, *, remedy: str, key: str | None = None) -> MixtureError:
        """An error that names file, line (of the key, if given) and section."""
        line = self.line if key is None else self._lines[key]
        return MixtureError(f"{self.path}, line {line}: {self.title}: {problem}. {remedy}")

    def section(self, key: str, *, title: str | None = None) -> Section:
        """The mapping under a key."""
        return Section(self.path, self.values[key], title=title or repr(key), line=self._lines[key])

    def renamed(self, names: Mapping[str, str]) -> Section:
        """The same lines under other names; keys that have no new name are left out."""
        copy = Section(self.path, self.node, title=self.title, line=self.line)
        present = {old: new for old, new in names.items() if old in self.values}
        copy.values = {new: self.values[old] for old, new in present.items()}
        copy._lines = {new: self._lines[old] for old, new in present.items()}
        return copy

    def check_keys(self, known: Iterable[str]) -> None:
        """Refuse any other key, with the nearest known one."""
        known = tuple(known)
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
                raise self.error(f"unknown key {key!r}", remedy=remedy, key=key)

    def scalar(self, key: str) -> Any:
        """Value of a key as YAML types it; a mapping or list is an error."""
        return self.plain(self.values[key], key)

    def plain(self, node: yaml.Node, key: str) -> Any:
        """Value of one node below a key."""
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(f"{key} must be one value", remedy="Write key: value.", key=key)
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            raise self.error(
                f"{key} can't be read ({error})", remedy="Put it in quotes.", key=key
            ) from error
