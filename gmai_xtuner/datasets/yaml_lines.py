"""YAML and JSON whose every key knows its line, and in which no key is given twice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from gmai_xtuner.errors import MixtureError


def parse(path: Path) -> yaml.Node:
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise MixtureError(f"{path}: a mixture file ends in .yaml, .yml or .json.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MixtureError(f"mixture file {path} can't be read ({error.strerror}).") from error
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
    """A mapping of the file that knows its lines."""

    def __init__(self, path: Path, node: yaml.Node, title: str) -> None:
        self.path, self.node, self.title = path, node, title
        self.values: dict[str, yaml.Node] = {}
        if not isinstance(node, yaml.MappingNode):
            self.fail("a mapping (key: value) was expected", remedy="See the docs' example.")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail("a key must be a text", remedy="Write key: value.")
            if key.value in self.values:
                raise MixtureError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value!r} is given twice in "
                    f"{title}. Rename or remove one."
                )
            self.values[key.value] = value

    def fail(self, problem: str, *, remedy: str, key: str | None = None) -> NoReturn:
        node = self.values[key] if key is not None else self.node
        line = node.start_mark.line + 1
        raise MixtureError(f"{self.path}, line {line}: {self.title}: {problem}. {remedy}")

    def section(self, key: str, *, title: str | None = None) -> Section:
        return Section(self.path, self.values[key], title or f"{key!r}")

    def check_keys(self, known: Iterable[str]) -> None:
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
                self.fail(f"unknown key {key!r}", remedy=remedy, key=key)

    def scalar(self, key: str) -> Any:
        """Value of a key as YAML types it; a mapping or list is an error."""
        return self.plain(self.values[key], key)

    def plain(self, node: yaml.Node, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self.fail(f"{key} must be one value", remedy="See the docs' example.", key=key)
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            self.fail(f"{key} can't be read ({error})", remedy="Put it in quotes.", key=key)
