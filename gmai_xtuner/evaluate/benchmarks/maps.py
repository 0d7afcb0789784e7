# SPDX-License-Identifier: Apache-2.0

"""Column maps: what a YAML file says of a benchmark's files, their columns, and how it is asked and scored.

The built-in benchmarks are the files in ``maps``; a user's own has the same keys (``docs/column_maps.md``). A
map with one layout writes its keys at the top.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.yaml_lines import Document
from gmai_xtuner.evaluate.protocols import MICRO, VERSION, Average, Protocol, Questions, Words
from gmai_xtuner.evaluate.questions import BenchmarkError

FOLDER = Path(__file__).with_name("maps")
Texts = tuple[str, ...]
AnswerIs = Literal["letter", "index0", "index1", "text", "exact", "letter_or_text"]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Group(_Keys):
    """A group whose name is not simply a column's value."""

    text: str = ""
    match: str = ""
    yes_no: Texts = ()


class Layout(_Keys):
    """One kind of files that a benchmark comes in, and what its columns mean."""

    suffixes: Texts = ()
    path: str = ""
    named: Mapping[str, Texts] = Field(default_factory=dict)
    variants: Texts = ()
    parts_of_all: Texts = ()
    header: Texts = ()
    without: Texts = ()
    lower: bool = False
    at: Texts = ()
    ids_in: str = ""
    where: Mapping[str, str] = Field(default_factory=dict)
    levels: int = 0
    every: bool = False
    num_parts: int = 0
    covers: Mapping[str, Texts] = Field(default_factory=dict)
    id: str = ""
    number: str = "{row}"
    question: str = ""
    request: str = ""
    until: str = ""
    hint: str = ""
    options: str | Texts = ""
    fixed_options: Texts = ()
    option_prefix: str = ""
    gaps: bool = False
    num_options: int = 0
    open: Mapping[str, str] = Field(default_factory=dict)
    no_options: Literal["error", "open", "left_out"] = "error"
    answer: str | None = None
    answer_is: AnswerIs | None = None
    answer_text: str = ""
    unknown: Texts = ()
    several: bool = False
    images: Texts = ()
    base64: str = ""
    image_name: str = "{}"
    image_folders: Texts = (".",)
    strip: bool = True
    groups: Mapping[str, str | Texts | Group] = Field(default_factory=dict)
    sha256: Mapping[str, str] = Field(default_factory=dict)
    totals: Mapping[str, int] = Field(default_factory=dict)

    @field_validator("images", "groups", "named", "covers", mode="before")
    @classmethod
    def _short_forms(cls, value: Any, info: ValidationInfo) -> Any:
        """Take a name for a list of one, and a list of groups for groups called like their columns."""
        if info.field_name == "images":
            return (value,) if isinstance(value, str) else value
        if info.field_name == "groups" and isinstance(value, list | tuple):
            return {name: name for name in value}
        if not isinstance(value, Mapping):
            return value
        short: Any = str if info.field_name != "groups" else ()
        value = {key: (one,) if isinstance(one, short) else one for key, one in value.items()}
        return {key: tuple(one) if isinstance(one, list) else one for key, one in value.items()}

    @property
    def has_options(self) -> bool:
        return bool(self.options or self.fixed_options)

    def columns(self) -> dict[str, str]:
        """Return each column that the layout must find -> the key that names it."""
        keys = ("id", "question", "hint", "answer", "answer_text", "base64")
        named = [(key, getattr(self, key)) for key in (*keys, "images", "where", "open", "options")]
        groups = (one.text if isinstance(one, Group) else one for one in self.groups.values())
        named += [("groups", one) for one in groups]
        found: dict[str, str] = {}
        for key, one in named:
            for text in (one,) if isinstance(one, str) else one or ():
                for name in re.findall(r"\{([^{}]+)\}", text) if "{" in text else [text]:
                    if name and name not in (*PLACES, "A-Z"):
                        found.setdefault(name, key)
        return found


PLACES = ("variant", "stem", "folder", "row", "n", "n0")
"""What templates know besides the columns."""


class ProtocolKeys(_Keys):
    """A protocol; the keys of :class:`~gmai_xtuner.evaluate.protocols.Protocol`, with defaults."""

    name: str
    variant: str = ""
    expected: int | None = None
    questions: Questions = "options"
    about: str = ""
    scorer: str = ""
    also: Texts | None = None
    macro: Texts | None = None
    table: Texts | None = None
    words: Words | None = None


class Map(_Keys):
    """A benchmark: its layouts are tried in their order, the first that a file fits counts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    about: str = ""
    source: str = ""
    files: str | Texts = ""
    variants: Texts = ("test",)
    layouts: tuple[Layout, ...]
    protocols: tuple[ProtocolKeys, ...] = ()
    macro: Texts = ()
    table: Texts = ()
    words: Words = "llava"
    scorer: str = ""
    expected: int | None = Field(default=None, gt=0)

    def asked(self) -> tuple[Protocol, ...]:
        """Return the protocols."""
        if self.protocols:
            return tuple(map(self._protocol, self.protocols))
        is_open = (
            not one.has_options or one.open or one.no_options == "open" for one in self.layouts
        )
        keys: dict[str, Any] = {"name": "all", "expected": self.expected}
        keys["questions"] = "all" if any(is_open) else "options"
        protocols = (ProtocolKeys(variant=one, **keys) for one in self.variants)
        return tuple(map(self._protocol, protocols))

    def _protocol(self, keys: ProtocolKeys) -> Protocol:
        default = kinds()[keys.questions]
        macro = self.macro if keys.macro is None else keys.macro
        table = keys.table if keys.table is not None else self.table or macro
        return Protocol(
            name=keys.name,
            version=VERSION,
            benchmark=self.name,
            variant=keys.variant or self.variants[0],
            description=keys.about or (default["about"] if self.protocols else self.about),
            expected=keys.expected,
            scorer=keys.scorer or self.scorer or default["scorer"],
            also=tuple(default["also"] if keys.also is None else keys.also),
            averages=(MICRO, *(Average("macro", over) for over in macro)),
            table=table or tuple(self.layouts[0].groups),
            questions=keys.questions,
            words=keys.words or self.words,
        )

    def total(self, layout: Layout, variant: str) -> int | None:
        """Return how many questions the authors' file has of a variant; None where unknown."""
        counts = [one.expected or 0 for one in self.asked() if one.variant == variant]
        return layout.totals.get(variant) or max(counts, default=0) or None


@cache
def built_in() -> Mapping[str, Map]:
    """Return every built-in benchmark by its name: the files of ``maps``."""
    return {path.stem: read_map(path) for path in sorted(FOLDER.glob("[a-z]*.yaml"))}


NAMES = tuple(sorted(path.stem for path in FOLDER.glob("[a-z]*.yaml")))


@cache
def kinds() -> Mapping[str, Any]:
    """Return kind of questions -> how they are scored where a protocol says nothing else."""
    path = FOLDER / "_kinds.yaml"
    return cast("dict[str, Any]", Document(path, what="table of kinds", error=BenchmarkError).data)


@cache
def table_columns() -> Mapping[str, str]:
    """Return the columns that a table of VLMEvalKit may have."""
    return built_in()["vqa_rad"].layouts[-1].columns()


def read_map(path: Path) -> Map:
    """Read a column map.

    A ``BenchmarkError`` if it can't be read, or a key or value is wrong; names the line and the nearest key.
    """
    document = Document(path, what="column map", error=BenchmarkError)
    if not isinstance(document.data, dict):
        raise document.fault((), "a column map has keys such as name, question and answer.")
    content = dict(document.data)
    flat = "layouts" not in content
    if flat:  # of one layout its keys stand at the top
        keys = {*Layout.model_fields, "like"} - {"variants"}
        content["layouts"] = [{key: content.pop(key) for key in [*content] if key in keys}]
    if isinstance(content["layouts"], list):
        content["layouts"] = [_with_base(document, one) for one in content["layouts"]]
    try:
        found = Map.model_validate(content)
    except ValidationError as error:
        raise _fault(document, error, flat) from error
    if found.name in NAMES and path.parent != FOLDER:
        raise document.fault(
            ("name",), f"{found.name} is a built-in benchmark. Give yours another name."
        )
    for number, one in enumerate(found.layouts):
        _check(document, found, one, () if flat else ("layouts", number))
    return found


def _with_base(document: Document, layout: Any) -> Any:
    if not isinstance(layout, dict) or "like" not in layout:
        return layout
    base = FOLDER / f"_{layout['like']}.yaml"
    if not base.is_file():
        raise document.fault(
            ("like",), f"no layout is called {layout['like']!r}; vlmevalkit is one."
        )
    content = Document(base, what="layout", error=BenchmarkError).data
    return {**content, **{key: value for key, value in layout.items() if key != "like"}}


def _fault(document: Document, error: ValidationError, flat: bool) -> GMAIError:
    """Say what pydantic found first, with its line."""
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place = problem["loc"][2:] if flat and "layouts" in problem["loc"] else problem["loc"]
    key = str(place[-1])
    text = f"{key}: {problem['msg']}, got {problem['input']!r}."
    if problem["type"] == "missing":
        text = f"the key {key!r} is missing."
    if problem["type"] == "extra_forbidden":
        known = sorted({*Layout.model_fields, *Map.model_fields})
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
        text = f"unknown key {key!r}. {hint}"
    return document.fault(place, text)


def _check(document: Document, found: Map, layout: Layout, place: tuple[str | int, ...]) -> None:
    """Refuse what a map leaves open, and what can't be."""

    def refuse(key: str, text: str) -> None:
        raise document.fault((*place, key), text)

    if bool(layout.question) == bool(layout.request):
        told = "the key question must name the column of the text, or request give the words."
        refuse("question", told)
    if layout.has_options and layout.answer is not None and layout.answer_is is None:
        refuse(
            "answer",
            "answer_is must say how the column names the right option, since a letter, a number and a text "
            "can't be told apart: letter, index0 (the first option is 0), index1, text, or letter_or_text.",
        )
    if layout.answer_is and not layout.has_options:
        refuse("answer_is", "answer_is belongs to options or fixed_options, and there are none.")
    patterns = [layout.path, *layout.named, *layout.where.values(), *layout.open.values()]
    patterns += [one.match for one in layout.groups.values() if isinstance(one, Group)]
    for pattern in (*patterns, layout.option_prefix):
        try:
            re.compile(pattern)
        except re.error as error:
            refuse("where", f"{pattern!r} is no regular expression ({error}).")
    groups = {"answer_type", *layout.groups}
    for protocol in found.asked():
        unknown = [name for name in protocol.table if name not in groups]
        if unknown and len(found.layouts) == 1:
            told = f"macro and table need the group {unknown[0]!r}, which groups does not name."
            refuse("groups", told)
        if protocol.variant not in found.variants:
            told = f"the protocol {protocol.name} is of no variant: {protocol.variant!r}."
            refuse("variants", told)
        protocol.check_scorer(protocol.scorer, ())
