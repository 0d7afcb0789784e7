# SPDX-License-Identifier: Apache-2.0

"""Images where they lie in archives: a path that goes on below a file, ``scans.zip/ct/1.png``.

The root of such a path is a container (`gmai_xtuner.core.members`: zip, tar, Parquet, Arrow), a pattern
(``shards/*.tar``) or a ``.images`` file, which `Index.write` has made. In ``shards/*.tar/0001.png`` the name
must be in one shard alone; ``shards/*.tar/train-7.tar/0001.png`` says which. The last name of a path may also
be the image itself, see `DATA_URL`.
"""

from __future__ import annotations

import base64
import glob
import json
import mmap
import os
import re
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gmai_xtuner.core import members
from gmai_xtuner.core.constants import DATA_URL
from gmai_xtuner.core.errors import ArchiveError, ImageError
from gmai_xtuner.core.files import locked, staged
from gmai_xtuner.core.members import FOLDER, MEMBERS, UNREADABLE

INDEX_SUFFIX = ".images"
MAX_MEMBER = 2**30  # bytes of an unpacked member; the largest image that is decoded has half

_LONG = ("high", "low", "offset", "packed", "size")
COLUMNS = {**dict.fromkeys(_LONG, "<u8"), "part": "<u4", "check": "<u4", "kind": "<u1"}
_OUTSIDE = re.compile(r"[/\\]|.:|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)


class Part(NamedTuple):
    """An archive as it was when it was indexed, or a folder: its files are named without ``skip`` parts."""

    path: str
    size: int = 0
    changed: int = 0
    skip: int = 0

    @classmethod
    def of(cls, path: str) -> Part:
        status = os.stat(path)
        return cls(os.path.abspath(path), status.st_size, status.st_mtime_ns)


class Fault(NamedTuple):
    """What is wrong with an archive (``member`` is empty) or a member: a short ``reason``, and in words."""

    archive: str
    member: str
    reason: str
    problem: str


def digests(names: Iterable[str]) -> np.ndarray:
    """Return uint64 ``[N, 2]``: 128 bits that stand for each name."""
    encoded = (name.encode("utf-8", "surrogateescape") for name in names)
    joined = b"".join(blake2b(one, digest_size=16).digest() for one in encoded)
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


class Index:
    """Where the bytes of named images are: columns of one length, sorted by ``high`` and ``low``."""

    def __init__(
        self, parts: Sequence[Part], columns: Mapping[str, np.ndarray], faults: Sequence[Fault] = ()
    ) -> None:
        self.parts, self.faults = list(parts), list(faults)
        self.columns = dict(columns)
        self._maps: dict[int, mmap.mmap] = {}

    @property
    def identity(self) -> str:
        """Say which names with which content these are, whatever the archives are called and wherever."""
        digest = blake2b(digest_size=8)
        for name in ("high", "low", "size", "check"):
            digest.update(np.ascontiguousarray(self.columns[name]).data)
        return digest.hexdigest()

    @classmethod
    def of_members(
        cls, parts: Sequence[Part], columns: Mapping[str, np.ndarray], faults: Sequence[Fault] = ()
    ) -> Index:
        """Sort the columns of members, given in any order."""
        order = np.lexsort((columns["part"], columns["low"], columns["high"]))
        return cls(parts, {name: columns[name][order] for name in COLUMNS}, faults)

    def write(self, file: Path) -> None:
        """Write the index as a file, which appears when it is whole."""
        import pyarrow as pa

        about = json.dumps([self.parts, self.faults])
        table = pa.table(self.columns).replace_schema_metadata({"archives": about})
        with staged(file) as name, pa.ipc.new_file(str(name), table.schema) as out:
            out.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Index:
        """Open an index that `write` has written; it stays on disk."""
        import pyarrow as pa

        try:
            with pa.ipc.open_file(pa.memory_map(os.fspath(file))) as opened:
                table = opened.read_all()
            parts, faults = json.loads(table.schema.metadata[b"archives"])
            columns = {name: table[name].combine_chunks().to_numpy() for name in COLUMNS}
            return cls([Part(*one) for one in parts], columns, [Fault(*one) for one in faults])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArchiveError(f"{file} is no index of images ({error}). Make it anew.") from error

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for digests ``[N, 2]`` the first row that has each, and how many have it (0: none)."""
        mine, rest = self.columns["high"], self.columns["low"]
        high, low = np.ascontiguousarray(wanted[:, 0]), wanted[:, 1]
        order, last = np.argsort(high), len(mine) - 1
        first = np.zeros(len(high), np.int64)
        first[order] = np.searchsorted(mine, high[order])  # ten times as fast in order
        if last < 0:
            return first, np.zeros_like(first)
        at, after = np.minimum(first, last), np.minimum(first + 1, last)
        count = ((mine[at] == high) & (rest[at] == low)).astype(np.int64)
        for one in np.flatnonzero((after > at) & (mine[after] == high)).tolist():
            end = np.searchsorted(mine, high[one], side="right")
            same = np.flatnonzero(rest[first[one] : end] == low[one])
            count[one], first[one] = len(same), first[one] + (same[0] if len(same) else 0)
        return first, count

    def rows(self, name: str) -> list[int]:
        """Return the rows of a name; where there are none, of one that begins with its archive."""
        if found := self._rows_of(name):
            return found
        archive, _, member = name.partition("/")
        return [row for row in self._rows_of(member) if self._path(row).endswith(f"/{archive}")]

    def _rows_of(self, name: str) -> list[int]:
        """As `find`, for one name, in a tenth of the time."""
        high, low = digests([name])[0]
        start, end = (
            int(self.columns["high"].searchsorted(high, side)) for side in ("left", "right")
        )
        return [row for row in range(start, end) if self.columns["low"][row] == low]

    def _path(self, row: int) -> str:
        return self.parts[self.columns["part"][row]].path

    def holders(self, name: str) -> list[str]:
        """Return the archives and folders in which an image is, for messages."""
        return sorted({repr(self._path(row)) for row in self.rows(name)})

    def content(self, name: str, shown: str) -> bytes:
        """Return the bytes of an image, or raise ImageError, which calls it ``shown``, or ArchiveError."""
        at = self.check(name, shown)
        row = {key: int(column[at]) for key, column in self.columns.items()}
        part = self.parts[row["part"]]
        if row["size"] > MAX_MEMBER:
            problem = f"unpacks to {row['size']} bytes, the limit is {MAX_MEMBER}"
            raise _error(shown, problem, "enormous_image", "Take it out of the archive.")
        if row["kind"] == FOLDER:
            try:
                return Path(part.path, name.split("/", part.skip)[part.skip]).read_bytes()
            except (OSError, IndexError) as error:
                told = f"is gone ({error})"
                raise _error(shown, told, "missing_image", "Copy it anew.") from error
        if row["kind"] == UNREADABLE:
            remedy = "Pack it by deflate or not at all, without a password."
            raise _error(shown, "is packed in a way that is not read", "unsupported_image", remedy)
        data = self.bytes_of(row["part"])
        if row["kind"] == members.ROW:
            content, problem = members.content_of_row(part.path, row["offset"])
        else:
            content, problem = self._unpacked(row, data)
        if problem:
            remedy = f"Copy {part.path} again from its source."
            raise _error(shown, f"is damaged ({problem})", "damaged_image", remedy)
        return content

    def check(self, name: str, shown: str) -> int:
        """Return the row of an image, or raise ImageError if there is none or more than one."""
        rows = self.rows(name)
        if len(rows) == 1:
            return rows[0]
        if not rows:
            problem = "can't be opened (no archive has such a member)"
            remedy = "Check images in the mixture file, or drop the record."
            raise _error(shown, problem, "missing_image", remedy)
        where = " and ".join(self.holders(name))
        remedy = "Remove one, or put the archive's name before the member's."
        raise _error(shown, f"is there {len(rows)} times: in {where}", "ambiguous_image", remedy)

    @staticmethod
    def _unpacked(row: Mapping[str, int], data: mmap.mmap) -> tuple[bytes, str]:
        """Return a member's content, or what is wrong with it."""
        start, size = row["offset"], row["size"]
        if row["kind"] != members.PLAIN:
            if data[start : start + 4] != b"PK\3\4" or len(data) < start + 30:
                return b"", "no member begins where the archive says"
            start += 30 + sum(struct.unpack_from("<26xHH", data, start))
        content = data[start : start + row["packed"]]
        if len(content) != row["packed"]:
            return b"", "the archive is cut off"
        if row["kind"] == members.DEFLATED:
            unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                content = unpacking.decompress(content, size + 1)
            except zlib.error as error:
                return b"", str(error)
            if len(content) > size:
                return b"", "it unpacks to more than the archive says"
        if len(content) != size or (
            row["kind"] != members.PLAIN and zlib.crc32(content) != row["check"]
        ):
            return b"", "its length or checksum is not what the archive says"
        return content, ""

    def bytes_of(self, number: int) -> mmap.mmap:
        """Map an archive into memory; ArchiveError if it is not the one that was indexed."""
        part = self.parts[number]
        try:
            if Part.of(part.path) == part:
                if number not in self._maps:
                    with open(part.path, "rb") as file:
                        self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                return self._maps[number]
        except (OSError, ValueError) as error:
            raise ArchiveError(f"archive {part.path!r} can't be opened ({error})") from error
        problem = f"has changed since its index was made (it had {part.size} bytes)"
        raise ArchiveError(f"archive {part.path!r} {problem}. Start again, or make the index anew.")


def _error(shown: str, problem: str, reason: str, remedy: str) -> ImageError:
    return ImageError(f"image {shown!r} {problem}", remedy=remedy, reason=reason)


SUFFIXES = (*MEMBERS, INDEX_SUFFIX)


def make_index(archives: Sequence[str]) -> Index:
    """List the members of archives; what is wrong with them is in `Index.faults`, the rest is there."""
    parts, faults, listed = [], list[Fault](), []
    for number, path in enumerate(archives):
        names, places = list[str](), array("Q")
        part = Part(os.path.abspath(path))
        try:
            part = Part.of(path)
            for name, place in MEMBERS[Path(path).suffix.lower()](path):
                names.append(name.removeprefix("./"))
                places.extend(place)
        except members.ERRORS as error:
            names, places = [], array("Q")
            problem = f"it is no whole {Path(path).suffix[1:]} archive ({error}). Copy it again."
            faults.append(Fault(path, "", "unreadable_archive", problem))
        parts.append(part)
        table = np.array(places, np.uint64).reshape(-1, 5)
        columns = dict(zip(("kind", "offset", "packed", "size", "check"), table.T, strict=True))
        columns["high"], columns["low"] = digests(names).T
        columns["part"] = np.full(len(names), number)
        faults += _faults(path, names, columns)
        listed.append({name: columns[name].astype(kind) for name, kind in COLUMNS.items()})
    joined = {name: np.concatenate([one[name] for one in listed]) for name in COLUMNS}
    return Index.of_members(parts, joined, faults)


def _faults(path: str, names: Sequence[str], columns: Mapping[str, np.ndarray]) -> list[Fault]:
    """Return what is wrong with members: names that lead out or are there twice, bytes that are shared."""
    outside = filter(_OUTSIDE.match, names)
    found = [Fault(path, name, "outside_root", "its name leads out") for name in outside]
    twice = {one for one, another in pairwise(sorted(names)) if one == another}
    found += [Fault(path, name, "duplicate_member", "two members have this name") for name in twice]
    order = np.argsort(columns["offset"], kind="stable")
    real = order[columns["kind"][order] != UNREADABLE]
    ends = columns["offset"][real] + columns["packed"][real]
    for at in np.flatnonzero(ends[:-1] > columns["offset"][real][1:]).tolist():
        told = "it shares its bytes with the next one"
        found.append(Fault(path, names[real[at]], "overlapping_members", told))
        columns["kind"][real[at : at + 2]] = UNREADABLE
    return found


def archives_of(root: str | os.PathLike[str]) -> list[str]:
    """Return the archives that a root names, itself or as a pattern; empty for a folder."""
    text = os.fspath(root)
    named = [text] if os.path.exists(text) or not glob.has_magic(text) else sorted(glob.glob(text))
    return [one for one in named if one.lower().endswith(SUFFIXES) and os.path.isfile(one)]


_opened: dict[str, Index] = {}


def open_archives(root: str | os.PathLike[str]) -> Index | None:
    """Open the archives of a root as they are now, or raise ArchiveError; None if it names none."""
    text = os.fspath(root)
    _opened.pop(text, None)
    if not (files := archives_of(text)):
        return None
    is_index = files[0].lower().endswith(INDEX_SUFFIX)
    index = Index.read(files[0]) if is_index else cached_index(files)
    for number in [number for number, part in enumerate(index.parts) if is_index and part.size]:
        index.bytes_of(number)
    if index.faults:
        archive, member, _, problem = index.faults[0]
        member = f", member {member!r}" if member else ""
        raise ArchiveError(f"archive {archive!r}{member}: {problem}")
    _opened[text] = index
    return index


def cached_index(archives: Sequence[str]) -> Index:
    """Return the index of archives from the cache; make it and keep it there if need be."""
    try:
        known = [2, *map(Part.of, archives)]
    except OSError as error:
        raise ArchiveError(f"archive {error.filename!r} can't be opened ({error})") from error
    what = f"list {len(archives)} archives"
    make = lambda file: make_index(archives).write(file)  # noqa: E731
    return Index.read(cached(f"archives/*{INDEX_SUFFIX}", known, make, what))


def cached(pattern: str, known: object, make: Callable[[Path], None], what: str) -> Path:
    """Return a file of the cache, whose name has the hash of all that it depends on; make it if need be.

    ``what`` is the work of ``make``, see `gmai_xtuner.core.files.locked`.
    """
    import platformdirs

    key = blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
    cache = Path(os.environ.get("GMAI_CACHE") or platformdirs.user_cache_path("gmai_xtuner"))
    file = cache / pattern.replace("*", key)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock"), what):
            if not file.is_file():
                make(file)
    return file


class _InTheName(Index):
    """An image that is its own name, behind `DATA_URL`."""

    def rows(self, name: str) -> list[int]:
        return [0]

    def content(self, name: str, shown: str) -> bytes:
        return base64.urlsafe_b64decode(name)


def _above(path: str) -> Iterator[str]:
    while (folder := os.path.dirname(path)) != path:
        yield (path := folder)


def locate(path: str | os.PathLike[str]) -> tuple[Index, str] | None:
    """Return the archives that a path leads into, and the name there; None if it leads into none."""
    text = os.fspath(path)
    if (name := os.path.basename(text)).startswith(DATA_URL):
        return _InTheName([], {}), name.removeprefix(DATA_URL)
    root = next(filter(_opened.__contains__, _above(text)), None)
    root = root or next((one for one in _above(text) if os.path.isdir(one) or archives_of(one)), "")
    index = _opened.get(root) or open_archives(root)
    return None if index is None else (index, text[len(root) + 1 :])
