# SPDX-License-Identifier: Apache-2.0

"""Compare a corpus with a benchmark: read both, hash, search, and collect the overlap.

A corpus is a corpus folder of ours, a mixture file, or files of records. Records, mixtures and exclude lists
are read as training reads them; what training refuses is counted.
"""

from __future__ import annotations

import posixpath
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.command import Bar
from data_tools.contamination.benchmark import RECOGNISED, Benchmark
from data_tools.contamination.hashing import (
    HashCache,
    Hashes,
    ImageSource,
    Matches,
    case_of,
    compare,
    names_case,
)
from data_tools.contamination.questions import Questions
from data_tools.contamination.rows import is_json_object
from data_tools.executor import open_executor
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
    """A corpus that is found, not yet read; ``kind`` says, for people, what ``path`` was taken for.

    ``groups``, of a corpus folder of ours: image name -> patient, case, video or slide. ``refused``: reason
    -> records that training refuses, once all are read; ``passed_over``: files that weren't read, with the
    reason.
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

    def conversations(self) -> Iterator[tuple[int, Conversation]]:
        """Yield position of the dataset and conversation; records that training refuses are counted.

        A `DataError` if a file can't be read.
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
    """Find out what a folder or file holds; a ``GMAIError`` if nothing could be read.

    ``image_root`` is what image names are relative to for records without a mixture; default: their folder.
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
    for record in (raw.decode() for raw in iter_raw(path)):
        match record:
            case {"image": str(image), "provenance": {"group": group}} if group:
                found[posixpath.normpath(image)] = str(group)
    return found


_PROBLEMS = 10_000
_OF_A_CASE = 100
"""Images of the corpus that are named for one of the benchmark; a volume has many slices."""


@dataclass(frozen=True, slots=True)
class CorpusImage:
    """An image of the corpus: dataset, name in the records, file, whether a list leaves it out already."""

    dataset: str
    name: str
    path: Path | None
    is_excluded: bool


@dataclass(slots=True)
class Overlap:
    """All that two sides have in common.

    States count images by what could be read, ``problems`` name those that can't be: side, name, why.
    ``excluded`` of the conversations are left out by the mixture's lists already. ``names`` are the corpus'
    images: position of the dataset, name in its records. ``same_case``: images of the benchmark -> those of
    the corpus of one case.
    """

    corpus: Corpus
    benchmark: Benchmark
    distance: int
    threshold: float
    questions: Questions
    benchmark_states: dict[str, int]
    problems: list[tuple[str, str, str]]
    conversations: int = 0
    excluded: int = 0
    names: list[tuple[int, str]] = field(default_factory=list)
    corpus_states: dict[str, int] = field(default_factory=dict)
    matches: Matches = field(default_factory=lambda: Matches.none(0))
    same_case: dict[int, list[int]] = field(default_factory=dict)
    seconds: float = 0.0

    def image(self, number: int) -> CorpusImage:
        """Return an image of the corpus."""
        dataset, name = self.names[number]
        owner = self.corpus.datasets[dataset]
        path = None if owner.image_root is None else owner.image_root / name
        return CorpusImage(owner.name, name, path, name in owner.excluded.images)

    def distinct_images(self) -> int:
        """Count files, by their paths: datasets with one folder of images may name the same ones."""
        roots = [(one.image_root or Path()).absolute() for one in self.corpus.datasets]
        first = [roots.index(root) for root in roots]
        return len({(first[dataset], name) for dataset, name in self.names})


def run(
    corpus: Corpus,
    benchmark: Benchmark,
    cache: HashCache,
    *,
    distance: int,
    threshold: float,
    workers: int | None,
    progress: Bar,
) -> Overlap:
    """Compare a corpus with a benchmark that is not yet read.

    Images look the same up to ``distance`` bits, questions are near from ``threshold`` (Jaccard index) on. A
    `GMAIError` if nothing of the benchmark is recognised, training refuses the whole corpus, or a file can't
    be read.
    """
    begun = time.monotonic()
    with open_executor("processes", workers) as executor:
        progress.stage("benchmark")
        hashed = {}
        for number, one in cache.hashes(benchmark.read(), executor):
            hashed[number] = one
            progress.advance()
        if not benchmark.images and not benchmark.items:
            raise CorpusError(_nothing(benchmark))
        theirs = Hashes(len(benchmark.images))
        for number, one in hashed.items():
            theirs.put(number, one)
        problems = [
            ("benchmark", image.name, hashed[number].problem)
            for number, image in enumerate(benchmark.images)
            if hashed[number].problem
        ]
        problems += [("benchmark", name, problem) for name, problem in benchmark.not_found]
        questions = Questions(benchmark.items, threshold=threshold)
        states = theirs.counts()
        result = Overlap(corpus, benchmark, distance, threshold, questions, states, problems)
        del hashed

        progress.stage("records")
        _read_names(result, progress)
        if not result.conversations and corpus.refused:
            why = ", ".join(f"{reason} {n:,}" for reason, n in sorted(corpus.refused.items()))
            raise CorpusError(
                f"training refuses every record of {corpus.path} ({why}), so nothing was "
                "compared. Correct them first."
            )

        progress.stage("images", total=len(result.names))
        ours = Hashes(len(result.names))
        sources = (
            ImageSource(number, (corpus.datasets[dataset].image_root or Path()) / name)
            for number, (dataset, name) in enumerate(result.names)
        )
        for number, one in cache.hashes(sources, executor):
            ours.put(number, one)
            progress.advance()
            if one.problem and len(problems) < _PROBLEMS:
                problems.append(("corpus", result.names[number][1], one.problem))
        result.corpus_states = ours.counts()
        result.matches = compare(theirs, ours, distance=distance)
        result.same_case = _same_case(result)

        progress.stage("questions", total=result.conversations)
        _read_questions(result, progress)
    problems.sort()
    result.seconds = time.monotonic() - begun
    return result


def _nothing(benchmark: Benchmark) -> str:
    others = "; ".join(f"{name}: {why}" for name, why in benchmark.passed_over[:5])
    left = f" {benchmark.left_out} rows don't fit --where." if benchmark.left_out else ""
    return (
        f"nothing of {benchmark.path} was recognised, so nothing was compared.{left} "
        f"{'Passed over: ' + others + '. ' if others else ''}{RECOGNISED}."
    )


def _same_case(result: Overlap) -> dict[int, list[int]]:
    """Return images of the benchmark -> images of the corpus with a case of the same name."""
    benchmark = result.benchmark
    cases = [""] * len(benchmark.images)
    for item in benchmark.items:
        for number in item.images:
            cases[number] = cases[number] or item.case
    known: defaultdict[str, list[int]] = defaultdict(list)  # the case that is named, or the file's
    for number, (image, case) in enumerate(zip(benchmark.images, cases, strict=True)):
        for key in {case.casefold() if names_case(case) else "", case_of(image.name)} - {""}:
            known[key].append(number)
    found: defaultdict[int, list[int]] = defaultdict(list)
    for number, (_, name) in enumerate(result.names if known else ()):
        group = result.corpus.groups.get(name, "")
        for key in dict.fromkeys((case_of(name), case_of(group))):
            for theirs in known.get(key, ()):
                if found[theirs][-1:] != [number] and len(found[theirs]) < _OF_A_CASE:
                    found[theirs].append(number)
    return dict(found)


def _read_names(result: Overlap, progress: Bar) -> None:
    names: dict[tuple[int, str], None] = {}
    for dataset, found in result.corpus.conversations():
        left = result.corpus.datasets[dataset].excluded
        result.conversations += 1
        result.excluded += found.id in left.ids or not left.images.isdisjoint(found.images)
        names.update(dict.fromkeys((dataset, name) for name in found.images))
        progress.advance()
    result.names = list(names)


def _read_questions(result: Overlap, progress: Bar) -> None:
    """Once more through the records, now that it is known which images are the benchmark's."""
    theirs: defaultdict[tuple[int, str], set[int]] = defaultdict(set)
    for number, images in result.matches.exact.items():
        for image in images:
            theirs[result.names[image]].add(number)
    for near in result.matches.near:
        theirs[result.names[near.ours]].add(near.theirs)
    for dataset, found in result.corpus.conversations():
        progress.advance()
        shown = [theirs[dataset, name] for name in found.images if (dataset, name) in theirs]
        name = result.corpus.datasets[dataset].name
        result.questions.look_at(dataset, name, found, frozenset().union(*shown))
