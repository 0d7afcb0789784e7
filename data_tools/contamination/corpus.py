"""A training corpus to be compared: a corpus folder of ours, a mixture file, or records in LLaVA form."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from data_tools.contamination.records import CONVERSATIONS, Conversation, conversation, rows
from gmai_xtuner.core.errors import CorpusError

_COLUMNS = ("id", "question_id", "image", "images", "conversations", "messages")
_AUTHORS = {"image_dir": "image_root"}


@dataclass(frozen=True, slots=True)
class Left:
    """What an exclude list of the mixture leaves out already."""

    ids: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Dataset:
    """One dataset: its name in the mixture, its ``files``, the folder of its images, what is left out."""

    name: str
    files: tuple[Path, ...]
    image_root: Path | None
    left: Left = Left()


@dataclass(slots=True)
class Corpus:
    """What is compared.

    Args:
        path: as it was given.
        kind: what it was taken for, for people.
        datasets: in their order.
        groups: image name -> patient, case, video or slide, of a corpus folder of ours.
        no_conversation: records that hold no conversation.
        passed_over: files that weren't read, with the reason.
    """

    path: Path
    kind: str
    datasets: list[Dataset]
    groups: dict[str, str] = field(default_factory=dict)
    no_conversation: int = 0
    passed_over: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_mixture(self) -> bool:
        return self.kind != "records"

    def conversations(self) -> Iterator[tuple[int, Conversation]]:
        """Number of the dataset and conversation; what isn't one is counted.

        Raises:
            SourceError: a file can't be read.
        """
        for number, dataset in enumerate(self.datasets):
            for file in dataset.files:
                for row in rows(file, columns=_COLUMNS):
                    found = conversation(row, file)
                    if found is None:
                        self.no_conversation += 1
                    else:
                        yield number, found


def open_corpus(path: Path, *, image_root: Path | None = None) -> Corpus:
    """Find out what a path holds.

    Args:
        path: folder or file.
        image_root: folder that image names are relative to, for records without a mixture; default: the
            folder, or the file's.

    Raises:
        CorpusError: nothing there that could be read.
    """
    if not path.exists():
        raise CorpusError(
            f"{path} does not exist. Name a corpus folder, a mixture file or records."
        )
    if image_root is not None and not image_root.is_dir():
        raise CorpusError(f"--image-root {image_root} is not a folder.")
    if path.is_dir() and (path / "mixture.yaml").is_file():
        corpus = Corpus(path, "corpus folder", _mixture(path / "mixture.yaml", ()))
        if (path / "records.jsonl").is_file():
            corpus.groups = _groups(path / "records.jsonl")
    elif path.is_dir():
        corpus = _folder(path, image_root or path)
    elif path.suffix.lower() in (".yaml", ".yml") or _is_object(path):
        corpus = Corpus(path, "mixture", _mixture(path, ()))
    elif path.suffix.lower() in CONVERSATIONS:
        root = image_root or path.parent
        corpus = Corpus(path, "records", [Dataset(path.stem, (path,), root)])
    else:
        raise CorpusError(
            f"{path}: a corpus is a folder, a mixture file (.yaml, .json) or records "
            f"({', '.join(CONVERSATIONS)})."
        )
    if not corpus.datasets:
        raise CorpusError(f"{path} holds no file of conversations ({', '.join(CONVERSATIONS)}).")
    return corpus


def _is_object(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _folder(folder: Path, image_root: Path) -> Corpus:
    """Every file with conversations below a folder; others are named, not mistaken for an empty corpus."""
    corpus = Corpus(folder, "records", [])
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in CONVERSATIONS):
        name = file.relative_to(folder).as_posix()
        first = next(iter(rows(file, columns=_COLUMNS)), None)
        if first is None or conversation(first, file) is None:
            corpus.passed_over.append((name, "its first record is no conversation"))
        else:
            corpus.datasets.append(Dataset(name, (file,), image_root))
    return corpus


def _groups(path: Path) -> dict[str, str]:
    """Image -> its ``provenance.group``."""
    found = {}
    for row in rows(path):
        image, provenance = row.cells.get("image"), row.cells.get("provenance")
        if isinstance(image, str) and isinstance(provenance, Mapping) and provenance.get("group"):
            found[posixpath.normpath(image)] = str(provenance["group"])
    return found


# --- mixtures: as gmai_xtuner/core/mixture.py reads them, which checks them all ---------------


def _mixture(path: Path, variants: tuple[Path, ...]) -> list[Dataset]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig").replace("\t", " "))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorpusError(f"mixture file {path} can't be read ({error}).") from error
    if not isinstance(content, dict):
        raise CorpusError(f"mixture file {path}: a mapping of datasets was expected.")
    datasets: list[Dataset] = []
    if isinstance(content.get("base"), str):
        base = _locate(path, content["base"])
        if base.resolve() in (*variants, path.resolve()):
            raise CorpusError(f"mixture file {path}: base {base} is based on this file itself.")
        without = _texts(content.get("without", []), path, "without")
        datasets = [
            one
            for one in _mixture(base, (*variants, path.resolve()))
            if not any(fnmatchcase(one.name, pattern) for pattern in without)
        ]
    ours = "datasets" in content or bool(datasets)
    defaults = content.get("defaults") or {} if ours else {}
    own = content.get("datasets") or {} if ours else content
    common = [_locate(path, name) for name in _texts(content.get("exclude", []), path, "exclude")]
    for name, fields in own.items():
        if not isinstance(fields, dict) or "annotations" not in fields:
            raise CorpusError(f"mixture file {path}: dataset {name!r} has no annotations.")
        fields = {_AUTHORS.get(key, key): value for key, value in {**defaults, **fields}.items()}
        files = [_locate(path, one) for one in _texts(fields["annotations"], path, "annotations")]
        root = fields.get("image_root")
        if root is not None:
            root = files[0].parent if root == "" else _locate(path, str(root))
        lists = [_locate(path, one) for one in _texts(fields.get("exclude", []), path, "exclude")]
        datasets.append(Dataset(str(name), tuple(files), root, _left(lists, str(name))))
    return [
        Dataset(one.name, one.files, one.image_root, _joined(one.left, _left(common, one.name)))
        for one in datasets
    ]


def _texts(value: Any, path: Path, key: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise CorpusError(f"mixture file {path}: {key} must be a text or a list, got {value!r}.")
    return values


def _locate(mixture: Path, value: str) -> Path:
    for candidate in (mixture.parent / value, Path.cwd() / value):
        if candidate.exists():
            return candidate
    raise CorpusError(
        f"mixture file {mixture}: {value!r} does not exist. Paths are relative to the mixture file or to "
        "the working directory."
    )


def _left(lists: list[Path], dataset: str) -> Left:
    ids: set[str] = set()
    images: set[str] = set()
    for path in lists:
        for kind, value, owner in read_list(path):
            if owner in (None, dataset):
                (ids if kind == "id" else images).add(value)
    return Left(frozenset(ids), frozenset(images))


def _joined(one: Left, other: Left) -> Left:
    return Left(one.ids | other.ids, one.images | other.images)


def read_list(path: Path) -> list[tuple[str, str, str | None]]:
    """Kind, value and dataset of each line of an exclude list (see gmai_xtuner/core/exclusion.py).

    Raises:
        CorpusError: it can't be read, or a line is no line of such a list.
    """
    found = []
    dataset: str | None = None
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"the exclude list {path} can't be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        kind, colon, value = line.strip().partition(":")
        value = value.strip()
        if not value:  # refused by training as well
            colon = ""
        try:
            value = json.loads(value) if value.startswith('"') else value
        except ValueError:
            colon = ""
        if not colon or kind not in ("id", "image", "dataset"):
            raise CorpusError(
                f"{path}, line {number}: expected 'id: ...', 'image: ...' or 'dataset: ...', got {line!r}."
            )
        if kind == "dataset":
            dataset = None if value == "*" else value
        else:
            found.append((kind, posixpath.normpath(value) if kind == "image" else value, dataset))
    return found
