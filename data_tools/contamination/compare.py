"""The whole comparison: read both sides, hash, search, and say what is in both."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
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
        GMAIError: nothing of the benchmark is recognised, or a file can't be read.
    """
    begun = time.monotonic()
    with open_executor("processes", workers) as executor, _names() as names:
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
        _read_names(result, names, progress)

        progress.stage("images", total=result.corpus_images)
        ours = Hashes(result.corpus_images)
        for number, one in cache.hashes(names.sources(corpus), executor):
            ours.put(number, one)
            progress.advance()
            if one.problem and len(result.problems) < _PROBLEMS:
                name = names.image(number, corpus).name
                result.problems.append(("corpus", name, one.problem))
        result.corpus_states = ours.counts()
        result.matches = compare(theirs, ours, distance=distance)
        cases = by_case([image.name for image in benchmark.images], _cases(benchmark))
        result.same_case = names.same_case(corpus, cases)

        progress.stage("questions", total=result.conversations)
        _read_questions(result, names, progress)
        wanted = {near.ours for near in result.matches.near}
        for found in (result.matches.exact, result.same_case):
            wanted.update(image for images in found.values() for image in images)
        result.images = {number: names.image(number, corpus) for number in sorted(wanted)}
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
    """The case of each image, from the question that shows it."""
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
            names.add(dataset, name, is_excluded=name in left.images)
        progress.advance()
    result.corpus_images, result.distinct_images = names.count(), names.count_distinct(corpus)


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


# --- names of the corpus' images, on disk: there may be millions ----------------------------------


class _Names:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute(
            "CREATE TABLE images (number INTEGER PRIMARY KEY, dataset INTEGER, name TEXT, excluded INTEGER, "
            "UNIQUE (dataset, name))"
        )
        self._last = ("", -1)

    def add(self, dataset: int, name: str, *, is_excluded: bool) -> None:
        if self._last != (name, dataset):  # conversations about one image stand together
            self._connection.execute(
                "INSERT OR IGNORE INTO images (dataset, name, excluded) VALUES (?, ?, ?)",
                (dataset, name, is_excluded),
            )
            self._last = (name, dataset)

    def count(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM images").fetchone()[0])

    def count_distinct(self, corpus: Corpus) -> int:
        """Count files, by their paths: datasets with one folder of images may name the same ones."""
        roots: defaultdict[Path, list[int]] = defaultdict(list)
        for number, dataset in enumerate(corpus.datasets):
            roots[(dataset.image_root or Path()).absolute()].append(number)
        return sum(
            int(
                self._connection.execute(
                    "SELECT COUNT(DISTINCT name) FROM images WHERE dataset IN "
                    "(SELECT value FROM json_each(?))",
                    (json.dumps(numbers),),
                ).fetchone()[0]
            )
            for numbers in roots.values()
        )

    def sources(self, corpus: Corpus) -> Iterator[ImageSource]:
        for number, dataset, name in self._rows():
            root = corpus.datasets[dataset].image_root
            yield ImageSource(number, (root or Path()) / name)

    def _rows(self) -> Iterator[tuple[int, int, str]]:
        for number, dataset, name in self._connection.execute(
            "SELECT number, dataset, name FROM images ORDER BY number"
        ):
            yield number - 1, dataset, name

    def key(self, number: int) -> tuple[int, str]:
        found: tuple[int, str] = self._connection.execute(
            "SELECT dataset, name FROM images WHERE number = ?", (number + 1,)
        ).fetchone()
        return found

    def image(self, number: int, corpus: Corpus) -> CorpusImage:
        dataset, name, excluded = self._connection.execute(
            "SELECT dataset, name, excluded FROM images WHERE number = ?", (number + 1,)
        ).fetchone()
        owner = corpus.datasets[dataset]
        root = owner.image_root
        return CorpusImage(owner.name, name, None if root is None else root / name, bool(excluded))

    def same_case(self, corpus: Corpus, cases: dict[str, list[int]]) -> dict[int, list[int]]:
        """Return images of the benchmark -> images of the corpus with a case of the same name."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        if not cases:
            return {}
        for number, _, name in self._rows():
            group = corpus.groups.get(name, "")
            for key in dict.fromkeys((case_of(name), case_of(group))):
                for image in cases.get(key, ()) if key else ():
                    if found[image][-1:] != [number] and len(found[image]) < _OF_A_CASE:
                        found[image].append(number)
        return {image: images for image, images in found.items() if images}


@contextmanager
def _names() -> Iterator[_Names]:
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        connection = sqlite3.connect(Path(folder) / "names.sqlite")
        connection.execute("PRAGMA journal_mode = OFF")  # it is thrown away
        connection.execute("PRAGMA synchronous = OFF")
        try:
            yield _Names(connection)
        finally:
            connection.close()
