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

from data_tools.contamination.asking import Questions
from data_tools.contamination.benchmark import RECOGNISED, Benchmark
from data_tools.contamination.corpus import Corpus
from data_tools.contamination.hashing import HashCache, Hashed, Picture
from data_tools.contamination.looking import Hashes, Looks, by_case, case_of, compare
from data_tools.executor import open_executor
from data_tools.progress import Bar
from gmai_xtuner.core.errors import CorpusError


@dataclass(frozen=True, slots=True)
class CorpusImage:
    """A picture of the corpus: dataset, name in the records, file, whether a list leaves it out already."""

    dataset: str
    name: str
    path: Path | None
    left: bool


@dataclass(slots=True)
class Overlap:
    """What two sides have in common.

    Args:
        corpus, benchmark: the sides, read.
        corpus_images: of all datasets, a file that two of them name twice; ``distinct_images``: once.
        conversations: of the corpus; ``left`` of them are left out by the mixture's lists already.
        inside: pictures inside of the corpus' records, which weren't compared.
        corpus_states, benchmark_states: pictures by what could be read.
        looks: of the pictures.
        same_case: pictures of the benchmark -> pictures of the corpus that bear the name of the same case.
        questions: of the benchmark, with what asks them.
        images: the corpus' pictures that occur above, by number.
        problems: pictures that can't be read: side, name, why.
        seconds: of the whole.
    """

    corpus: Corpus
    benchmark: Benchmark
    distance: int
    threshold: float
    looks: Looks
    questions: Questions
    conversations: int = 0
    left: int = 0
    inside: int = 0
    corpus_images: int = 0
    distinct_images: int = 0
    corpus_states: dict[str, int] = field(default_factory=dict)
    benchmark_states: dict[str, int] = field(default_factory=dict)
    same_case: dict[int, list[int]] = field(default_factory=dict)
    images: dict[int, CorpusImage] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0


_PROBLEMS = 10_000
_OF_A_CASE = (
    100  # pictures of the corpus that are named for one of the benchmark; a volume has many slices
)


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
        distance: bits, up to which pictures look the same.
        threshold: Jaccard index, from which questions are near.
        workers: processes that decode; default: all cores.
        progress: takes the stages.

    Raises:
        CorpusError: nothing of the benchmark is recognised, or a file can't be read.
    """
    begun = time.monotonic()
    problems: list[tuple[str, str, str]] = []
    with open_executor("processes", workers) as engine, _names() as names:
        progress.stage("benchmark")
        theirs: dict[int, Hashed] = {}
        for number, hashed in cache.hashes(benchmark.pictures(), engine):
            theirs[number] = hashed
            progress.advance()
        if not benchmark.shown and not benchmark.items:
            raise CorpusError(_nothing(benchmark))
        side = Hashes.of([theirs[number] for number in range(len(benchmark.shown))])
        problems += [
            ("benchmark", shown.name, theirs[number].problem)
            for number, shown in enumerate(benchmark.shown)
            if theirs[number].problem
        ]
        problems += [("benchmark", name, problem) for name, problem in benchmark.not_found]
        del theirs
        questions = Questions(benchmark.items, threshold=threshold)
        result = Overlap(
            corpus, benchmark, distance, threshold, Looks.none(len(side.state)), questions
        )
        cases = by_case([shown.name for shown in benchmark.shown], _cases(benchmark))

        progress.stage("records")
        _read_names(result, names, progress)
        result.corpus_images = names.count()
        result.distinct_images = names.count_distinct(corpus)

        progress.stage("pictures", total=result.corpus_images)
        ours = Hashes(result.corpus_images)
        for number, hashed in cache.hashes(names.pictures(corpus), engine):
            ours.put(number, hashed)
            progress.advance()
            if hashed.problem and len(problems) < _PROBLEMS:
                problems.append(("corpus", names.image(number, corpus).name, hashed.problem))
        result.corpus_states, result.benchmark_states = ours.counts(), side.counts()
        result.looks = compare(side, ours, distance=distance)
        result.same_case = names.same_case(corpus, cases)

        progress.stage("questions", total=result.conversations)
        _read_questions(result, names, progress)
        wanted = {image for images in result.looks.exact.values() for image in images}
        wanted |= {near.image for near in result.looks.near}
        wanted |= {image for images in result.same_case.values() for image in images}
        result.images = {number: names.image(number, corpus) for number in sorted(wanted)}
    result.problems = sorted(problems)
    result.seconds = time.monotonic() - begun
    return result


def _nothing(benchmark: Benchmark) -> str:
    told = "; ".join(f"{name}: {why}" for name, why in benchmark.passed_over[:5])
    left = f" {benchmark.left_out} rows don't fit --where." if benchmark.left_out else ""
    return (
        f"nothing of {benchmark.path} was recognised, so nothing was compared.{left} "
        f"{'Passed over: ' + told + '. ' if told else ''}{RECOGNISED}."
    )


def _cases(benchmark: Benchmark) -> list[str]:
    """The case of each picture, from the question that shows it."""
    cases = [""] * len(benchmark.shown)
    for item in benchmark.items:
        for number in item.images:
            cases[number] = cases[number] or item.case
    return cases


def _read_names(result: Overlap, names: _Names, progress: Bar) -> None:
    corpus = result.corpus
    for dataset, found in corpus.conversations():
        left = corpus.datasets[dataset].left
        result.conversations += 1
        result.inside += found.inside
        result.left += found.id in left.ids or not left.images.isdisjoint(found.images)
        for name in found.images:
            names.add(dataset, name, left=name in left.images)
        progress.advance()


def _read_questions(result: Overlap, names: _Names, progress: Bar) -> None:
    """Once more through the records, now that it is known which pictures are the benchmark's."""
    shown: defaultdict[int, set[int]] = defaultdict(set)
    for number, images in result.looks.exact.items():
        for image in images:
            shown[image].add(number)
    for near in result.looks.near:
        shown[near.image].add(near.shown)
    hit = {names.key(image): frozenset(numbers) for image, numbers in shown.items()}
    corpus, counted = result.corpus, result.corpus.no_conversation
    for dataset, found in corpus.conversations():
        progress.advance()
        pictures: frozenset[int] = frozenset()
        for name in found.images if hit else ():
            pictures |= hit.get((dataset, name), frozenset())
        result.questions.look_at(dataset, corpus.datasets[dataset].name, found, pictures)
    corpus.no_conversation = counted


# --- names of the corpus' pictures, on disk: there may be millions --------------------------------


class _Names:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute(
            "CREATE TABLE images (number INTEGER PRIMARY KEY, dataset INTEGER, name TEXT, left INTEGER, "
            "UNIQUE (dataset, name))"
        )
        self._last = ("", -1)

    def add(self, dataset: int, name: str, *, left: bool) -> None:
        if self._last != (name, dataset):  # conversations about one picture stand together
            self._connection.execute(
                "INSERT OR IGNORE INTO images (dataset, name, left) VALUES (?, ?, ?)",
                (dataset, name, left),
            )
            self._last = (name, dataset)

    def count(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM images").fetchone()[0])

    def count_distinct(self, corpus: Corpus) -> int:
        """Files, by their paths: datasets with one folder of images may name the same ones."""
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

    def pictures(self, corpus: Corpus) -> Iterator[Picture]:
        for number, dataset, name in self._rows():
            root = corpus.datasets[dataset].image_root
            yield Picture(number, path=(root or Path()) / name)

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
        dataset, name, left = self._connection.execute(
            "SELECT dataset, name, left FROM images WHERE number = ?", (number + 1,)
        ).fetchone()
        owner = corpus.datasets[dataset]
        root = owner.image_root
        return CorpusImage(owner.name, name, None if root is None else root / name, bool(left))

    def same_case(self, corpus: Corpus, cases: dict[str, list[int]]) -> dict[int, list[int]]:
        """Pictures of the benchmark -> pictures of the corpus with a case of the same name."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        if not cases:
            return {}
        for number, _, name in self._rows():
            group = corpus.groups.get(name, "")
            for key in dict.fromkeys((case_of(name), case_of(group))):
                for shown in cases.get(key, ()) if key else ():
                    if found[shown][-1:] != [number] and len(found[shown]) < _OF_A_CASE:
                        found[shown].append(number)
        return {shown: images for shown, images in found.items() if images}


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
