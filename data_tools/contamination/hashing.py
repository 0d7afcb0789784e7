# SPDX-License-Identifier: Apache-2.0

"""Hashes of images, kept in a file for the next run, and images that are or look the same, or of one case.

Both hashes are taken of the pixels that training shows (see `preprocess.images`): 8 bit, upright, deep grey
windowed. Grey that is stored as RGB is grey. A file whose path, size and time of change are those of a file
that was hashed before is not opened again; images inside of tables go by a hash of their bytes.
"""

from __future__ import annotations

import io
import os
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data_tools.executor import Executor
from data_tools.output.splits import perceptual_hash_of
from data_tools.preprocess.images import pixel_hash, read_pixels
from gmai_xtuner.core.errors import CorpusError, Unusable
from gmai_xtuner.core.hamming import Pairs, search

VERSION = 1
"""Goes up with whatever changes a hash; hashes of another version are made anew."""

_IN_A_TASK = 16
_AT_ONCE = 4_096
"""Images that are looked up, hashed and put on disk together: what a kill costs."""

THUMBNAIL = 224

OK, UNREADABLE, MISSING, PLAIN = 1, 2, 3, 4
"""States of an image. ``PLAIN``: one grey level, which looks like every other such image."""


@dataclass(frozen=True, slots=True)
class Hashed:
    """The hashes of an image, or the ``problem`` for which there are none.

    ``pixels`` are 16 bytes that say which pixels these are, ``look`` is the 64-bit perceptual hash.
    """

    state: int
    pixels: bytes = b""
    look: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image to be hashed: its position, and its file or, of one that lies in a table, its bytes."""

    number: int
    source: Path | bytes


def hash_image(source: Path | bytes) -> Hashed:
    """Read and hash one image; a problem with it is part of the result."""
    try:
        pixels = read_pixels(source).pixels
    except Unusable as error:
        return Hashed(UNREADABLE, problem=str(error))
    parts = (pixels[:: max(1, len(pixels) // 8)], pixels)  # all are compared where a few are alike
    if pixels.ndim == 3 and all((part == part[..., :1]).all() for part in parts):
        pixels = np.ascontiguousarray(pixels[..., 0])
    plain = all((part == part[:1, :1]).all() for part in parts)
    digest = bytes.fromhex(pixel_hash(pixels))
    return Hashed(PLAIN if plain else OK, digest, perceptual_hash_of(pixels))


def thumbnail(source: Path | bytes) -> bytes:
    """Return a small JPEG to look at; `Unusable` if it can't be read."""
    image = Image.fromarray(read_pixels(source).pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _task(sources: Sequence[Path | bytes]) -> list[tuple[Hashed, bytes]]:
    """Hash images; of those out of tables make a thumbnail too: the table isn't read again for the report."""
    found = []
    for source in sources:
        hashed = hash_image(source)
        small = isinstance(source, bytes) and hashed.state in (OK, PLAIN)
        found.append((hashed, thumbnail(source) if small else b""))
    return found


class HashCache:
    """An SQLite file of hashes. Made by `open_cache`; a run that is stopped goes on with what is in it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS pictures_{VERSION} (key TEXT PRIMARY KEY, size INTEGER, "
            "changed INTEGER, state INTEGER, pixels BLOB, look INTEGER, problem TEXT, small BLOB) "
            "WITHOUT ROWID"
        )
        self._table = f"pictures_{VERSION}"

    def hashes(
        self, images: Iterable[ImageSource], executor: Executor
    ) -> Iterator[tuple[int, Hashed]]:
        """Yield numbers and hashes of images, which are read as results are taken, in no particular order."""
        images = iter(images)
        while some := list(islice(images, _AT_ONCE)):
            unknown: list[tuple[ImageSource, _Identity]] = []
            for image in some:
                try:
                    identity = _identity(image.source)
                except (OSError, ValueError) as error:
                    problem = getattr(error, "strerror", None) or str(error)
                    yield image.number, Hashed(MISSING, problem=problem)
                    continue
                known = self._connection.execute(
                    f"SELECT state, pixels, look, problem FROM {self._table} "
                    "WHERE key = ? AND size = ? AND changed = ?",
                    identity,
                ).fetchone()
                if known is None:
                    unknown.append((image, identity))
                else:
                    state, pixels, look, problem = known
                    yield image.number, Hashed(state, pixels, look % 2**64, problem)
            yield from self._make(unknown, executor)
            self._connection.commit()

    def _make(
        self, unknown: Sequence[tuple[ImageSource, _Identity]], executor: Executor
    ) -> Iterator[tuple[int, Hashed]]:
        sources = [image.source for image, _ in unknown]
        tasks = [sources[at : at + _IN_A_TASK] for at in range(0, len(sources), _IN_A_TASK)]
        waiting = iter(unknown)
        made = executor.map(_task, tasks, died=lambda _: None)
        crashed = [(Hashed(UNREADABLE, problem="image can't be read: its decoder crashed"), b"")]
        for task, results in made:
            if results is None:  # one of these has killed its worker: which?
                single = (executor.map(_task, [[one]], died=lambda _: crashed) for one in task)
                results = [result for found in single for result in next(found)[1]]
            for (hashed, small), (image, identity) in zip(results, waiting, strict=False):
                # SQLite's integers are signed.
                look = hashed.look - 2**64 if hashed.look >= 2**63 else hashed.look
                row = (*identity, hashed.state, hashed.pixels, look, hashed.problem, small)
                self._connection.execute(
                    f"INSERT OR REPLACE INTO {self._table} VALUES (?,?,?,?,?,?,?,?)", row
                )
                yield image.number, hashed

    def small(self, data_key: str) -> bytes:
        """Return the thumbnail of an image out of a table, by `content_key`; empty if there is none."""
        row = self._connection.execute(
            f"SELECT small FROM {self._table} WHERE key = ?", (data_key,)
        ).fetchone()
        return row[0] if row else b""


_Identity = tuple[str, int, int]
"""Key, size and time of change, by which the cache knows an image."""


def _identity(source: Path | bytes) -> _Identity:
    if isinstance(source, bytes):
        return content_key(source), len(source), 0
    status = os.stat(source)
    return os.path.abspath(source), status.st_size, status.st_mtime_ns


def content_key(data: bytes) -> str:
    """Return the key by which the cache knows an image that lies in a table."""
    return "content:" + blake2b(data, digest_size=16).hexdigest()


@contextmanager
def open_cache(path: Path) -> Iterator[HashCache]:
    """Open a cache, made if need be; several runs may share it. What was hashed before an error stays.

    A `CorpusError` if it can't be opened or used.
    """
    with suppress(OSError):  # SQLite says the same
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            try:
                yield HashCache(connection)
            finally:
                connection.commit()
    except sqlite3.Error as error:
        raise CorpusError(
            f"the cache of hashes {path} can't be used ({error}). Remove it, or name another with --cache."
        ) from error


# --- images of the two sides ------------------------------------------------------------------------

LEVELS = (0, 4, 8, 16)
CLOSEST = 5
"""Near images of the corpus that are listed for an image of the benchmark; all are counted."""

_HELD = 4_000_000  # pairs


class Hashes:
    """Hashes of the images of a side, 25 bytes each."""

    def __init__(self, size: int) -> None:
        self.state = np.zeros(size, dtype=np.uint8)
        self.look = np.zeros(size, dtype=np.uint64)
        self.pixels = np.zeros((size, 2), dtype=np.uint64)

    def put(self, number: int, hashed: Hashed) -> None:
        self.state[number] = hashed.state
        self.look[number] = hashed.look
        if hashed.pixels:
            self.pixels[number] = np.frombuffer(hashed.pixels, dtype=np.uint64)

    def counts(self) -> dict[str, int]:
        names = {"read": OK, "plain": PLAIN, "unreadable": UNREADABLE, "missing": MISSING}
        return {name: int((self.state == state).sum()) for name, state in names.items()}


@dataclass(frozen=True, slots=True)
class Near:
    """An image of the benchmark and one of the corpus that looks like it, ``distance`` bits apart."""

    theirs: int
    ours: int
    distance: int


@dataclass(slots=True)
class Matches:
    """Images of the benchmark that are in the corpus; made by `compare`.

    ``exact`` leads to images of the corpus with the same pixels, ``near`` are the closest of the others. Of
    each image of the benchmark ``nearest`` is the least distance (255: none), ``count`` how many are near it.
    """

    exact: dict[int, list[int]]
    near: list[Near]
    nearest: np.ndarray
    count: np.ndarray

    @classmethod
    def none(cls, size: int) -> Matches:
        """Return the matches of ``size`` images that are like no other."""
        return cls({}, [], np.full(size, 255, dtype=np.uint8), np.zeros(size, dtype=np.int64))

    def within(self, distance: int) -> int:
        """Return how many images of the benchmark have one of the corpus at most so many bits away."""
        return int((self.nearest <= distance).sum())


def compare(benchmark: Hashes, corpus: Hashes, *, distance: int) -> Matches:
    """Find the images that are on both sides, or look the same: at most ``distance`` bits apart.

    Those of one grey level are compared with none.
    """
    ours, theirs = (np.flatnonzero(side.state == OK) for side in (corpus, benchmark))
    of_pixels: defaultdict[bytes, list[int]] = defaultdict(list)
    may_be_same = np.isin(corpus.pixels[ours, 0], benchmark.pixels[theirs, 0])
    for image in ours[may_be_same].tolist():
        of_pixels[corpus.pixels[image].tobytes()].append(image)
    same = {n: of_pixels.get(benchmark.pixels[n].tobytes(), []) for n in theirs.tolist()}
    # Equal hashes are looked for once: a corpus may hold an image a thousand times.
    looks, copies = np.unique(corpus.look[ours], return_counts=True)
    asked = np.unique(benchmark.look[theirs])
    pairs, counts = _closest(search(asked, looks, distance=distance), len(asked), weights=copies)
    having = _by_look(corpus, ours, looks[pairs.value])
    asking = _by_look(benchmark, theirs, asked[pairs.query])
    found = Matches.none(len(benchmark.state))
    found.exact = {number: images for number, images in same.items() if images}
    listed = Counter[int]()
    for query, value, bits in zip(*(part.tolist() for part in pairs), strict=True):
        for number in asking[int(asked[query])]:
            copied = set(same[number])
            found.count[number] = counts[query] - len(copied)
            found.nearest[number] = min(found.nearest[number], bits)
            for image in having[int(looks[value])][: CLOSEST + len(copied)]:
                if image not in copied and listed[number] < CLOSEST:
                    found.near.append(Near(number, image, bits))
                    listed[number] += 1
    found.near.sort(key=lambda one: (one.distance, one.theirs, one.ours))
    return found


def _by_look(side: Hashes, numbers: np.ndarray, wanted: np.ndarray) -> dict[int, list[int]]:
    found: defaultdict[int, list[int]] = defaultdict(list)
    for number in numbers[np.isin(side.look[numbers], wanted)].tolist():
        found[int(side.look[number])].append(number)
    return found


def _closest(
    pairs: Iterator[Pairs], queries: int, *, weights: np.ndarray
) -> tuple[Pairs, np.ndarray]:
    """Return the closest values of each query, sorted, and the number of all, by the values' weights.

    At a large distance images of one kind are all near each other; what is held is bounded.
    """
    counts = np.zeros(queries, dtype=np.int64)
    parts = [Pairs(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.uint8)))]
    held = 0
    for part in pairs:
        np.add.at(counts, part.query, weights[part.value])
        parts.append(part)
        held += len(part.query)
        if held > _HELD:
            parts = [_first_few(parts)]
            held = len(parts[0].query) // 2  # or few queries with many values would sort each time
    return _first_few(parts), counts


def _first_few(parts: Sequence[Pairs]) -> Pairs:
    query, value, distance = map(np.concatenate, zip(*parts, strict=True))
    order = np.lexsort((value, distance, query))
    query = query[order]
    # One more than are listed: the first may be the same pixels.
    kept = np.arange(len(query)) - np.searchsorted(query, query) <= CLOSEST
    return Pairs(query[kept], value[order][kept], distance[order][kept])


def case_of(name: str) -> str:
    """Return the part of a file name that names its case: the last that is no mere number or word; or "".

    ``synpic54610.jpg`` -> ``synpic54610``, ``xmlab102/source.jpg`` -> ``xmlab102``, ``images/17.png`` -> "".
    """
    path = PurePosixPath(name.replace("\\", "/"))
    for part in (path.stem, *reversed(path.parent.parts)):
        if names_case(part):
            return part.casefold()
    return ""


def names_case(part: str) -> bool:
    """Return whether two files of this name are likely to be of the same case: letters and digits."""
    return re.fullmatch(r"\d{6,}|(?=.*\d\d)(?=.*[^\W\d_]).{6,}", part, re.DOTALL) is not None
