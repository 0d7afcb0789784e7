# SPDX-License-Identifier: Apache-2.0

"""Images where they lie in archives: a path that goes on below a file, ``scans.zip/ct/1.png``.

The root of such a path is a zip or an uncompressed tar file (WebDataset), a pattern (``shards/*.tar``)
or a ``.images`` file, which `Index.write` has made. In ``shards/*.tar/0001.png`` the name must be in one
shard alone; ``shards/*.tar/train-7.tar/0001.png`` says which.

An archive is memory-mapped and read by an index: of each member the hash of its name and where its bytes are,
sorted. The index is kept in a cache folder (``GMAI_CACHE``, else the user's) under the path, size and time of
change of the archives. Its `Index.identity` depends on the members' names, sizes and checksums alone, so a
copied archive keeps it.
"""

from __future__ import annotations

import glob
import json
import mmap
import os
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from gmai_xtuner.core.errors import ArchiveError, ImageError
from gmai_xtuner.core.files import locked, staged

PathLike = str | os.PathLike[str]

INDEX_SUFFIX = ".images"
MAX_MEMBER = 2**30
"""Bytes of an unpacked member; the largest image that is decoded has half of that."""

STORED, DEFLATED, TAR, FOLDER, UNREADABLE = range(5)
"""Kinds of members: of a zip file as it is or packed, of a tar file, a loose file, packed in another way."""

_MAGIC = b"GMAI images 1\n\0\0"
_COLUMNS = {
    "high": "<u8",
    "low": "<u8",
    "part": "<u4",
    "kind": "<u1",
    "offset": "<u8",
    "packed": "<u8",
    "size": "<u8",
    "check": "<u4",
}
_LOCAL = struct.Struct("<26xHH")
_BAD_ARCHIVE = (
    *(zipfile.BadZipFile, tarfile.TarError, NotImplementedError, struct.error),
    *(OSError, ValueError, OverflowError, EOFError),
)


@dataclass(frozen=True, slots=True)
class Part:
    """An archive as it was when it was indexed, or a folder: its files are named without ``skip`` parts."""

    path: str
    size: int = 0
    changed: int = 0
    skip: int = 0

    @classmethod
    def of(cls, path: str) -> Part:
        status = os.stat(path)
        return cls(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an archive (``member`` is empty) or a member: a short ``reason``, and in words."""

    archive: str
    member: str
    reason: str
    problem: str

    def __str__(self) -> str:
        where = f"{self.archive!r}, member {self.member!r}" if self.member else f"{self.archive!r}"
        return f"archive {where}: {self.problem}"


def digests(names: Iterable[str]) -> np.ndarray:
    """Return uint64 ``[N, 2]``: 128 bits that stand for each name."""
    joined = b"".join(
        blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest() for name in names
    )
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


class Index:
    """Where the bytes of named images are: columns of one length, sorted by ``high`` and ``low``."""

    def __init__(
        self, parts: Sequence[Part], columns: Mapping[str, np.ndarray], faults: Sequence[Fault] = ()
    ) -> None:
        self.parts, self.faults = list(parts), list(faults)
        self.columns = dict(columns)
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.columns["high"])

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
        return cls(parts, {name: columns[name][order] for name in _COLUMNS}, faults)

    def write(self, file: Path) -> None:
        """Write the index as a file, which appears when it is whole."""
        meta = {
            "length": len(self),
            "parts": [asdict(part) for part in self.parts],
            "faults": [asdict(fault) for fault in self.faults],
        }
        text = json.dumps(meta).encode()
        text += b" " * (-len(text) % 8)
        with staged(file) as partial_file, open(partial_file, "wb") as out:
            out.write(_MAGIC + struct.pack("<Q", len(text)) + text)
            for name, kind in _COLUMNS.items():
                data = np.ascontiguousarray(self.columns[name], dtype=kind).tobytes()
                out.write(data + b"\0" * (-len(data) % 8))

    @classmethod
    def read(cls, file: PathLike) -> Index:
        """Open an index that `write` has written; it stays on disk."""
        try:
            with open(file, "rb") as handle:
                data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            at = len(_MAGIC) + 8
            end = at + struct.unpack_from("<Q", data, len(_MAGIC))[0]
            if data[: len(_MAGIC)] != _MAGIC:
                raise ValueError("it begins with something else")
            meta = json.loads(data[at:end])
            columns = {}
            for name, kind in _COLUMNS.items():
                columns[name] = np.frombuffer(data, kind, int(meta["length"]), end)
                end += -(-columns[name].nbytes // 8) * 8
            parts = [Part(**part) for part in meta["parts"]]
            return cls(parts, columns, [Fault(**fault) for fault in meta["faults"]])
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ArchiveError(f"{file} is no index of images ({error}). Make it anew.") from error

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for digests ``[N, 2]`` the first row that has each, and how many have it (0: none)."""
        high, low = np.ascontiguousarray(wanted[:, 0]), wanted[:, 1]
        mine, rest = self.columns["high"], self.columns["low"]
        first = np.searchsorted(mine, high)
        end = np.searchsorted(mine, high, side="right")
        count = end - first
        # Almost always one or none; where the first halves agree, the second ones decide.
        single = np.flatnonzero(count == 1)
        count[single] = rest[first[single]] == low[single]
        for at in np.flatnonzero(count > 1).tolist():
            same = np.flatnonzero(rest[first[at] : end[at]] == low[at])
            count[at], first[at] = len(same), first[at] + (same[0] if len(same) else 0)
        return first, count

    def rows(self, name: str) -> list[int]:
        """Return the rows of a name; where there are none, of one that begins with its archive."""
        (first,), (count,) = self.find(digests([name]))
        archive, slash, member = name.partition("/")
        if count or not slash:
            return list(range(first, first + count))
        (first,), (count,) = self.find(digests([member]))
        part = self.columns["part"]
        here = range(first, first + count)
        return [row for row in here if os.path.basename(self.parts[part[row]].path) == archive]

    def content(self, name: str, shown: str) -> bytes:
        """Return the bytes of an image; errors call it ``shown``.

        Raises:
            ImageError: it is not there, in several archives, too large or damaged.
            ArchiveError: its archive can't be opened or has changed.
        """
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
                problem = f"can't be opened ({error})"
                raise _error(shown, problem, "missing_image", "Make the index anew.") from error
        if row["kind"] == UNREADABLE:
            remedy = "Pack it by deflate or not at all, without a password."
            raise _error(shown, "is packed in a way that is not read", "unsupported_image", remedy)
        content, problem = self._unpacked(row, self._bytes(row["part"]))
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
        parts = sorted({self.parts[self.columns["part"][row]].path for row in rows})
        where = " and ".join(map(repr, parts))
        remedy = "Remove one, or put the archive's name before the member's."
        raise _error(shown, f"is there {len(rows)} times: in {where}", "ambiguous_image", remedy)

    @staticmethod
    def _unpacked(row: Mapping[str, int], data: mmap.mmap) -> tuple[bytes, str]:
        """Return a member's content, or what is wrong with it."""
        start, size = row["offset"], row["size"]
        if row["kind"] != TAR:
            if data[start : start + 4] != b"PK\3\4" or len(data) < start + 30:
                return b"", "no member begins where the archive says"
            start += 30 + sum(_LOCAL.unpack_from(data, start))
        content = data[start : start + row["packed"]]
        if len(content) != row["packed"]:
            return b"", "the archive is cut off"
        if row["kind"] == DEFLATED:
            unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                content = unpacking.decompress(content, size + 1)
            except zlib.error as error:
                return b"", str(error)
            if len(content) > size:
                return b"", "it unpacks to more than the archive says"
        if len(content) != size or (row["kind"] != TAR and zlib.crc32(content) != row["check"]):
            return b"", "its length or checksum is not what the archive says"
        return content, ""

    def _bytes(self, number: int) -> mmap.mmap:
        part = self.parts[number]
        try:
            if Part.of(part.path) == part:
                if number not in self._maps:
                    with open(part.path, "rb") as file:
                        self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                return self._maps[number]
        except (OSError, ValueError) as error:
            raise ArchiveError(f"archive {part.path!r} can't be opened ({error})") from error
        raise ArchiveError(
            f"archive {part.path!r} has changed since its index was made (it had {part.size} bytes). Start "
            "again, or make the index anew."
        )

    def check_parts(self) -> None:
        """Raise ArchiveError if one of the archives is not the one that was indexed."""
        for number, part in enumerate(self.parts):
            if part.size:
                self._bytes(number)


def _error(shown: str, problem: str, reason: str, remedy: str) -> ImageError:
    return ImageError(f"image {shown!r} {problem}", remedy=remedy, reason=reason)


def _members_of_zip(path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name, and kind, offset, packed size, size and checksum of each member."""
    methods = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = UNREADABLE if info.flag_bits & 1 else methods.get(info.compress_type, UNREADABLE)
            place = (kind, info.header_offset, info.compress_size, info.file_size, info.CRC)
            if not info.is_dir():
                yield info.filename, place


def _members_of_tar(path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    with tarfile.open(path, "r:") as archive, open(path, "rb") as file:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if info.isreg() and not info.issparse():
                # No checksum of the content is there; this is one of name, size and time.
                check = zlib.crc32(f"{info.mtime}/{info.chksum}".encode())
                yield info.name, (TAR, info.offset_data, info.size, info.size, check)
            elif not info.isdir():
                yield info.name, (UNREADABLE, 0, 0, 0, 0)
        file.seek(archive.offset)
        if len(end := file.read(512)) < 512 or any(end):
            raise ValueError(f"it is cut off or damaged at byte {archive.offset}")
        while block := file.read(2**20):
            if any(block):
                raise ValueError("it goes on behind its end, as two tar files that were joined")


_MEMBERS = {".zip": _members_of_zip, ".tar": _members_of_tar}
SUFFIXES = (*_MEMBERS, INDEX_SUFFIX)


def make_index(archives: Sequence[str]) -> Index:
    """List the members of archives; what is wrong with them is in `Index.faults`, the rest is there."""
    parts, faults, listed = [], list[Fault](), []
    for number, path in enumerate(archives):
        names, places = list[str](), array("Q")
        part = Part(os.path.abspath(path))
        try:
            part = Part.of(path)
            for name, place in _MEMBERS[Path(path).suffix.lower()](path):
                names.append(name.removeprefix("./"))
                places.extend(place)
        except _BAD_ARCHIVE as error:
            names, places = [], array("Q")
            problem = f"it is no whole {Path(path).suffix[1:]} archive ({error}). Copy it again."
            faults.append(Fault(path, "", "unreadable_archive", problem))
        parts.append(part)
        table = (
            np.frombuffer(places, np.uint64).reshape(-1, 5)
            if places
            else np.zeros((0, 5), np.uint64)
        )
        columns = dict(zip(("kind", "offset", "packed", "size", "check"), table.T, strict=True))
        columns["high"], columns["low"] = digests(names).T
        columns["part"] = np.full(len(names), number)
        faults += _faults(path, names, columns)
        listed.append({name: columns[name].astype(kind) for name, kind in _COLUMNS.items()})
    joined = {name: np.concatenate([one[name] for one in listed]) for name in _COLUMNS}
    return Index.of_members(parts, joined, faults)


def _faults(path: str, names: Sequence[str], columns: Mapping[str, np.ndarray]) -> list[Fault]:
    """Return what is wrong with members: names that lead out or are there twice, bytes that are shared."""
    fault = partial(Fault, path)
    found = []
    for name in names:
        if (
            name.startswith(("/", "\\"))
            or name[1:2] == ":"
            or ".." in name.replace("\\", "/").split("/")
        ):
            found.append(fault(name, "outside_root", "its name leads out of the archive"))
    if len(set(names)) < len(names):
        twice = {one for one, another in pairwise(sorted(names)) if one == another}
        problem = "two members have this name. Remove one."
        found += [fault(name, "duplicate_member", problem) for name in sorted(twice)]
    order = np.argsort(columns["offset"], kind="stable")
    real = order[columns["kind"][order] != UNREADABLE]
    ends = columns["offset"][real] + columns["packed"][real]
    for at in np.flatnonzero(ends[:-1] > columns["offset"][real][1:]).tolist():
        problem = (
            "it shares its bytes with the next one, as in an archive made to unpack to any size"
        )
        found.append(fault(names[real[at]], "overlapping_members", problem))
    return found


def archives_of(root: PathLike) -> list[str]:
    """Return the files that a root names, itself or as a pattern; empty if it names no archive.

    Raises:
        ArchiveError: some files of a pattern are archives, and others not.
    """
    text = os.fspath(root)
    is_pattern = not os.path.isfile(text) and glob.has_magic(text)
    files = sorted(filter(os.path.isfile, glob.glob(text))) if is_pattern else [text]
    known = tuple(_MEMBERS) if is_pattern else SUFFIXES
    other = [file for file in files if not file.lower().endswith(known)]
    if other and len(other) < len(files):
        shown = ", ".join(known)
        raise ArchiveError(f"{text!r} names {other[0]!r} too, which is no archive ({shown}).")
    return [] if other else [file for file in files if os.path.isfile(file)]


def is_root(path: PathLike) -> bool:
    """Tell whether images can lie below a path: a folder, an archive, or a pattern of archives."""
    return os.path.isdir(path) or bool(archives_of(path))


_opened: dict[str, Index] = {}


def open_archives(root: PathLike) -> Index | None:
    """Open the archives of a root as they are now; None if it names none. Their index is made if need be.

    Raises:
        ArchiveError: an archive can't be read, has a fault, or has changed since its index was made.
    """
    text = os.fspath(root)
    _opened.pop(text, None)
    if os.path.isdir(text) or not (files := archives_of(text)):
        return None
    if files[0].lower().endswith(INDEX_SUFFIX):
        index = Index.read(files[0])
        index.check_parts()
    else:
        index = cached_index(files)
        if index.faults:
            more = f" ({len(index.faults)} such faults in all)" if len(index.faults) > 1 else ""
            raise ArchiveError(f"{index.faults[0]}{more}")
    _opened[text] = index
    return index


def cached_index(archives: Sequence[str]) -> Index:
    """Return the index of archives from the cache; make it and keep it there if need be."""
    import platformdirs

    try:
        known = [1, *map(asdict, map(Part.of, archives))]
    except OSError as error:
        raise ArchiveError(f"archive {error.filename!r} can't be opened ({error})") from error
    key = blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
    cache = Path(os.environ.get("GMAI_CACHE") or platformdirs.user_cache_path("gmai_xtuner"))
    file = cache / "archives" / f"{key}{INDEX_SUFFIX}"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock"), f"list {len(archives)} archives"):
            if not file.is_file():
                make_index(archives).write(file)
    return Index.read(file)


def locate(path: PathLike) -> tuple[Index, str] | None:
    """Return the archives that a path leads into, and the name there; None if it leads into none."""
    text = os.fspath(path)
    above = [text]
    while (folder := os.path.dirname(above[-1])) not in ("", above[-1]):
        above.append(folder)
    for root in above[1:]:
        if root in _opened:
            return _opened[root], text[len(root) + 1 :]
    for root in above[1:]:
        if os.path.isdir(root):
            return None
        if (index := open_archives(root)) is not None:
            return index, text[len(root) + 1 :]
    return None


def read_member(path: PathLike) -> bytes | None:
    """Return the content of an image in an archive; None if the path leads into no archive.

    Raises:
        ImageError, ArchiveError: see `Index.content`.
    """
    found = locate(path)
    return None if found is None else found[0].content(found[1], os.fspath(path))
