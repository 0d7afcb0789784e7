# SPDX-License-Identifier: Apache-2.0

"""Compare a corpus with a benchmark: read both, hash, search, and collect the overlap."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.contamination.benchmark import RECOGNISED, Benchmark
from data_tools.contamination.corpus import Corpus
from data_tools.contamination.hashing import HashCache, Hashed, ImageSource
from data_tools.contamination.images import Hashes, Matches, by_case, case_of, compare
from data_tools.contamination.questions import Questions
from data_tools.executor import open_executor
from data_tools.progress import Bar
from gmai_xtuner.core.errors import CorpusError

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

    Args:
        corpus, benchmark: the sides, read.
        distance, threshold: of `run`.
        matches: of the images.
        questions: of the benchmark, with what asks them.
        conversations: of the corpus; ``excluded`` of them are left out by the mixture's lists already.
        corpus_images: of all datasets, a file that two of them name twice; ``distinct_images``: once.
        corpus_states, benchmark_states: images by what could be read.
        same_case: images of the benchmark -> images of the corpus that bear the name of the same case.
        images: the corpus' images that occur above, by number.
        problems: images that can't be read: side, name, why.
        seconds: of the whole.
    """

    corpus: Corpus
    benchmark: Benchmark
    distance: int
    threshold: float
    matches: Matches
    questions: Questions
    conversations: int = 0
    excluded: int = 0
    corpus_images: int = 0
    distinct_images: int = 0
    corpus_states: dict[str, int] = field(default_factory=dict)
    benchmark_states: dict[str, int] = field(default_factory=dict)
    same_case: dict[int, list[int]] = field(default_factory=dict)
    images: dict[int, CorpusImage] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0


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
    """Compare a corpus with a benchmark.

    Args:
        corpus: see `open_corpus`.
        benchmark: not yet read.
        cache: of hashes.
        distance: bits, up to which images look the same.
        threshold: Jaccard index, from which questions are near.
        workers: processes that decode; default: all cores.
        progress: takes the stages.

    Raises:
        GMAIError: nothing of the benchmark is recognised, training refuses the whole corpus, or a file
            can't be read.
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
        theirs = Hashes.of([hashed[number] for number in range(len(benchmark.images))])
        result = Overlap(
            corpus,
            benchmark,
            distance,
            threshold,
            Matches.none(len(theirs.state)),
            Questions(benchmark.items, threshold=threshold),
            benchmark_states=theirs.counts(),
            problems=_problems(benchmark, hashed),
        )
        del hashed

        progress.stage("records")
        names = _Names(corpus)
        _read_names(result, names, progress)
        if not result.conversations and corpus.refused:
            raise CorpusError(
                f"training refuses every record of {corpus.path} ({corpus.reasons()}), so nothing was "
                "compared. Correct them first."
            )

        progress.stage("images", total=result.corpus_images)
        ours = Hashes(result.corpus_images)
        for number, one in cache.hashes(names.sources(), executor):
            ours.put(number, one)
            progress.advance()
            if one.problem and len(result.problems) < _PROBLEMS:
                name = names.image(number).name
                result.problems.append(("corpus", name, one.problem))
        result.corpus_states = ours.counts()
        result.matches = compare(theirs, ours, distance=distance)
        cases = by_case([image.name for image in benchmark.images], _cases(benchmark))
        result.same_case = names.same_case(cases)

        progress.stage("questions", total=result.conversations)
        _read_questions(result, names, progress)
        wanted = {near.ours for near in result.matches.near}
        for found in (result.matches.exact, result.same_case):
            wanted.update(image for images in found.values() for image in images)
        result.images = {number: names.image(number) for number in sorted(wanted)}
    result.problems.sort()
    result.seconds = time.monotonic() - begun
    return result


def _problems(benchmark: Benchmark, hashed: dict[int, Hashed]) -> list[tuple[str, str, str]]:
    found = [
        ("benchmark", image.name, hashed[number].problem)
        for number, image in enumerate(benchmark.images)
        if hashed[number].problem
    ]
    return found + [("benchmark", name, problem) for name, problem in benchmark.not_found]


def _nothing(benchmark: Benchmark) -> str:
    others = "; ".join(f"{name}: {why}" for name, why in benchmark.passed_over[:5])
    left = f" {benchmark.left_out} rows don't fit --where." if benchmark.left_out else ""
    return (
        f"nothing of {benchmark.path} was recognised, so nothing was compared.{left} "
        f"{'Passed over: ' + others + '. ' if others else ''}{RECOGNISED}."
    )


def _cases(benchmark: Benchmark) -> list[str]:
    """Return the case of each image, from the question that shows it."""
    cases = [""] * len(benchmark.images)
    for item in benchmark.items:
        for number in item.images:
            cases[number] = cases[number] or item.case
    return cases


def _read_names(result: Overlap, names: _Names, progress: Bar) -> None:
    corpus = result.corpus
    for dataset, found in corpus.conversations():
        left = corpus.datasets[dataset].excluded
        result.conversations += 1
        result.excluded += found.id in left.ids or not left.images.isdisjoint(found.images)
        for name in found.images:
            names.add(dataset, name)
        progress.advance()
    result.corpus_images, result.distinct_images = len(names), names.count_distinct()


def _read_questions(result: Overlap, names: _Names, progress: Bar) -> None:
    """Once more through the records, now that it is known which images are the benchmark's."""
    theirs: defaultdict[tuple[int, str], set[int]] = defaultdict(set)
    for number, images in result.matches.exact.items():
        for image in images:
            theirs[names.key(image)].add(number)
    for near in result.matches.near:
        theirs[names.key(near.ours)].add(near.theirs)
    for dataset, found in result.corpus.conversations():
        progress.advance()
        shown = [theirs[dataset, name] for name in found.images if (dataset, name) in theirs]
        name = result.corpus.datasets[dataset].name
        result.questions.look_at(dataset, name, found, frozenset().union(*shown))


class _Names:
    """Names of the corpus' images, some 200 bytes each, numbered as they come."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._numbers: dict[tuple[int, str], int] = {}
        self._keys: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, dataset: int, name: str) -> None:
        key = (dataset, name)
        if self._numbers.setdefault(key, len(self._keys)) == len(self._keys):
            self._keys.append(key)

    def key(self, number: int) -> tuple[int, str]:
        """Return the position of the dataset and the name in its records."""
        return self._keys[number]

    def count_distinct(self) -> int:
        """Count files, by their paths: datasets with one folder of images may name the same ones."""
        roots = [(one.image_root or Path()).absolute() for one in self._corpus.datasets]
        if len(set(roots)) == len(roots):
            return len(self)
        first = [roots.index(root) for root in roots]
        return len({(first[dataset], name) for dataset, name in self._keys})

    def sources(self) -> Iterator[ImageSource]:
        for number, (dataset, name) in enumerate(self._keys):
            root = self._corpus.datasets[dataset].image_root
            yield ImageSource(number, (root or Path()) / name)

    def image(self, number: int) -> CorpusImage:
        dataset, name = self._keys[number]
        owner = self._corpus.datasets[dataset]
        path = None if owner.image_root is None else owner.image_root / name
        return CorpusImage(owner.name, name, path, name in owner.excluded.images)

    def same_case(self, cases: dict[str, list[int]]) -> dict[int, list[int]]:
        """Return images of the benchmark -> images of the corpus with a case of the same name."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        for number, (_, name) in enumerate(self._keys if cases else ()):
            group = self._corpus.groups.get(name, "")
            for key in dict.fromkeys((case_of(name), case_of(group))):
                for image in cases.get(key, ()) if key else ():
                    if found[image][-1:] != [number] and len(found[image]) < _OF_A_CASE:
                        found[image].append(number)
        return dict(found)
