# SPDX-License-Identifier: Apache-2.0

"""A benchmark, read without knowing which it is: question files in the usual shapes, and images."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.contamination import rows
from data_tools.contamination.hashing import ImageSource, content_key
from gmai_xtuner.core.conversation import user_texts
from gmai_xtuner.core.errors import CorpusError, GMAIError

RECOGNISED = (
    "Question files: .json, .jsonl, .ndjson, .csv, .tsv or .parquet with a column question, query, problem, "
    "instruction or prompt, or with conversations; images in columns such as image, image_path, img_name, "
    "Figure_path, image_1 (a path, base64, bytes, or a list), or image files below the folder"
)


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image of the benchmark: its ``name``, and the file or, of one in a table, its key in the cache."""

    name: str
    path: Path | None
    key: str = ""


@dataclass(slots=True)
class Item:
    """A question of the benchmark, from a ``row`` of a ``file``; what it lacks is "".

    ``texts`` are the question as it may occur (bare, with its options, rephrased), ``answer`` the right one
    as text, ``images`` positions of its images, ``case`` the patient or case.
    """

    file: str
    row: int
    id: str
    texts: tuple[str, ...]
    answer: str
    images: tuple[int, ...]
    case: str

    @property
    def name(self) -> str:
        return f"{self.file}, {'id ' + self.id if self.id else f'row {self.row}'}"


@dataclass
class Benchmark:
    """A benchmark; :meth:`read` fills it.

    ``only`` are patterns of its question files (empty: all), ``where`` column -> pattern of the rows that
    count; ``left_out`` rows don't. ``files`` are names of question files with their rows; ``passed_over`` and
    ``not_found`` names with what is wrong; ``unnamed`` image files are named by no question.
    """

    path: Path
    image_root: Path | None = None
    only: Sequence[str] = ()
    where: Mapping[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    images: list[NamedImage] = field(default_factory=list)
    not_found: list[tuple[str, str]] = field(default_factory=list)
    unnamed: int = 0
    left_out: int = 0
    notes: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def read(self) -> Iterator[ImageSource]:
        """Read everything; images are handed on as they come, for those in tables would fill the memory.

        A `GMAIError` if nothing is there, or a question file is damaged.
        """
        if not self.path.exists():
            raise CorpusError(f"{self.path} does not exist. Name a benchmark's folder or file.")
        for file in self._question_files():
            yield from self._read(file)
        if self.path.is_dir():
            yield from self._image_files()
        elif rows.is_image(self.path.name):
            yield from self._number(self.path, self.path.name)[1]

    def _question_files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path] if self.path.suffix.lower() in rows.QUESTION_FILES else []
        found = []
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() not in rows.QUESTION_FILES or not file.is_file():
                continue
            name = file.relative_to(self.path).as_posix()
            if self.only and not any(
                fnmatchcase(name, p) or fnmatchcase(file.name, p) for p in self.only
            ):
                self.passed_over.append((name, "no pattern of --only fits"))
            else:
                found.append(file)
        if self.only and not found:
            raise CorpusError(
                f"no question file of {self.path} fits --only {', '.join(self.only)}. There are: "
                f"{', '.join(name for name, _ in self.passed_over[:10]) or 'none'}."
            )
        return found

    def _read(self, file: Path) -> Iterator[ImageSource]:
        name = file.relative_to(self.folder).as_posix()
        count, seen, splits, split_column = 0, 0, Counter[str](), ""
        columns: set[str] = set()
        by_index: dict[str, tuple[int, ...]] = {}
        waiting: list[tuple[Item, str]] = []
        try:
            for seen, raw in enumerate(rows.rows(file), 1):
                columns.update(map(str, raw))
                cells = rows.by_name(raw)
                wanted = (fnmatchcase(str(raw.get(n, "")), p) for n, p in self.where.items())
                if not all(wanted):
                    self.left_out += 1
                    continue
                texts, shown = self._texts(cells), list(rows.images(cells))
                if not texts and not shown:
                    continue
                count += 1
                splits[rows.first(cells, rows.SPLITS)] += 1
                split_column = split_column or rows.spelling(raw, rows.SPLITS)
                index, case = (rows.first(cells, names) for names in (rows.IDS, rows.CASES))
                item = Item(name, seen, index, texts, rows.answer(cells), (), case)
                numbers: list[int] = []
                for one in shown:
                    if isinstance(one, str) and one in by_index and not rows.is_image(one):
                        numbers += by_index[one]  # VLMEvalKit: "the image of row 17"
                    elif isinstance(one, str) and one.isdecimal() and texts:
                        waiting.append((item, one))
                    else:
                        number, fresh = self._resolve(one, file, seen)
                        yield from fresh
                        if number is not None:
                            numbers.append(number)
                item.images = tuple(dict.fromkeys(numbers))
                by_index.setdefault(index, tuple(numbers))
                if texts:
                    self.items.append(item)
        except GMAIError as error:
            if seen == 0 and self.path.is_dir():  # a settings file, a README in JSON
                self.passed_over.append((name, str(error)))
                return
            raise
        for item, index in waiting:
            if index in by_index:
                item.images += by_index[index]
            else:
                self.not_found.append((index, f"{name}: no row has this index"))
        if count:
            self.files[name] = count
            self._look_for_training(name, splits, split_column)
        else:
            there = f"columns: {', '.join(sorted(columns)[:12]) or 'none'}"
            self.passed_over.append((name, f"no column of questions or images is known ({there})"))

    @staticmethod
    def _texts(cells: Mapping[str, Any]) -> tuple[str, ...]:
        bare = rows.questions(cells)
        if not bare:
            return tuple(user_texts(cells))
        choices = rows.options(cells)
        lettered = " ".join(f"{letter}. {text}" for letter, text in choices.items())
        return (*bare, *(f"{text} {lettered}" for text in bare[:1] if choices))

    def _look_for_training(self, name: str, splits: Counter[str], column: str) -> None:
        if re.search(r"train", Path(name).stem, re.IGNORECASE):
            self.notes.append(
                f"{name} looks like the benchmark's training part, which may be trained on. Name the test "
                "files with --only."
            )
        training = [value for value in splits if re.match(r"train", value, re.IGNORECASE)]
        if training or {"freeform", "test_freeform"} <= set(splits):
            others = sorted(value for value in splits if value and value not in training)
            tested = [value for value in others if value.lower().startswith("test")] or others
            pattern = (
                "test*" if len(tested) > 1 and "test_freeform" in tested else "".join(tested[:1])
            )
            condition = shlex.quote(f"{column}={pattern or 'test'}")
            self.notes.append(
                f"{name} holds several parts ({', '.join(sorted(splits))}). Choose the one that is tested on "
                f"with --where, such as --where {condition}."
            )

    def _resolve(
        self, one: str | bytes, file: Path, row: int
    ) -> tuple[int | None, list[ImageSource]]:
        """Return the image's position, and the image if it is a new one."""
        if isinstance(one, bytes):
            return self._number(one, f"{file.name}, row {row}")
        path, problem = self._find(one, file)
        if path is not None:
            return self._number(path, one)
        if one not in self._numbers:
            self._numbers[one] = -1
            self.not_found.append((one, problem))
        return None, []

    def _number(self, source: Path | bytes, name: str) -> tuple[int, list[ImageSource]]:
        key = str(source.absolute()) if isinstance(source, Path) else content_key(source)
        if key in self._numbers:
            return self._numbers[key], []
        number = self._numbers[key] = len(self.images)
        # A name of its own, as ``name (2)``: people decide by names.
        own, copy = name, 1
        while own in self._taken:
            copy += 1
            own = f"{name} ({copy})"
        self._taken.add(own)
        self.images.append(
            NamedImage(own, source) if isinstance(source, Path) else NamedImage(own, None, key)
        )
        return number, [ImageSource(number, source)]

    def _find(self, name: str, file: Path) -> tuple[Path | None, str]:
        for root in (self.image_root, self.folder, file.parent):
            if root is not None and (root / name).is_file():
                return root / name, ""
        tail = posixpath.normpath(name.replace("\\", "/")).lstrip("./")
        found = self._files_by_name.get(posixpath.basename(tail), [])
        longest = [one for one in found if one.endswith("/" + tail)] or found
        if len(longest) == 1:
            return Path(longest[0]), ""
        return None, f"{len(longest)} files have this name" if longest else "no such file"

    @cached_property
    def _files_by_name(self) -> dict[str, list[str]]:
        below = defaultdict(list)
        for root in dict.fromkeys(filter(None, (self.image_root, self.folder))):
            for path in root.rglob("*"):
                if rows.is_image(path.name):
                    below[path.name].append(path.as_posix())
        return dict(below)

    def _image_files(self) -> Iterator[ImageSource]:
        """Yield all image files if no question names one; otherwise count the others."""
        named = {one.path.resolve() for one in self.images if one.path is not None}
        paths = sorted(Path(one) for some in self._files_by_name.values() for one in some)
        if self.images or self.not_found:
            self.unnamed = sum(path.resolve() not in named for path in paths)
            return
        for path in paths:
            yield from self._number(path, path.relative_to(self.path).as_posix())[1]
