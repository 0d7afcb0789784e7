# SPDX-License-Identifier: Apache-2.0

"""Rows and a column map -> questions."""

from __future__ import annotations

import difflib
import json
import os
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmai_xtuner.evaluate.benchmarks.maps import PLACES, Layout, Map, table_columns
from gmai_xtuner.evaluate.benchmarks.reading import (
    Benchmark,
    BenchmarkError,
    Collector,
    SourceFile,
    UnreadableOptions,
    find_file,
    gold_option,
    mark_images,
    parse_list,
)
from gmai_xtuner.evaluate.benchmarks.rows import Row, lowered, read_rows
from gmai_xtuner.evaluate.questions import ImageSource, Question

LETTERS = string.ascii_uppercase
_PART = re.compile(r"(.*)_part_?(\d+)()$|(.*)-(\d+)-of-(\d+)\b", re.IGNORECASE)
_MANY = 20
"""Answers after which an index that never occurs is told."""


@dataclass(frozen=True, slots=True)
class _Fault(Exception):
    """What is wrong with a row: the key that it is counted under, the column, and a sentence."""

    reason: str
    column: str
    detail: str


def read_files(
    found: Map,
    layout: Layout,
    paths: Sequence[Path],
    variant: str,
    *,
    require_images: bool,
    strict: bool,
) -> Benchmark:
    """Read the questions of files in one layout.

    Args:
        found: the benchmark.
        layout: of the files.
        paths: in their order.
        variant: of the benchmark.
        require_images: leave out questions whose image is missing.
        strict: refuse files with rows that can't be right, as a user's own benchmark is.

    Raises:
        BenchmarkError: a file can't be read, is another than the map says, or no question can be asked.
    """
    folders = [folder for path in paths for folder in _folders(layout, path, variant)]
    collector = Collector(
        found.name,
        variant,
        require_images=require_images,
        roots={os.path.abspath(one) for one in (*folders, *(path.parent for path in paths))},
        needs_images=bool(layout.images or layout.base64),
        strict=strict,
    )
    reader = _Reader(layout, variant, collector)
    sources = [reader.read(path) for path in paths]
    reader.finish(paths)
    total = found.total(layout, variant)
    if total is not None and reader.counted > total:
        raise BenchmarkError(
            f"{', '.join(repr(str(path)) for path in paths[:3])}: {reader.counted} questions, {found.name} "
            f"{variant} has {total}. It is another part or another benchmark, and not scored as {found.name}."
        )
    return collector.benchmark(sources, found.asked())


def _folders(layout: Layout, path: Path, variant: str) -> list[Path]:
    """Return where the images of a file may lie."""
    names = (one.replace("{variant}", variant) for one in layout.image_folders)
    named = (path.parent / name.replace("{stem}", path.stem) for name in names)
    return [Path(os.path.normpath(one)) for one in named]


class _Reader:
    """Reads the files of a layout, one after another."""

    def __init__(self, layout: Layout, variant: str, collector: Collector) -> None:
        self.layout, self.variant, self.collector = layout, variant, collector
        self.counted = self._rows = 0
        self._names: set[tuple[str, str]] = set()
        self._numbers_of_options: Counter[int] = Counter()
        self._indices: Counter[int] = Counter()
        self._where = {
            text: re.compile(pattern.replace("{variant}", re.escape(variant)))
            for text, pattern in layout.where.items()
        }

    def read(self, path: Path) -> SourceFile:
        """Give a file's questions to the collector; raises as :func:`read_files`."""
        layout = self.layout
        columns, rows, source = read_rows(
            path, images=layout.images, base64_images=layout.base64, at=layout.at
        )
        if layout.lower:
            columns = tuple(map(lowered, columns))
            rows = [
                replace(row, values={lowered(name): value for name, value in row.values.items()})
                for row in rows
            ]
        self._check_file(path, columns, rows, source)
        wanted = _keys_of(path.parent / layout.ids_in) if layout.ids_in else None
        by_index = {str(row.values.get(layout.id)): row for row in rows} if layout.base64 else {}
        folders = _folders(layout, path, self.variant)
        for number, row in enumerate(rows, start=1):
            self._rows += 1
            self.collector.place = f"{str(path)!r}, {row.place}"
            places = (self.variant, path.stem, path.parent.name, number, self._rows, self._rows - 1)
            values = _Values(row.values, dict(zip(PLACES, map(str, places), strict=True)))
            identifier = values.text(layout.id).strip() or values.text(layout.number)
            counts = all(one.search(values.text(text)) for text, one in self._where.items())
            if not counts or (wanted is not None and identifier not in wanted):
                continue
            self.counted += 1
            try:
                question = self._question(
                    identifier, values, self._images(values, row, by_index, folders)
                )
            except _Fault as fault:
                self.collector.problem(fault.reason, identifier, fault.detail, column=fault.column)
            else:
                self._names.update(question.groups.items())
                self._numbers_of_options[len(question.options)] += 1
                self.collector.add(question)
        return source

    def finish(self, paths: Sequence[Path]) -> None:
        """Note what the files lack as a whole."""
        layout, problem = self.layout, self.collector.problem
        parts: dict[tuple[str, int, int], set[int]] = {}
        for match in filter(None, (_PART.match(path.stem) for path in paths)):
            first, number = (1, match[2]) if match[2] else (0, match[5])
            key = (match[1] or match[4], first, int(match[6] or layout.num_parts))
            parts.setdefault(key, set()).add(int(number))
        for (name, first, total), there in parts.items():
            for part in sorted(set(range(first, first + total)) - there):
                problem("missing_part", f"part {part}", f"this file of {name!r} is not there")
        for group, names in layout.covers.items():
            for name in names:
                if (group, name) not in self._names:
                    problem(f"missing_{group}", name, "no file has a question of it")
        if not self.collector.strict:
            return
        if len(self._numbers_of_options) > 1:
            counts = (
                f"{n} of {options}" for options, n in sorted(self._numbers_of_options.items())
            )
            told = f"questions have different numbers of options: {', '.join(counts)}"
            problem("option_count", "all", told, left_out=False)
        if layout.answer_is == "index0" and self._indices.total() >= _MANY and not self._indices[0]:
            told = f"answer_is is index0, but none of {self._indices.total()} answers is 0: is it index1?"
            problem("answer_index", "all", told, left_out=False)

    def _check_file(
        self, path: Path, columns: Sequence[str], rows: Sequence[Row], source: SourceFile
    ) -> None:
        layout, strict = self.layout, self.collector.strict
        expected = layout.sha256.get(path.name, source.sha256)
        if expected != source.sha256:
            raise BenchmarkError(
                f"{str(path)!r} has the SHA-256 {source.sha256}, its column map expects {expected}: it is "
                "another version of the file."
            )
        if not rows:
            raise BenchmarkError(f"{str(path)!r} has no row. Fetch it again.")
        known = dict.fromkeys(layout.header, "header")
        if strict:
            usual = table_columns() if layout.lower else {}
            known |= {name: key for name, key in layout.columns().items() if name not in usual}
        if layout.base64 and not {layout.base64, *layout.images} & set(columns):
            if not strict:
                known[layout.base64] = "base64"
            self.collector.needs_images = False
        for name, key in known.items():
            if name not in columns and name.partition(".")[0] not in columns:
                near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise BenchmarkError(
                    f"{str(path)!r} has no column {name!r}, which its column map names under {key}. {hint}"
                    f"Its columns are {', '.join(columns)}."
                )

    def _question(
        self, identifier: str, values: _Values, images: Mapping[int, ImageSource]
    ) -> Question:
        layout = self.layout
        lettered = self._options(values)
        is_open = any(re.search(one, values.text(text)) for text, one in layout.open.items())
        if is_open:
            lettered = {}
        elif layout.has_options and not lettered and layout.no_options == "error":
            raise _Fault("bad_options", str(layout.options), "the question has no options")
        if not lettered and layout.no_options == "left_out":
            raise _Fault("no_options", "", "an open question, which the authors skip")
        if layout.num_options not in (0, len(lettered)):
            told = f"{layout.num_options} options were expected, {len(lettered)} came"
            raise _Fault("bad_options", str(layout.options), told)
        text = layout.request or values.text(layout.question)
        text = text.partition(layout.until)[0] if layout.until else text
        if layout.hint and (hint := values.text(layout.hint)):
            text = f"Hint: {hint}\n{text}"
        try:
            (text, *options), sources = mark_images(
                (text.strip() if layout.strip else text, *lettered.values()), images
            )
        except KeyError as error:
            told = f"the text names image {error.args[0]}"
            raise _Fault("missing_image", "images", told) from error
        answers, letter = self._answers(values, lettered, identifier)
        if letter:
            answers = (options[list(lettered).index(letter)],)
        letters = "".join(lettered)
        return Question(
            id=identifier,
            text=text,
            images=sources,
            options=tuple(options),
            answer=answers[0] if answers else None,
            answers=answers[1:],
            groups=self._groups(values, answers),
            letters="" if letters == LETTERS[: len(letters)] else letters,
            gold_letter="" if layout.answer_is == "text" else letter,
        )

    def _options(self, values: _Values) -> dict[str, str]:
        """Return letter -> text of each option."""
        layout, column = self.layout, self.layout.options
        raw: Any = values.get(column) if isinstance(column, str) else ()
        letters: Sequence[str] = LETTERS
        if column == "A-Z":
            letters = [one for one in LETTERS if values.get(one) is not None]
            texts = [values.text(one) for one in letters]
        elif isinstance(column, tuple):
            texts = [values.text(one) for one in column]
        elif not column:
            texts = list(layout.fixed_options)
        elif isinstance(raw, Mapping):
            letters = [letter for letter, text in raw.items() if text is not None]
            texts = [str(raw[letter]) for letter in letters]
        else:
            try:
                texts = list(parse_list(raw))
            except UnreadableOptions as error:
                raise _Fault("bad_options", column, str(error)) from error
        if len(texts) > len(LETTERS) or not set(letters) <= set(LETTERS):
            told = f"options have the letters A to Z, {len(texts)} came: {list(letters)}"
            raise _Fault("bad_options", str(column), told)
        lettered = {
            letter: self._bare(letter, text) for letter, text in zip(letters, texts, strict=False)
        }
        if layout.gaps:
            return {letter: text for letter, text in lettered.items() if text}
        if not all(text.strip() for text in lettered.values()):
            told = f"an empty option: {tuple(lettered.values())}"
            raise _Fault("bad_options", str(column), told)
        return lettered

    def _bare(self, letter: str, text: str) -> str:
        if self.layout.option_prefix:
            text = re.sub("^" + self.layout.option_prefix.replace("{letter}", letter), "", text)
        return text.strip() if self.layout.strip else text

    def _answers(
        self, values: _Values, lettered: Mapping[str, str], identifier: str
    ) -> tuple[tuple[str, ...], str]:
        """Return the gold answers, or the letter of the right option; neither where the authors keep it."""
        layout, column = self.layout, self.layout.answer or ""
        raw = values.text(column)
        said = raw.strip()
        if layout.answer is None or said in layout.unknown:
            return (), ""
        if not said:
            if layout.answer_is == "letter_or_text":
                return (), ""
            raise _Fault("no_answer", column, "the gold answer is empty")
        text = said if layout.strip else raw
        if not lettered:
            if not (layout.several and said.startswith("[")):
                return (said if layout.several else text,), ""
            try:
                return parse_list(said), ""
            except UnreadableOptions as error:
                raise _Fault("bad_answer", column, str(error)) from error
        letter = self._letter(said, text, lettered, identifier)
        if letter and layout.answer_text:
            other = self._bare(letter, values.text(layout.answer_text)).strip()
            if other != lettered[letter].strip():
                told = f"it is {lettered[letter]!r}, {layout.answer_text} is {other!r}; the first counts"
                self._note("answer_disagrees", identifier, told)
        return (() if letter else (text,)), letter

    def _letter(self, said: str, text: str, lettered: Mapping[str, str], identifier: str) -> str:
        """Return the letter that the answer means; empty for a text that is no option.

        Raises:
            _Fault: it is not in the form that ``answer_is`` says.
        """
        how, letters = self.layout.answer_is, list(lettered)
        by_text = {option: letter for letter, option in reversed([*lettered.items()])}
        if how == "letter":
            if said.rstrip(":.") in letters:
                return said.rstrip(":.")
            hint = "; it is the text of one: answer_is: text?" if said in by_text else ""
            wanted = f"the letter of an option ({', '.join(letters)})"
            raise _Fault(
                "bad_answer", str(self.layout.answer), f"{wanted} was expected, {said!r} came{hint}"
            )
        if how in ("index0", "index1"):
            first = int(how[-1])
            number = int(float(said)) if re.fullmatch(r"\d{1,3}(\.0)?", said) else -1
            if first <= number < first + len(letters):
                self._indices[number] += 1
                return letters[number - first]
            wanted = f"a number from {first} to {first + len(letters) - 1}"
            raise _Fault(
                "bad_answer", str(self.layout.answer), f"{wanted} was expected, {said!r} came"
            )
        if how == "letter_or_text" and said in letters:
            if by_text.get(said, said) != said:
                told = f"{said!r} is a letter and the text of option {by_text[said]}; the letter counts"
                self._note("ambiguous_answer", identifier, told)
            return said
        return by_text.get(text if how == "exact" else gold_option(tuple(by_text), text), "")

    def _note(self, reason: str, identifier: str, told: str) -> None:
        column = str(self.layout.answer)
        self.collector.problem(reason, identifier, told, left_out=False, column=column)

    def _images(
        self,
        values: _Values,
        row: Row,
        by_index: Mapping[str, Row],
        folders: Sequence[Path],
    ) -> dict[int, ImageSource]:
        """Return number in the texts' marks -> image."""
        layout = self.layout
        if row.image_of:
            other = by_index.get(row.image_of)
            if other is None or not other.images:
                told = f"the image is that of index {row.image_of!r}, which has none"
                raise _Fault("missing_image", layout.base64, told)
            row = other
        found: dict[int, ImageSource] = dict(enumerate(row.images.get(layout.base64, ()), start=1))
        for column in layout.images if not found else ():
            images: Sequence[ImageSource] = row.images.get(column, ())
            if column not in row.images:
                names = self._image_names(values, column)
                images = [
                    find_file(layout.image_name.replace("{}", name), folders) for name in names
                ]
            named = re.search(r"_(\d+)$", column) if len(layout.images) > 1 else None
            found.update(enumerate(images, start=int(named[1]) if named else len(found) + 1))
        return found

    def _image_names(self, values: _Values, column: str) -> Sequence[str]:
        raw, text = values.get(column), values.text(column).strip()
        if not isinstance(raw, list | tuple) and not text.startswith("["):
            return [text] if text else []
        try:
            return [name for name in parse_list(raw) if name]
        except UnreadableOptions as error:
            raise _Fault("bad_image_path", column, str(error)) from error

    def _groups(self, values: _Values, answers: Sequence[str]) -> dict[str, str]:
        found = {}
        for name, one in self.layout.groups.items():
            columns = (
                one if isinstance(one, tuple) else (one if isinstance(one, str) else one.text,)
            )
            text = next((text for column in columns if (text := values.text(column).strip())), "")
            if not isinstance(one, str | tuple):
                match = re.search(one.match, text) if one.match else None
                text = match[0] if match else text
                if one.yes_no and answers:
                    text = one.yes_no[answers[0].lower() not in ("yes", "no")]
            if text:
                found[name] = text
        return found


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of a row, and what is known of its place."""

    values: Mapping[str, Any]
    places: Mapping[str, str]

    def get(self, column: str) -> Any:
        """Return a value; of ``context.contexts`` the value within another."""
        outer, _, inner = column.partition(".")
        within = self.values.get(outer)
        if inner and column not in self.values and isinstance(within, Mapping):
            return within.get(inner)
        return self.values.get(column, self.places.get(column))

    def text(self, column: str) -> str:
        """Return a column, or a template of columns, as text; absent and null are empty, lists are lines."""
        if "{" in column:
            return re.sub(r"\{([^{}]+)\}", lambda match: self.text(match[1]), column)
        value = self.get(column) if column else None
        if isinstance(value, list | tuple):
            return "\n".join(map(str, value))
        return "" if value is None else str(value)


def _keys_of(path: Path) -> frozenset[str]:
    try:
        return frozenset(dict(json.loads(path.read_text(encoding="utf-8-sig"))))
    except (OSError, ValueError, TypeError) as error:
        raise BenchmarkError(
            f"{str(path)!r}, whose keys say which questions count, can't be read ({error}). Fetch it."
        ) from error
