"""Hashes of pictures: exact and perceptual, made by all cores, kept in a file for the next run.

Both hashes are taken of the pixels that training shows (see `preprocess.images`): 8 bit, upright, deep grey
windowed. Grey that is stored as RGB is grey. A file whose path, size and time of change are those of a file
that was hashed before is not opened again; pictures inside of tables go by a hash of their bytes.
"""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.executor import Executor
from data_tools.output.near_duplicates import perceptual_hash_of
from data_tools.preprocess.images import pixel_hash, read_pixels
from gmai_xtuner.core.errors import CorpusError, UnusableImage

VERSION = 1
"""Goes up with whatever changes a hash; hashes of another version are made anew."""

_IN_A_TASK = 16
_AT_ONCE = 4_096
"""Pictures that are looked up, hashed and put on disk together: what a kill costs."""

THUMBNAIL = 224

OK, UNREADABLE, MISSING, PLAIN = 1, 2, 3, 4
"""States of a picture. ``PLAIN``: one grey level, which looks like every other such picture."""


@dataclass(frozen=True, slots=True)
class Hashed:
    """What is known of a picture.

    Args:
        state: of the module's.
        pixels: 16 bytes that say which pixels these are; empty if it can't be read.
        look: the 64-bit perceptual hash.
        problem: why it can't be read.
    """

    state: int
    pixels: bytes = b""
    look: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to be hashed: a ``path``, or the bytes ``data`` of one that lies in a table."""

    number: int
    path: Path | None = None
    data: bytes | None = None


def hash_picture(source: Path | bytes) -> Hashed:
    """Read and hash one picture; what is wrong with it is in the result."""
    try:
        pixels = read_pixels(source)
    except UnusableImage as error:
        return Hashed(UNREADABLE, problem=str(error))
    if pixels.ndim == 3 and _is_grey(pixels):
        pixels = np.ascontiguousarray(pixels[..., 0])
    digest = bytes.fromhex(pixel_hash(pixels))
    look = perceptual_hash_of(pixels)
    # All pixels are compared only where a few are alike.
    few = pixels[:: max(1, len(pixels) // 8)]
    plain = bool((few == few[:1, :1]).all() and (pixels == pixels[:1, :1]).all())
    return Hashed(PLAIN if plain else OK, digest, look)


def _is_grey(pixels: np.ndarray) -> bool:
    few = pixels[:: max(1, len(pixels) // 8)]
    return all(
        np.array_equal(part[..., 0], part[..., channel])
        for part in (few, pixels)
        for channel in (1, 2)
    )


def thumbnail(source: Path | bytes, *, side: int = THUMBNAIL) -> bytes:
    """A small JPEG to look at.

    Raises:
        UnusableImage: it can't be read.
    """
    image = Image.fromarray(read_pixels(source))
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _task(sources: Sequence[Path | bytes]) -> list[tuple[Hashed, bytes]]:
    """Of pictures out of tables also a thumbnail: for the report the table isn't read again."""
    found = []
    for source in sources:
        hashed = hash_picture(source)
        small = isinstance(source, bytes) and hashed.state in (OK, PLAIN)
        found.append((hashed, thumbnail(source) if small else b""))
    return found


def _died(sources: Sequence[Path | bytes]) -> list[tuple[Hashed, bytes]]:
    problem = "image can't be read: its decoder crashed"
    return [(Hashed(UNREADABLE, problem=problem), b"") for _ in sources]


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

    def hashes(self, pictures: Iterable[Picture], engine: Executor) -> Iterator[tuple[int, Hashed]]:
        """Numbers and hashes of pictures, in no particular order.

        Args:
            pictures: read as results are taken.
            engine: does the decoding.
        """
        pictures = iter(pictures)
        while some := list(islice(pictures, _AT_ONCE)):
            fresh: list[tuple[int, Hashed]] = []
            unknown = list(self._unknown(some, fresh))
            yield from fresh
            yield from self._made(unknown, engine)
            self._connection.commit()

    def _made(
        self, unknown: Sequence[tuple[Picture, str, int, int]], engine: Executor
    ) -> Iterator[tuple[int, Hashed]]:
        chunks = [unknown[at : at + _IN_A_TASK] for at in range(0, len(unknown), _IN_A_TASK)]
        tasks = [[_source(picture) for picture, *_ in chunk] for chunk in chunks]
        for chunk, task, results in zip(
            chunks, tasks, engine.map(_task, tasks, died=_died_chunk), strict=True
        ):
            if results is None:  # one of these has killed its worker: which?
                results = [
                    result
                    for one in task
                    for result in next(engine.map(_task, [[one]], died=_died))
                ]
            for (picture, *key), (hashed, small) in zip(chunk, results, strict=True):
                row = (
                    *key,
                    hashed.state,
                    hashed.pixels,
                    _signed(hashed.look),
                    hashed.problem,
                    small,
                )
                self._connection.execute(
                    f"INSERT OR REPLACE INTO {self._table} VALUES (?,?,?,?,?,?,?,?)", row
                )
                yield picture.number, hashed

    def _unknown(
        self, pictures: Iterable[Picture], fresh: list[tuple[int, Hashed]]
    ) -> Iterator[tuple[Picture, str, int, int]]:
        """Pictures that must be opened; what is known of the others goes to ``fresh``."""
        for picture in pictures:
            if picture.path is not None:
                try:
                    status = os.stat(picture.path)
                except (OSError, ValueError) as error:
                    fresh.append((picture.number, Hashed(MISSING, problem=_reason(error))))
                    continue
                key, size, changed = (
                    os.path.abspath(picture.path),
                    status.st_size,
                    status.st_mtime_ns,
                )
            else:
                assert picture.data is not None
                key = content_key(picture.data)
                size, changed = len(picture.data), 0
            row = self._connection.execute(
                f"SELECT state, pixels, look, problem FROM {self._table} "
                "WHERE key = ? AND size = ? AND changed = ?",
                (key, size, changed),
            ).fetchone()
            if row is None:
                yield picture, key, size, changed
            else:
                state, pixels, look, problem = row
                fresh.append((picture.number, Hashed(state, pixels, look % 2**64, problem)))

    def small(self, data_key: str) -> bytes:
        """Thumbnail of a picture out of a table, by `content_key`; empty if there is none."""
        row = self._connection.execute(
            f"SELECT small FROM {self._table} WHERE key = ?", (data_key,)
        ).fetchone()
        return row[0] if row else b""


def content_key(data: bytes) -> str:
    """How the cache knows a picture that lies in a table."""
    return "content:" + blake2b(data, digest_size=16).hexdigest()


@contextmanager
def open_cache(path: Path) -> Iterator[HashCache]:
    """Open a cache, made if need be; several runs may share it.

    Raises:
        CorpusError: it can't be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
    except (OSError, sqlite3.Error) as error:
        raise CorpusError(
            f"the cache of hashes {path} can't be opened ({error}). Name another file with --cache."
        ) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        yield HashCache(connection)
        connection.commit()
    except sqlite3.DatabaseError as error:
        raise CorpusError(
            f"the cache of hashes {path} can't be used ({error}). Remove it, or name another with --cache."
        ) from error
    finally:
        # What was hashed before an error or Ctrl-C stays.
        with suppress(sqlite3.Error):
            connection.commit()
        connection.close()


def _died_chunk(_: Sequence[Path | bytes]) -> None:
    return None


def _source(picture: Picture) -> Path | bytes:
    if picture.path is not None:
        return picture.path
    assert picture.data is not None
    return picture.data


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
