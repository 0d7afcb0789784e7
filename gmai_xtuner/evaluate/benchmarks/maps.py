# SPDX-License-Identifier: Apache-2.0

"""Column maps: what a YAML file says of a benchmark's files, their columns, and how it is asked and scored.

The built-in benchmarks are the files in ``maps``; a user's own has the same keys (``docs/evaluation.md``). A
map with one layout writes its keys at the top.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gmai_xtuner.core.yaml_lines import Document
from gmai_xtuner.evaluate.benchmarks.reading import BenchmarkError
from gmai_xtuner.evaluate.protocols import (
    MICRO,
    SCORING,
    VERSION,
    Average,
    Protocol,
    Questions,
    Words,
)

FOLDER = Path(__file__).with_name("maps")
Texts = tuple[str, ...]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Group(_Keys):
    """A group whose name is not simply a column's value.

    Args:
        text: a column, or a template such as ``{id} {folder}``.
        match: regular expression; what it finds in the text is the name.
        yes_no: of these, the first where the gold answer is yes or no, else the second.
    """

    text: str = ""
    match: str = ""
    yes_no: Texts = ()


class Layout(_Keys):
    """One kind of files that a benchmark comes in, and what its columns mean.

    Where a column is named, a template such as ``{QUESTION} {year}`` may stand; besides the columns it knows
    ``variant``, ``stem`` and ``folder`` of the file, and as number of the row ``row`` (in the file, from 1),
    ``n`` (in all files) and ``n0`` (from 0).

    Args:
        suffixes: of the files; default: any.
        path: regular expression that a file's path must fit, its folders among it.
        named: regular expression of the file's name -> the variants that it is; the first that fits counts.
        variants: that a file is, where ``named`` does not say; default: all.
        parts_of_all: further variants that are parts of the file.
        header: columns that a file must have to be taken for this benchmark.
        without: columns that it must not have.
        lower: names of columns are read in lower case, but for letters of options.
        at: keys that lead to the records in a JSON file.
        ids_in: a JSON file beside, whose keys are the ids of the questions that count.
        where: column -> regular expression that it must fit for the row to count; ``{variant}`` is filled in.
        levels: how many folders up one copy of the benchmark reaches; 0: a file, 1: the files of a folder.
        every: all files of the folder with this suffix belong to it.
        num_parts: of a set in files ``..._part_1``, ``..._part_2``.
        covers: group -> the names that must all occur.
        id: of a question; ``number`` where there is none, by default the row's.
        question: its text, which ends before ``until``.
        request: in its place, the same words for every row.
        hint: column of what is put before it.
        options: a column with a list, or a mapping from letters, of options; a list of columns, a column an
            option; or ``A-Z``: the columns of that name that a row has.
        fixed_options: options of every question.
        option_prefix: regular expression that is taken off each, ``{letter}`` is filled in.
        gaps: an empty option is none.
        num_options: that every question must have.
        open: column -> regular expression; where it fits, the question has no options.
        no_options: what a question without options is.
        answer: the gold answer; None: the authors keep the answers.
        answer_is: how it names the option; ``index0`` counts from 0, ``exact`` is the very text.
        answer_text: column of the gold option's text, for comparison.
        unknown: answers that stand for none.
        several: an answer that is a list holds several right ones.
        images: columns with paths, lists of paths, or images stored in a Parquet file.
        base64: column of a table with images as base64 text.
        image_name: what a path is made of, e.g. ``{}.jpg``.
        image_folders: folders of the images, relative to the file; the first that has an image counts.
        strip: take white space off the ends of texts.
        groups: name -> column, columns of which the first that is filled counts, or :class:`Group`.
        sha256: name of a file -> its hash.
        totals: variant -> number of questions, where it differs from the protocols'.
    """

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
    answer_is: Literal["letter", "index0", "index1", "text", "exact", "letter_or_text"] | None = (
        None
    )
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

    @field_validator("images", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("groups", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
            return {name: name for name in value}
        lists = value.items() if isinstance(value, Mapping) else ()
        return {key: tuple(one) if isinstance(one, list) else one for key, one in lists} or value

    @field_validator("named", "covers", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: (one,) if isinstance(one, str) else tuple(one) for key, one in value.items()}

    @property
    def has_options(self) -> bool:
        return bool(self.options or self.fixed_options)

    def columns(self) -> dict[str, str]:
        """Return each column that the layout must find -> the key that names it."""
        found: dict[str, str] = {}
        texts: list[tuple[str, str]] = [
            (key, str(getattr(self, key) or ""))
            for key in ("id", "question", "hint", "answer", "answer_text", "base64")
        ]
        texts += [("images", one) for one in self.images]
        texts += [("where", one) for one in self.where] + [("open", one) for one in self.open]
        if self.options != "A-Z":
            several = self.options if isinstance(self.options, tuple) else (self.options,)
            texts += [("options", one) for one in several]
        for group in self.groups.values():
            one = group.text if isinstance(group, Group) else group
            texts += [("groups", part) for part in (one if isinstance(one, tuple) else (one,))]
        for key, text in texts:
            for name in re.findall(r"\{([^{}]+)\}", text) if "{" in text else [text]:
                if name and name not in PLACES:
                    found.setdefault(name, key)
        return found


PLACES = ("variant", "stem", "folder", "row", "n", "n0")
"""What templates know besides the columns."""


class ProtocolKeys(_Keys):
    """A protocol; the keys of :class:`~gmai_xtuner.evaluate.protocols.Protocol`, with defaults.

    Args:
        macro: groups that macro averages are over.
        about: its description; default: by ``questions``.
    """

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
    """A benchmark.

    Args:
        name: as the command and results call it.
        about: what it is, for people.
        source: where its layout is written down, at one commit.
        files: what the authors ship, for messages; of an own map the data files, relative to the map.
        variants: parts or languages; the first is the default.
        layouts: tried in their order, the first that a file fits counts.
        protocols: ways to ask and score it; the first of each variant is its default.
        macro, table, words, scorer: defaults of the protocols.
        expected: number of questions, where no protocol is written.
    """

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
        return tuple(self._protocol(keys) for keys in self.protocols or self._defaults())

    def _defaults(self) -> Sequence[ProtocolKeys]:
        kind: Questions = "all"
        if all(
            one.has_options and not one.open and one.no_options != "open" for one in self.layouts
        ):
            kind = "options"
        return [
            ProtocolKeys(name="all", variant=one, expected=self.expected, questions=kind)
            for one in self.variants
        ]

    def _protocol(self, keys: ProtocolKeys) -> Protocol:
        default = SCORING[keys.questions]
        scorer = keys.scorer or self.scorer or default.scorer
        macro = self.macro if keys.macro is None else keys.macro
        table = keys.table if keys.table is not None else self.table or macro
        return Protocol(
            name=keys.name,
            version=VERSION,
            benchmark=self.name,
            variant=keys.variant or self.variants[0],
            description=keys.about or (default.description if self.protocols else self.about),
            expected=keys.expected,
            scorer=scorer,
            also=keys.also if keys.also is not None else default.also,
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
def table_columns() -> Mapping[str, str]:
    """Return the columns that a table of VLMEvalKit may have."""
    return built_in()["vqa_rad"].layouts[-1].columns()


def read_map(path: Path) -> Map:
    """Read a column map.

    Raises:
        BenchmarkError: it can't be read, or a key or value is wrong; names the line and the nearest key.
    """
    document = Document(path, what="column map", error=BenchmarkError)
    if not isinstance(document.data, dict):
        raise document.fault((), "a column map has keys such as name, question and answer.")
    content = dict(document.data)
    if "layouts" not in content:
        layout = {
            key: content.pop(key)
            for key in list(content)
            if key in Layout.model_fields or key == "like"
        }
        # of one layout its keys stand at the top, so that both own their variants
        content["variants"] = list(layout.pop("variants", ["test"]))
        content["layouts"] = [layout]
        flat = True
    else:
        flat = False
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


def _fault(document: Document, error: ValidationError, flat: bool) -> BenchmarkError:
    """Say what pydantic found first, with its line."""
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place = tuple(problem["loc"])
    key = str(place[-1])
    if flat and place[:2] == ("layouts", 0):
        place = place[2:]
    model = Layout if "layouts" in problem["loc"] else Map
    if problem["type"] == "extra_forbidden":
        known = sorted({*Layout.model_fields, *Map.model_fields} if flat else model.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
        text = f"unknown key {key!r}. {hint}"
    elif problem["type"] == "missing":
        text = f"the key {key!r} is missing."
    else:
        text = f"{key}: {problem['msg']}, got {problem['input']!r}."
    fault = document.fault(place, text)
    assert isinstance(fault, BenchmarkError)
    return fault


def _check(document: Document, found: Map, layout: Layout, place: tuple[str | int, ...]) -> None:
    """Refuse what a map leaves open, and what can't be."""

    def refuse(key: str, text: str) -> None:
        raise document.fault((*place, key), text)

    if bool(layout.question) == bool(layout.request):
        refuse(
            "question",
            "the key question must name the column of the text, or request give the words.",
        )
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
        if unknown := [
            name for name in protocol.table if name not in groups and len(found.layouts) == 1
        ]:
            refuse(
                "groups",
                f"macro and table need the group {unknown[0]!r}, which groups does not name.",
            )
        if protocol.variant not in found.variants:
            refuse(
                "variants", f"the protocol {protocol.name} is of no variant: {protocol.variant!r}."
            )
        protocol.check_scorer(protocol.scorer, ())
