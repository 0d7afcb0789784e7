# SPDX-License-Identifier: Apache-2.0

"""A training corpus to be compared: a corpus folder of ours, a mixture file, or files of records.

Records, mixtures and exclude lists are read as training reads them; what training refuses is counted.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.contamination.rows import is_json_object
from gmai_xtuner.core.conversation import Conversation, parse_raw
from gmai_xtuner.core.errors import CorpusError, DataError
from gmai_xtuner.core.exclusion import Exclusion, read_exclusions
from gmai_xtuner.core.mixture import load_mixture
from gmai_xtuner.core.records import SUFFIXES, iter_raw

_BROKEN = ("not_json", "not_utf8")
"""Reasons for which a file is damaged, not a record of another kind."""

_NO_CONVERSATIONS = ("bad_annotation_file", "not_an_object", "empty_conversation")
"""Reasons for which a file's first record shows that it holds something else than conversations."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One dataset: its name in the mixture, its files, the folder of its images, what is left out."""

    name: str
    files: tuple[Path, ...]
    image_root: Path | None
    excluded: Exclusion = field(default_factory=Exclusion)
    images_first: bool = False


@dataclass(slots=True)
class Corpus:
    """A corpus that is found, not yet read.

    Args:
        path: as it was given.
        kind: what it was taken for, for people.
        datasets: in their order.
        groups: image name -> patient, case, video or slide, of a corpus folder of ours.
        refused: reason -> number of records that training refuses, once all are read.
        passed_over: files that weren't read, with the reason.
    """

    path: Path
    kind: str
    datasets: list[Dataset]
    groups: dict[str, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    passed_over: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_mixture(self) -> bool:
        return self.kind != "records"

    def reasons(self) -> str:
        """Return the reasons for which records were refused, with their numbers."""
        return ", ".join(f"{reason} {number:,}" for reason, number in sorted(self.refused.items()))

    def conversations(self) -> Iterator[tuple[int, Conversation]]:
        """Yield position of the dataset and conversation; records that training refuses are counted.

        Raises:
            DataError: a file can't be read.
        """
        self.refused.clear()
        for number, dataset in enumerate(self.datasets):
            for file in dataset.files:
                for raw in iter_raw(file, dataset=dataset.name):
                    try:
                        found = parse_raw(
                            raw,
                            dataset=dataset.name,
                            image_root=dataset.image_root,
                            images_first=dataset.images_first,
                        )
                    except DataError as error:
                        if error.reason in _BROKEN:
                            raise
                        self.refused[error.reason] += 1
                    else:
                        yield number, found


def open_corpus(path: Path, *, image_root: Path | None = None) -> Corpus:
    """Find out what a path holds.

    Args:
        path: folder or file.
        image_root: folder that image names are relative to, for records without a mixture; default: the
            folder, or the file's.

    Raises:
        GMAIError: nothing there that could be read.
    """
    if not path.exists():
        raise CorpusError(
            f"{path} does not exist. Name a corpus folder, a mixture file or records."
        )
    if image_root is not None and not image_root.is_dir():
        raise CorpusError(f"--image-root {image_root} is not a folder.")
    suffix = path.suffix.lower()
    if path.is_dir() and (path / "mixture.yaml").is_file():
        corpus = Corpus(path, "corpus folder", _mixture(path / "mixture.yaml"))
        if (path / "records.jsonl").is_file():
            corpus.groups = _groups(path / "records.jsonl")
    elif path.is_dir():
        corpus = _folder(path, image_root or path)
    elif suffix in (".yaml", ".yml") or (suffix == ".json" and is_json_object(path)):
        corpus = Corpus(path, "mixture", _mixture(path))
    elif suffix in SUFFIXES:
        root = image_root or path.parent
        corpus = Corpus(path, "records", [Dataset(path.stem, (path,), root)])
    else:
        raise CorpusError(
            f"{path}: a corpus is a folder, a mixture file (.yaml, .json) or records "
            f"({', '.join(SUFFIXES)})."
        )
    if not corpus.datasets:
        raise CorpusError(f"{path} holds no file of conversations ({', '.join(SUFFIXES)}).")
    return corpus


def _mixture(path: Path) -> list[Dataset]:
    mixture = load_mixture(path)
    exclusions = read_exclusions(mixture.entries, known=mixture.known)
    return [
        Dataset(entry.name, entry.annotations, entry.image_root, excluded, entry.images_first)
        for entry, excluded in zip(mixture.entries, exclusions.datasets, strict=True)
    ]


def _folder(folder: Path, image_root: Path) -> Corpus:
    """Every file with conversations below a folder; others are named, not mistaken for an empty corpus."""
    corpus = Corpus(folder, "records", [])
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = file.relative_to(folder).as_posix()
        try:
            parse_raw(next(iter_raw(file)), dataset=name)
        except DataError as error:
            if error.reason in _BROKEN:
                raise
            if error.reason in _NO_CONVERSATIONS:
                corpus.passed_over.append((name, error.problem))
                continue
        corpus.datasets.append(Dataset(name, (file,), image_root))
    return corpus


def _groups(path: Path) -> dict[str, str]:
    """Image -> its ``provenance.group``."""
    found = {}
    for raw in iter_raw(path):
        record = raw.decode()
        if not isinstance(record, Mapping):
            continue
        image, provenance = record.get("image"), record.get("provenance")
        if isinstance(image, str) and isinstance(provenance, Mapping) and provenance.get("group"):
            found[posixpath.normpath(image)] = str(provenance["group"])
    return found
