# SPDX-License-Identifier: Apache-2.0

"""A table of labels: CSV, TSV, JSONL or Excel. The job says which column holds what.

Rows of one image are one sample, wherever in the table they are (see `rows`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from data_tools.options import Options as Section
from data_tools.readers import SourceOptions, files
from data_tools.readers.patterns import Patterns, fill, place_names
from data_tools.readers.rows import Format, Row, cell_text, grouped, read_table, words_of
from data_tools.records import ANYTHING, NOTHING, Annotation, Drops, Sample, Unit
from gmai_xtuner.core.errors import Unusable

Part = Literal["x1", "y1", "x2", "y2", "cx", "cy", "width", "height"]
IMAGES_A_UNIT = 32
STRAYS = "#strays"
"""Ends the key of the unit of all rows of which nobody knows the image."""
_AXES = (("x1", "x2", "cx", "width"), ("y1", "y2", "cy", "height"))


class BoxColumns(Section):
    """Where a row has its box: a column for each number, or one column with four; see docs/corpus.md."""

    x1: str | None = None
    y1: str | None = None
    x2: str | None = None
    y2: str | None = None
    cx: str | None = None
    cy: str | None = None
    width: str | None = None
    height: str | None = None
    column: str | None = None
    order: tuple[Part, Part, Part, Part] | None = None
    unit: Literal["pixels", "fractions"] = "pixels"
    last_pixel_inside: bool = False

    @model_validator(mode="after")
    def _is_whole(self) -> BoxColumns:
        if (self.column is None) != (self.order is None):
            raise ValueError("`column` and `order` belong together")
        if self.column is not None and self.columns:
            raise ValueError("either `column` and `order`, or a column for each number")
        given = set(self.order or self.columns)
        for parts in _AXES:
            here = given & set(parts)
            if len(here) != 2 or (parts[2] in here and parts[3] not in here):
                got = ", ".join(sorted(here)) or "none"
                raise ValueError(f"a box needs two of {', '.join(parts)} that fix it, got {got}")
        if self.last_pixel_inside and not {"x2", "y2"} <= given:
            raise ValueError("`last_pixel_inside` is about x2 and y2")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Part of the box -> its column."""
        return {part: getattr(self, part) for part in get_args(Part) if getattr(self, part)}

    @property
    def used(self) -> list[str]:
        return [self.column] if self.column is not None else list(self.columns.values())


class Options(SourceOptions):
    """Keys of ``reader: table``; docs/corpus.md explains them."""

    table: str
    format: Format | None = None
    encoding: str = "utf-8"
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    sheet: str | None = None
    image: str = Field(min_length=1)
    image_folder: str = ""
    image_suffix: str = ""
    label: Patterns = ()
    label_separator: str | None = Field(default=None, min_length=1)
    one_hot: Annotated[
        dict[str, str],
        BeforeValidator(
            lambda names: {n: n for n in names} if isinstance(names, list | tuple) else names
        ),
    ] = Field(default={})
    positive: tuple[str, ...] = ("1", "1.0", "true", "True", "TRUE", "yes")
    negative: tuple[str, ...] = ("0", "0.0", "false", "False", "FALSE", "no")
    nothing: str | None = None
    missing: tuple[str, ...] = ("", "nan", "NaN", "NA", "N/A", "null", "#N/A")
    box: BoxColumns | None = None
    row_is: Literal["picture", "finding"] | None = None
    attribute_columns: dict[str, str] = Field(default={})
    finding_columns: dict[str, str] = Field(default={})
    attribute_values: dict[str, dict[str, str]] = Field(default={})
    group_column: str | None = None
    modality_column: str | None = None
    licence_column: str | None = None
    split_column: str | None = None
    splits: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _says_what_is_needed(self) -> Options:
        if not self.label and not self.one_hot:
            raise ValueError("the table's `label` or `one_hot` columns are missing")
        if (self.split_column is None) != (not self.splits):
            raise ValueError("`split_column` and `splits` belong together")
        names = {*self.attribute_columns.values(), *self.finding_columns.values()}
        if strange := sorted(set(self.attribute_values) - names):
            problem = "`attribute_values` is about attributes that no column gives"
            there = ", ".join(sorted(names)) or "none"
            raise ValueError(f"{problem}: {', '.join(strange)}; there are {there}")
        if self.nothing is not None and not self.one_hot:
            raise ValueError("`nothing` is about `one_hot` columns")
        return self

    @property
    def names_licences(self) -> bool:
        return self.licence_column is not None

    @property
    def used(self) -> list[str]:
        columns = [
            *(place_names(self.image) or [self.image]),
            *self.label,
            *self.one_hot,
            *(self.box.used if self.box else ()),
            *self.attribute_columns,
            *self.finding_columns,
            self.group_column,
            self.modality_column,
            self.licence_column,
            self.split_column,
        ]
        return list(dict.fromkeys(name for name in columns if name is not None))


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for every few images, with their rows."""
    splits: dict[str, None] = {}

    def wanted(row: Row) -> bool:
        if options.split_column is None:
            return True
        split = cell_text(row.cells[options.split_column])
        if split in options.splits or len(splits) < 100:
            splits[split] = None
        return split in options.splits

    path = files.table_of(options, options.table)
    keys = {"encoding": options.encoding, "delimiter": options.delimiter, "sheet": options.sheet}
    said: dict[str, Any] = {"form": options.format, "source": options.name, **keys}
    rows = read_table(path, options.used, **said)
    found = grouped(rows, key=lambda row: _image_name(options, row), wanted=wanted)
    strays = next(found)
    batch = list(islice(found, IMAGES_A_UNIT))
    if unseen := [split for split in options.splits if split not in splits]:
        problem = f"no row has {files.listed(unseen)} in column {options.split_column!r}"
        raise files.wrong(options, f"{path}: {problem}; there are {files.listed(list(splits))}.")
    if strays:
        yield Unit(f"{options.table}{STRAYS}", (False, strays))
    while batch:
        together = [row for image in batch for row in image]
        yield Unit(f"{options.table}#{together[0].line}", (bool(strays), together))
        batch = list(islice(found, IMAGES_A_UNIT))


def _image_name(options: Options, row: Row) -> str:
    """Return the image's path below the root; "" if a cell that it needs is missing."""
    columns = place_names(options.image)
    cells = {column: cell_text(row.cells.get(column)) for column in columns or [options.image]}
    if any(cell in options.missing for cell in cells.values()):
        return ""
    try:
        name = fill(options.image, cells) if columns else cells[options.image]
    except ValueError:  # no whole number, where the pattern pads one
        return ""
    folder = options.image_folder.rstrip("/")
    # A hostile absolute name stays one: it isn't made harmless by the folder before it.
    name = f"{folder}/{name}" if folder and not name.startswith(("/", "\\")) else name
    return name + options.image_suffix


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the images of a unit, each with what its rows say."""
    with_strays, rows = unit.payload
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(_image_name(options, row), []).append(row)
    if unit.key.endswith(STRAYS):
        for row in rows:
            drops.add(row.problem or "no image name", f"{options.table} line {row.line}")
        return
    if with_strays:
        drops.lose(ANYTHING)  # counted with the strays
    for name, of_image in by_image.items():
        with drops.image(f"{options.table} line {of_image[0].line}"):
            yield from _image(options, files.open_image(options, name), of_image, drops)


def _image(options: Options, found: Sample, rows: Sequence[Row], drops: Drops) -> Iterator[Sample]:
    """Yield the image with what its rows say; nothing if one of them is unclear or contradicts another."""
    fractions = options.box is not None and options.box.unit == "fractions"
    size = files.size_of(found) if fractions else (1, 1)
    mode = options.row_is or ("finding" if options.box else "picture")
    seen: list[tuple[Annotation, ...]] = []
    about: dict[str, Any] | None = None
    for row in rows:
        where = f"{found.source_file}, {options.table} line {row.line}"
        if row.problem:
            drops.add(row.problem, where)
            continue
        try:
            parsed = _parsed(options, row, size, drops, where)
            if parsed is None:
                continue
            findings, facts = parsed
            if about not in (None, facts):
                detail = f"{about} and {facts}"
                raise Unusable("image listed twice with different values", detail)
            about = facts
            if findings in seen:
                drops.add("duplicate row", where, lost=NOTHING)
                continue
            if seen and mode == "picture":
                labels = [[finding.label for finding in row] for row in (seen[0], findings)]
                detail = f"{labels[0]} and {labels[1]}"
                raise Unusable("image listed twice with different labels", detail)
            seen.append(findings)
        except Unusable as error:
            drops.add(error.reason, where, error.detail, lost=NOTHING)  # the image falls
            return
    if about is None:
        return  # every row was dropped with its reason
    yield replace(
        found,
        annotations=tuple(finding for findings in seen for finding in findings),
        examined=tuple(options.one_hot.values()),  # each has its cell, or the image falls
        **about | {"attributes": {**found.attributes, **about["attributes"]}},
    )


def _parsed(
    options: Options, row: Row, size: tuple[int, int], drops: Drops, where: str
) -> tuple[tuple[Annotation, ...], dict[str, Any]] | None:
    """Return findings and facts of a row, None if it was dropped; `Unusable` if the image falls with it."""
    labels = list(dict.fromkeys(_labels(options, row)))
    cells = [row.cells[column] for column in options.box.used] if options.box else []
    # In a shifted row one of the words is its label; which of them is not ours to tell.
    lost = [*labels, *([ANYTHING] if words_of(cells) else [])] if labels else []
    with drops.annotation(where, *lost):
        box = _box(options.box, options, row, size) if options.box else None
        if not labels:
            raise Unusable("no label")
        attributes = _attributes(options, row, options.finding_columns)
        findings = tuple(Annotation(label, box, attributes=attributes) for label in labels)
        return findings, _facts(options, row)
    return None


def _facts(options: Options, row: Row) -> dict[str, Any]:
    """Return what a row says of its image: fields of its sample."""
    columns = {"group": options.group_column, "modality": options.modality_column}
    cells = {
        field: cell_text(row.cells[column])
        for field, column in (columns | {"licence": options.licence_column}).items()
        if column
    }
    found = {field: text for field, text in cells.items() if text not in options.missing}
    if options.group_column and "group" not in found:
        raise Unusable("no group", f"column {options.group_column!r} is empty")
    return found | {"attributes": _attributes(options, row, options.attribute_columns)}


def _attributes(options: Options, row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for column, name in columns.items():
        text = cell_text(row.cells[column])
        words = options.attribute_values.get(name, {text: text})
        if text not in options.missing and text not in words:
            raise Unusable("unknown value of an attribute", f"{name} is {text!r}")
        if text not in options.missing:
            found[name] = words[text]
    return found


def _labels(options: Options, row: Row) -> Iterator[str]:
    for column in options.label:
        cell = row.cells[column]
        parts = cell if isinstance(cell, list) else [cell]
        if options.label_separator and isinstance(cell, str):
            parts = cell.split(options.label_separator)
        yield from (text for part in parts if (text := cell_text(part)) not in options.missing)
    applies = False
    for column, label in options.one_hot.items():
        text = cell_text(row.cells[column])
        if text in options.positive:
            applies = True
            yield label
        elif text not in options.negative:
            raise Unusable("unclear cell of a label's column", f"{column} is {text!r}")
    if options.nothing is not None and not applies:
        yield options.nothing


def _box(
    columns: BoxColumns, options: Options, row: Row, size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    texts = {name: row.cells[name] for name in columns.used}
    empty = [name for name, cell in texts.items() if cell_text(cell) in options.missing]
    if len(empty) == len(texts):
        return None
    if empty:
        raise Unusable("incomplete box", f"column {', '.join(empty)} is empty")
    try:
        parts = files.numbers(_parts(columns, row))
    except ValueError as error:
        raise Unusable("box that can't be read", str(error)) from error
    if columns.unit == "fractions":
        if any(abs(value) > 1 + 1e-4 for value in parts.values()):
            raise Unusable("fraction below 0 or above 1", str(parts))
        parts = {part: value * size[part in _AXES[1]] for part, value in parts.items()}
    (x1, x2), (y1, y2) = (_edges(parts, *axis) for axis in _AXES)
    last = int(columns.last_pixel_inside)
    return (x1, y1, x2 + last, y2 + last)


def _parts(columns: BoxColumns, row: Row) -> dict[str, object]:
    if columns.column is None:
        return {part: row.cells[column] for part, column in columns.columns.items()}
    cell = row.cells[columns.column]
    values = cell if isinstance(cell, list) else re.findall(r"[^\s,;|()\[\]]+", str(cell))
    if len(values) != 4:
        raise ValueError(f"column {columns.column} is {cell!r}, where four numbers are expected")
    return dict(zip(columns.order or (), values, strict=True))


def _edges(
    parts: Mapping[str, float], first: str, second: str, centre: str, extent: str
) -> tuple[float, float]:
    if extent not in parts:
        return parts[first], parts[second]
    if centre in parts:
        return parts[centre] - parts[extent] / 2, parts[centre] + parts[extent] / 2
    if first in parts:
        return parts[first], parts[first] + parts[extent]
    return parts[second] - parts[extent], parts[second]
