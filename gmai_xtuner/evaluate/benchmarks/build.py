# SPDX-License-Identifier: Apache-2.0

"""Rows and a column map -> questions."""

from __future__ import annotations

import difflib
import os
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import is_unicode
from gmai_xtuner.core.strict_json import STRICT_JSON
from gmai_xtuner.evaluate.benchmarks.maps import PLACES, Group, Layout, Map, table_columns
from gmai_xtuner.evaluate.benchmarks.rows import (
    Row,
    UnreadableOptions,
    lowered,
    parse_list,
    read_rows,
    short,
)
from gmai_xtuner.evaluate.questions import (
    IMAGE_MARK,
    Benchmark,
    BenchmarkError,
    ImageSource,
    Problem,
    Question,
    SourceFile,
)

LETTERS = string.ascii_uppercase
_NUMBERED_MARK = re.compile(r"<image (\d+)>")
_PART = re.compile(
    r"(?P<name>.*)_part_?(?P<part>\d+)$|(?P<shards_name>.*)-(?P<shard>\d+)-of-(?P<shards>\d+)\b",
    re.IGNORECASE,
)
"""``name_part_1``, counted from 1, or the hub's ``name-00000-of-00004``."""
_MANY = 20
"""Answers after which an index that never occurs is told."""
_OWN_IS_REFUSED_FOR = frozenset(
    {
        *("no_question", "no_answer", "no_options", "one_option", "bad_options", "bad_answer"),
        *("bad_image_path", "answer_disagrees", "ambiguous_answer", "answer_not_an_option"),
        "duplicate_id",
    }
)
"""What is wrong with a file or with its column map: an own benchmark is refused, the authors' is not."""


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

    ``require_images`` leaves out questions whose image is missing; ``strict`` refuses files with rows that
    can't be right, as a user's own benchmark is. A ``BenchmarkError`` if a file can't be read, is another
    than the map says, or no question can be asked.
    """
    reader = _Reader(layout, variant, paths, require_images=require_images, strict=strict)
    source = [reader.read(path) for path in paths]
    reader.finish()
    total = found.total(layout, variant)
    if total is not None and reader.counted > total:
        raise BenchmarkError(
            f"{', '.join(repr(str(path)) for path in paths[:3])}: {reader.counted} questions, {found.name} "
            f"{variant} has {total}. It is another part or another benchmark, and not scored as {found.name}."
        )
    questions, problems = tuple(reader.questions.values()), tuple(reader.problems)
    read = Benchmark(found.name, variant, questions, tuple(source), problems, found.asked())
    if questions:
        return read
    files = ", ".join(repr(str(path)) for path in paths[:3])
    files += f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    told = f"{files} has no question of this variant."
    if problems:
        counts = ", ".join(f"{count} {why}" for why, count in read.counted_problems().items())
        first = f"question {problems[0].record}, {problems[0].detail}"
        told = f"not one question of {files} can be asked ({counts}). The first: {first}."
    raise BenchmarkError(f"{read.title}: {told}")


def _folders(layout: Layout, path: Path, variant: str) -> list[Path]:
    """Return where the images of a file may lie."""
    names = (one.replace("{variant}", variant) for one in layout.image_folders)
    named = (path.parent / name.replace("{stem}", path.stem) for name in names)
    return [Path(os.path.normpath(one)) for one in named]


class _Reader:
    """Reads the files of a layout, one after another; gathers questions and what is wrong with others."""

    def __init__(
        self,
        layout: Layout,
        variant: str,
        paths: Sequence[Path],
        *,
        require_images: bool,
        strict: bool,
    ) -> None:
        self.layout, self.variant, self.paths = layout, variant, paths
        self.require_images, self.strict = require_images, strict
        self.needs_images = bool(layout.images or layout.base64)
        roots = [one for path in paths for one in (*_folders(layout, path, variant), path.parent)]
        # image files lie below these; a record may name no other file
        self.roots = tuple(os.path.abspath(one).rstrip("/") + "/" for one in dict.fromkeys(roots))
        self.questions: dict[str, Question] = {}
        self.problems: list[Problem] = []
        self.counted = 0  # questions of this variant, asked or left out
        self.rows = 0  # of all files so far
        self.place = ""  # of the row that is being read, for messages
        self.repeated: Counter[str] = Counter()
        self.groups: set[tuple[str, str]] = set()
        self.numbers_of_options: Counter[int] = Counter()
        self.indices: Counter[int] = Counter()
        self.listed: dict[Path, frozenset[str]] = {}
        self.where = {
            text: re.compile(pattern.replace("{variant}", re.escape(variant)))
            for text, pattern in layout.where.items()
        }

    def problem(
        self, reason: str, record: str, detail: str, *, left_out: bool = True, column: str = ""
    ) -> None:
        """Note what is wrong with a record; a ``BenchmarkError`` where the file is refused for it."""
        if self.strict and reason in _OWN_IS_REFUSED_FOR:
            where = f", column {column!r}" if column else ""
            raise BenchmarkError(
                f"{self.place}{where} (question {record}): {detail}. Correct the file or its column map."
            )
        self.problems.append(Problem(reason, record, detail, left_out))

    def read(self, path: Path) -> SourceFile:
        """Read a file's questions; raises as :func:`read_files`."""
        layout = self.layout
        images, base64, at = layout.images, layout.base64, layout.at
        columns, rows, source = read_rows(path, images=images, base64_images=base64, at=at)
        if layout.lower:
            if len(set(map(lowered, columns))) < len(columns):
                told = f"columns of one name but for case or spaces: {', '.join(columns)}"
                raise BenchmarkError(f"{str(path)!r} has {told}. Rename one.")
            columns = tuple(map(lowered, columns))
            lower = ({lowered(name): one for name, one in row.values.items()} for row in rows)
            rows = [replace(row, values=values) for row, values in zip(rows, lower, strict=True)]
        self._check_file(path, columns, rows, source)
        wanted = _keys_of(path.parent / layout.ids_in) if layout.ids_in else None
        by_index = {str(row.values.get(layout.id)): row for row in rows} if layout.base64 else {}
        folders = _folders(layout, path, self.variant)
        for number, row in enumerate(rows, start=1):
            places = (self.variant, path.stem, path.parent.name, number, self.rows + 1, self.rows)
            record = _Record(layout, row, dict(zip(PLACES, map(str, places), strict=True)))
            self.rows += 1
            self.place = f"{str(path)!r}, {row.place}"
            counts = all(one.search(record.text(text)) for text, one in self.where.items())
            if counts and (wanted is None or record.id in wanted):
                self.counted += 1
                self._take(record, by_index, folders)
        return source

    def _take(self, record: _Record, by_index: Mapping[str, Row], folders: Sequence[Path]) -> None:
        """Take a record's question, unless it can't be asked: then note why."""
        column = str(self.layout.answer)
        try:
            question = record.question(
                record.images(by_index, folders), without_images=not self.require_images
            )
        except _Fault as fault:
            self.problem(fault.reason, record.id, fault.detail, column=fault.column)
            return
        for reason, told in record.notes:
            self.problem(reason, record.id, told, left_out=False, column=column)
        self.groups.update(question.groups.items())
        self.numbers_of_options[len(question.options)] += 1
        if record.index is not None:
            self.indices[record.index] += 1
        if (why := next(self._why_not_asked(question), None)) is not None:
            name = ascii(question.id) if why[0] == "not_text" else question.id
            self.problem(why[0], name, why[1])
            return
        if question.id in self.questions:
            # the authors' counts hold it, so it stays, under an id of its own
            self.repeated[question.id] += 1
            renamed = f"{question.id}#{self.repeated[question.id] + 1}"
            told = f"the id occurred before; it is {renamed}"
            self.problem("duplicate_id", question.id, told, left_out=False)
            question = replace(question, id=renamed)
        if question.options and question.answer is not None and not question.gold_letters():
            told = f"the gold answer {short(question.answer)} is none of the options: every answer is wrong"
            self.problem("answer_not_an_option", question.id, told, left_out=False)
        self.questions[question.id] = question

    def _why_not_asked(self, question: Question) -> Iterator[tuple[str, str]]:
        """Yield why a question can't be asked: the key that it is counted under, and a sentence."""
        texts = (question.text, *question.options)
        files = [image for image in question.images if isinstance(image, Path)]
        if not question.text.strip():
            yield "no_question", "the question is empty"
        if len(question.options) == 1:
            yield "one_option", f"only one option: {question.options[0]!r}"
        for image in files:
            if not os.path.abspath(image).startswith(self.roots):
                yield "image_outside", f"{str(image)!r} lies outside of {', '.join(self.roots)}"
        if not all(map(is_unicode, (question.id, *texts, question.answer or ""))):
            yield "not_text", "no UTF-8 can hold it (half a surrogate pair)"
        if self.require_images:
            if missing := [str(image) for image in files if not self._exists(image)]:
                yield "missing_image", ", ".join(dict.fromkeys(missing))
            if not question.images and self.needs_images:
                yield "no_image", "the record names no image"
        marks, number = sum(text.count(IMAGE_MARK) for text in texts), len(question.images)
        if marks not in (0, number):
            yield "image_marks", f"{marks} marks {IMAGE_MARK} in the text, {number} images"

    def _exists(self, path: Path) -> bool:
        """Look a file up in one listing of its folder: a look at each of 89,000 files takes longer."""
        if path.parent not in self.listed:
            try:
                self.listed[path.parent] = frozenset(os.listdir(path.parent))
            except OSError:
                self.listed[path.parent] = frozenset()
        return path.name in self.listed[path.parent]

    def finish(self) -> None:
        """Note what the files lack as a whole."""
        layout = self.layout
        parts: dict[tuple[str, int, int], set[int]] = {}
        for match in filter(None, (_PART.match(path.stem) for path in self.paths)):
            if match["part"]:
                key, number = (match["name"], 1, layout.num_parts), match["part"]
            else:
                key, number = (match["shards_name"], 0, int(match["shards"])), match["shard"]
            parts.setdefault(key, set()).add(int(number))
        for (name, first, total), there in parts.items():
            for part in sorted(set(range(first, first + total)) - there):
                self.problem("missing_part", f"part {part}", f"this file of {name!r} is not there")
        for group, names in layout.covers.items():
            for name in names:
                if (group, name) not in self.groups:
                    self.problem(f"missing_{group}", name, "no file has a question of it")
        if self.strict and len(self.numbers_of_options) > 1:
            counts = ", ".join(f"{n} of {k}" for k, n in sorted(self.numbers_of_options.items()))
            told = f"questions have different numbers of options: {counts}"
            self.problem("option_count", "all", told, left_out=False)
        total = self.indices.total()
        if self.strict and layout.answer_is == "index0" and total >= _MANY and not self.indices[0]:
            told = f"answer_is is index0, but none of {total} answers is 0: is it index1?"
            self.problem("answer_index", "all", told, left_out=False)

    def _check_file(
        self, path: Path, columns: Sequence[str], rows: Sequence[Row], source: SourceFile
    ) -> None:
        layout = self.layout
        expected = layout.sha256.get(path.name, source.sha256)
        if expected != source.sha256:
            raise BenchmarkError(
                f"{str(path)!r} has the SHA-256 {source.sha256}, its column map expects {expected}: it is "
                "another version of the file."
            )
        if not rows:
            raise BenchmarkError(f"{str(path)!r} has no row. Fetch it again.")
        known = dict.fromkeys(layout.header, "header")
        if self.strict:
            usual = table_columns() if layout.lower else {}
            known |= {name: key for name, key in layout.columns().items() if name not in usual}
        if layout.base64 and not {layout.base64, *layout.images} & set(columns):
            if not self.strict:
                known[layout.base64] = "base64"
            self.needs_images = False
        for name, key in known.items():
            if name not in columns and name.partition(".")[0] not in columns:
                near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise BenchmarkError(
                    f"{str(path)!r} has no column {name!r}, which its column map names under {key}. {hint}"
                    f"Its columns are {', '.join(columns)}."
                )


class _Record:
    """A row and what its layout makes of it; templates know ``places`` besides the columns.

    ``notes`` say what is odd about the gold answer, after the key that it is counted under; ``index`` is of
    the right option, where the file has a number.
    """

    def __init__(self, layout: Layout, row: Row, places: Mapping[str, str]) -> None:
        self.layout, self.row, self.places = layout, row, places
        self.notes: list[tuple[str, str]] = []
        self.index: int | None = None
        self.id = self.text(layout.id).strip() or self.text(layout.number)

    def get(self, column: str) -> Any:
        """Return a value; of ``context.contexts`` the value within another."""
        values = self.row.values
        outer, _, inner = column.partition(".")
        if inner and column not in values and isinstance(within := values.get(outer), Mapping):
            return within.get(inner)
        return values.get(column, self.places.get(column))

    def text(self, column: str) -> str:
        """Return a column, or a template of columns, as text; absent and null are empty, lists are lines."""
        if "{" in column:
            return re.sub(r"\{([^{}]+)\}", lambda match: self.text(match[1]), column)
        value = self.get(column) if column else None
        if isinstance(value, list | tuple):
            return "\n".join(map(str, value))
        return "" if value is None else str(value)

    def question(self, images: Mapping[int, ImageSource], *, without_images: bool) -> Question:
        """Return the question; a :class:`_Fault` where it has none.

        ``without_images`` leaves marks such as ``<image 2>`` in its texts where it has no images.
        """
        layout = self.layout
        lettered = self._options()
        if any(re.search(one, self.text(text)) for text, one in layout.open.items()):
            lettered = {}
        elif layout.has_options and not lettered and layout.no_options == "error":
            raise _Fault("bad_options", str(layout.options), "the question has no options")
        if not lettered and layout.no_options == "left_out":
            raise _Fault("no_options", "", "an open question, which the authors skip")
        if layout.num_options not in (0, len(lettered)):
            told = f"{layout.num_options} options were expected, {len(lettered)} came"
            raise _Fault("bad_options", str(layout.options), told)
        text = layout.request or self.text(layout.question)
        text = text.partition(layout.until)[0] if layout.until else text
        if layout.hint and (hint := self.text(layout.hint)):
            text = f"Hint: {hint}\n{text}"
        texts = (text.strip() if layout.strip else text, *lettered.values())
        sources: tuple[ImageSource, ...] = ()
        if images or not without_images:
            texts, sources = _mark_images(texts, images)
        text, *options = texts
        answers, letter = self._answers(lettered)
        if letter:
            answers = (options[list(lettered).index(letter)],)
        letters = "".join(lettered)
        return Question(
            id=self.id,
            text=text,
            images=sources,
            options=tuple(options),
            answer=answers[0] if answers else None,
            answers=answers[1:],
            groups=self._groups(answers),
            letters="" if letters == LETTERS[: len(letters)] else letters,
            gold_letter="" if layout.answer_is == "text" else letter,
        )

    def _options(self) -> dict[str, str]:
        """Return letter -> text of each option."""
        layout, column = self.layout, self.layout.options
        letters: Sequence[str] = LETTERS
        if column == "A-Z":
            letters = [one for one in LETTERS if self.get(one) is not None]
            texts = list(map(self.text, letters))
        elif isinstance(column, tuple):
            texts = list(map(self.text, column))
        elif not column:
            texts = list(layout.fixed_options)
        elif isinstance(raw := self.get(column), Mapping):
            letters = [letter for letter, text in raw.items() if text is not None]
            texts = [str(raw[letter]) for letter in letters]
        elif raw is None and layout.no_options != "error":
            return {}
        else:
            texts = list(_parsed(raw, "bad_options", column))
        if len(texts) > len(LETTERS) or not set(letters) <= set(LETTERS):
            told = f"options have the letters A to Z, {len(texts)} came: {list(letters)}"
            raise _Fault("bad_options", str(column), told)
        pairs = zip(letters, texts, strict=False)
        lettered = {letter: self._bare(letter, text) for letter, text in pairs}
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

    def _answers(self, lettered: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
        """Return the gold answers, or the letter of the right option; neither where the authors keep it."""
        layout, column = self.layout, self.layout.answer or ""
        raw = self.text(column)
        said = raw.strip()
        if layout.answer is None or said in layout.unknown:
            return (), ""
        if not said:
            if layout.answer_is == "letter_or_text":
                return (), ""
            raise _Fault("no_answer", column, "the gold answer is empty")
        text = said if layout.strip else raw
        if not lettered:
            if layout.several and said.startswith("["):
                return _parsed(said, "bad_answer", column), ""
            return (said if layout.several else text,), ""
        letter = self._letter(said, text, lettered)
        if letter and layout.answer_text:
            other = self._bare(letter, self.text(layout.answer_text)).strip()
            if other != lettered[letter].strip():
                told = f"it is {lettered[letter]!r}, {layout.answer_text} is {other!r}; the first counts"
                self.notes.append(("answer_disagrees", told))
        return (() if letter else (text,)), letter

    def _letter(self, said: str, text: str, lettered: Mapping[str, str]) -> str:
        """Return the letter that the answer means; empty for a text that is no option.

        A ``_Fault`` if it is not in the form that ``answer_is`` says.
        """
        how, letters = self.layout.answer_is, list(lettered)
        by_text = {option: letter for letter, option in reversed([*lettered.items()])}
        if how == "letter":
            if said.rstrip(":.") in letters:
                return said.rstrip(":.")
            hint = "; it is the text of one: answer_is: text?" if said in by_text else ""
            wanted = f"the letter of an option ({', '.join(letters)})"
            told = f"{wanted} was expected, {said!r} came{hint}"
            raise _Fault("bad_answer", str(self.layout.answer), told)
        if how in ("index0", "index1"):
            first = int(how[-1])
            number = int(float(said)) if re.fullmatch(r"\d{1,3}(\.0)?", said) else -1
            if first <= number < first + len(letters):
                self.index = number
                return letters[number - first]
            wanted = f"a number from {first} to {first + len(letters) - 1}"
            told = f"{wanted} was expected, {said!r} came"
            raise _Fault("bad_answer", str(self.layout.answer), told)
        if how == "letter_or_text" and said in letters:
            if by_text.get(said, said) != said:
                told = f"{said!r} is a letter and the text of option {by_text[said]}; the letter counts"
                self.notes.append(("ambiguous_answer", told))
            return said
        # an option is meant if it is equal, or the only one that is but for case and outer spaces
        same = [one for one in by_text if one.strip().casefold() == text.strip().casefold()]
        meant = same[0] if how != "exact" and text not in by_text and len(same) == 1 else text
        return by_text.get(meant, "")

    def images(
        self, by_index: Mapping[str, Row], folders: Sequence[Path]
    ) -> dict[int, ImageSource]:
        """Return number in the texts' marks -> image."""
        layout, row = self.layout, self.row
        if row.image_of:
            row = by_index.get(row.image_of, Row("", {}))
            if not row.images:
                told = f"the image is that of index {self.row.image_of!r}, which has none"
                raise _Fault("missing_image", layout.base64, told)
        found: dict[int, ImageSource] = dict(enumerate(row.images.get(layout.base64, ()), start=1))
        for column in layout.images if not found else ():
            images: Sequence[ImageSource] = row.images.get(column, ())
            if column not in row.images:
                names = (layout.image_name.replace("{}", one) for one in self._image_names(column))
                places = [[folder / name for folder in folders] for name in names]
                images = [next(filter(os.path.isfile, one), one[0]) for one in places]
            named = re.search(r"_(\d+)$", column) if len(layout.images) > 1 else None
            found.update(enumerate(images, start=int(named[1]) if named else len(found) + 1))
        return found

    def _image_names(self, column: str) -> Sequence[str]:
        raw, text = self.get(column), self.text(column).strip()
        if not isinstance(raw, list | tuple) and not text.startswith("["):
            return [text] if text else []
        return [name for name in _parsed(raw, "bad_image_path", column) if name]

    def _groups(self, answers: Sequence[str]) -> dict[str, str]:
        found = {}
        for name, one in self.layout.groups.items():
            text = one.text if isinstance(one, Group) else one
            columns = (text,) if isinstance(text, str) else text
            text = next((text for column in columns if (text := self.text(column).strip())), "")
            if isinstance(one, Group):
                match = re.search(one.match, text) if one.match else None
                text = match[0] if match else text
                if one.yes_no and answers:
                    is_yes_no = answers[0].lower() in ("yes", "no")
                    text = one.yes_no[0] if is_yes_no else one.yes_no[1]
            if text:
                found[name] = text
        return found


def _parsed(raw: Any, reason: str, column: str) -> tuple[str, ...]:
    try:
        return parse_list(raw)
    except UnreadableOptions as error:
        raise _Fault(reason, column, str(error)) from error


def _mark_images(
    texts: Sequence[str], images: Mapping[int, ImageSource]
) -> tuple[tuple[str, ...], tuple[ImageSource, ...]]:
    """Turn texts with ``<image 2>`` into the same with ``<image>``, and order the images as the marks.

    Without any mark the images stand in their own order, for before the text; an image that no mark
    names comes before the text's own, as it would without marks.
    """
    numbers = [int(number) for text in texts for number in _NUMBERED_MARK.findall(text)]
    for number in numbers:
        if number not in images:
            raise _Fault("missing_image", "images", f"the text names image {number}")
    first, *rest = (_NUMBERED_MARK.sub(IMAGE_MARK, text) for text in texts)
    unnamed = [images[number] for number in sorted(images) if number not in numbers]
    if numbers:
        first = f"{IMAGE_MARK}\n" * len(unnamed) + first
    return (first, *rest), (*unnamed, *(images[number] for number in numbers))


def _keys_of(path: Path) -> frozenset[str]:
    try:
        return frozenset(dict(STRICT_JSON.decode(path.read_text(encoding="utf-8-sig"))))
    except (OSError, ValueError, TypeError) as error:
        raise BenchmarkError(
            f"{str(path)!r}, whose keys say which questions count, can't be read ({error}). Fetch it."
        ) from error
