# SPDX-License-Identifier: Apache-2.0

"""``python data_tools/import_gmai.py DIR``: a corpus as it lies on the hub -> a mixture file.

Nothing is unpacked: ``OUTPUT/gmai.images`` says where each image is whose whole path is there exactly once.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.command import DONE, Bar, exit_status
from gmai_xtuner.core import archives
from gmai_xtuner.core.agreements import agreement_of
from gmai_xtuner.core.archives import COLUMNS, FOLDER, UNREADABLE, Index, Part, cached, digests
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import CorpusError, DataError
from gmai_xtuner.core.files import replace_text, staged
from gmai_xtuner.core.records import iter_raw
from gmai_xtuner.core.yaml_lines import Document

_SKIPPED = 5
"""Parts of ``images/2d/cls/ct/SOURCE/a/b.png`` before the path in a user's own copy."""
_COPY = "*"
"""Stands for the start of names that a user's own copy of a source leaves out."""
_AT_ONCE = 200_000
_HALVES = ("high", "low")
_ROW = np.dtype(list(COLUMNS.items()))
_CODE = (__file__, inspect.getfile(parse_raw), inspect.getfile(iter_raw))
_RULES = blake2b(b"".join(Path(file).read_bytes() for file in _CODE)).hexdigest()
"""Stands for how records are read: with other code they are read anew."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 written, 1 an error, 3 something is missing or wrong."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="GMAI-VL-5.5M, PubMedVision or LLaVA-Med, as downloaded -> a mixture file. "
        "Exit status: 0 written, 1 error, 3 something is missing or wrong, see faults.jsonl.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the downloaded folder")
    add("--output", type=Path, metavar="DIR", help="default DIR/imported")
    again: dict[str, Any] = {"action": "append", "default": [], "type": _pair}
    add("--images", **again, metavar="SOURCE=FOLDER", help="your copy of a source; can be repeated")
    add(
        "--leave-out",
        action="store_true",
        help="write the mixture without what is missing or wrong",
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _pair(text: str) -> list[str]:
    if not re.fullmatch("[^=]+=.+", text):
        raise argparse.ArgumentTypeError(f"expected SOURCE=VALUE, got {text!r}")
    return text.split("=", 1)


class _Place(NamedTuple):
    """An index, what stands before its names in records, and the source that it is of (empty: any)."""

    members: Index
    prefix: str = ""
    source: str = ""

    def name_of(self, image: str) -> str:
        """Return the name under which an image may be there; empty if it may not."""
        if self.source and _source_of(image) != self.source:
            return ""
        return _name_behind(image, _COPY if self.source else self.prefix)


def _name_behind(image: str, start: str) -> str:
    """Return a name without its start, of which `_COPY` is a source's; empty if it has another."""
    if start == _COPY:
        return image.split("/", _SKIPPED)[-1] if _source_of(image) else ""
    return image.removeprefix(start) if image.startswith(start) else ""


def _source_of(image: str) -> str:
    parts = image.split("/", _SKIPPED)
    return parts[-2] if len(parts) > _SKIPPED else ""


def _run(options: argparse.Namespace) -> int:
    folder: Path = options.folder.absolute()
    sets = Document(Path(__file__).with_name("hub_sets.yaml"), what="table of sets").data
    kind = next((one for one in sets.values() if any(folder.glob(one["recognised"]))), None)
    if kind is None:
        known = "; ".join(f"{one['about']} ({one['recognised']})" for one in sets.values())
        raise CorpusError(f"{folder} is none of the sets that are known: {known}.")
    output = (options.output or folder / "imported").absolute()
    output.mkdir(parents=True, exist_ok=True)
    (output / "mixture.yaml").unlink(missing_ok=True)
    files = {}
    for name, fields in kind["datasets"].items():
        if paths := sorted(map(str, folder.glob(fields["annotations"]))):
            files[name] = paths
    if not files:
        wanted = ", ".join(fields["annotations"] for fields in kind["datasets"].values())
        raise CorpusError(f"{folder} has no annotation file of {kind['about']} ({wanted}).")
    with Bar() as bar:
        places = list(_places(kind, folder, options.images))
        plan = _Plan(kind, places, bar).write(files, output)
    if is_written := not plan["faults"] or options.leave_out:
        more = {"on_bad_sample": "skip", "exclude": "exclude.txt"} if plan["faults"] else {}
        datasets = {}
        for name, paths in files.items():
            images = {"images": "gmai.images"} if plan["images"][name] else {}
            own = {"annotations": paths, "size": plan["records"][name]}
            datasets[name] = kind["datasets"][name] | own | images | more
        text = json.dumps({"datasets": datasets}, indent=2)  # which is good YAML
        replace_text(output / "mixture.yaml", text)
    plan["mixture"] = str(output / "mixture.yaml") if is_written else None
    print(json.dumps(plan, indent=2, ensure_ascii=False))
    return DONE if is_written else 3


def _places(
    kind: Mapping[str, Any], folder: Path, named: Sequence[Sequence[str]]
) -> Iterator[_Place]:
    """Yield where images may be: what the set ships, and the user's own copies of sources."""
    found = sorted(path for pattern in kind["images"] for path in folder.glob(pattern))
    if files := [str(path) for path in found if path.is_file()]:
        index = archives.cached_index(files)
        yield from (_Place(index, prefix) for prefix in kind["prefixes"])
    yield from (_Place(_index_of(path, skip=0)) for path in found if path.is_dir())
    for source, root in named:
        yield _Place(_index_of(Path(root).absolute(), skip=_SKIPPED), source=source)


def _index_of(root: Path, *, skip: int) -> Index:
    """Index the files below a folder by their paths; of a copy (``skip``) by each end of a path."""
    parts, names, numbers = dict[Part, int](), list[str](), list[int]()
    if not root.is_dir():
        raise CorpusError(f"{root} is no folder.")
    for folder, _, found in os.walk(root):
        above = os.path.relpath(folder, root).split(os.sep) if folder != str(root) else []
        for at in range(len(above) + 1 if skip else 1):
            part = Part(os.path.join(root, *above[:at]), skip=skip)
            names += ["/".join((*above[at:], name)) for name in found]
            numbers += [parts.setdefault(part, len(parts))] * len(found)
    columns = {name: np.zeros(len(names), kind) for name, kind in COLUMNS.items()}
    columns["high"], columns["low"] = digests(names).T
    columns["part"][:], columns["kind"][:] = numbers, FOLDER
    return Index.of_members(list(parts), columns)


class _Records:
    """The images and the faults of an annotation file's records, read once and kept in the cache as columns.

    A row is an image or a fault. ``high0``, ``low0`` and so on stand for the image's name behind each start.
    """

    def __init__(self, dataset: str, path: str, kind: Mapping[str, Any], bar: Bar) -> None:
        self.dataset, self.path, self.bar = dataset, path, bar
        self.images_first = kind["datasets"][dataset].get("image_marks") == "first"
        self.starts = list(dict.fromkeys(("", *kind["prefixes"], _COPY)))
        self.count = 0
        known = [_RULES, Part.of(path), dataset, self.images_first, self.starts]
        file = cached("records/*.parquet", known, self._write, f"read {path}")
        self.file = pq.ParquetFile(file)
        self.count = int(self.file.metadata.metadata[b"records"])

    def _write(self, file: Path) -> None:
        texts = {name: pa.string() for name in ("source", "name", "fault")}
        halves = {f"{half}{n}": pa.uint64() for n in range(len(self.starts)) for half in _HALVES}
        schema = pa.schema({"line": pa.int64(), **texts, **halves})
        with (
            staged(file) as partial,
            pq.ParquetWriter(
                partial,
                schema,
                use_dictionary=["source"],
                compression={name: "zstd" if name in texts else "none" for name in schema.names},
            ) as out,
        ):
            each = self._rows()
            while rows := list(islice(each, _AT_ONCE)):
                line, name, fault = zip(*rows, strict=True)
                source = [_source_of(one or "") for one in name]
                columns: dict[str, Any] = {
                    "line": line,
                    "source": source,
                    "name": name,
                    "fault": fault,
                }
                for n, start in enumerate(self.starts):
                    found = digests(_name_behind(one or "", start) for one in name)
                    columns |= {f"{half}{n}": found[:, at] for at, half in enumerate(_HALVES)}
                out.write_table(pa.table(columns, schema))
            out.add_key_value_metadata({"records": str(self.count)})

    def _rows(self) -> Iterator[tuple[int, str | None, str | None]]:
        """Check records as training does; yield line, image and fault."""
        self.bar.stage(os.path.basename(self.path))
        for raw in iter_raw(self.path, dataset=self.dataset):
            self.bar.advance()
            self.count += 1
            line = int(raw.default_id.rpartition(":")[2])
            try:
                found = parse_raw(raw, dataset=self.dataset, images_first=self.images_first)
            except DataError as error:
                fault = {"reason": error.reason, "problem": str(error)}
                yield line, None, json.dumps(fault)
                continue
            yield from ((line, name, None) for name in found.images)
            ending = f"/{found.id.replace('#', '/')}"
            if "#" in found.id and not any(f"/{name}".endswith(ending) for name in found.images):
                problem = f"the id {found.id!r} names none of the record's images {found.images}"
                fault = {"reason": "wrong_id", "problem": problem, "id": found.id}
                yield line, None, json.dumps(fault)


@dataclass
class _Plan:
    """Links images to files, and writes down what is missing or wrong."""

    kind: Mapping[str, Any]
    places: Sequence[_Place]
    bar: Bar
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)

    def write(self, files: Mapping[str, Sequence[str]], output: Path) -> dict[str, Any]:
        """Write the index of images, the faults and the ids that are to be left out; return the numbers."""
        numbers: dict[str, Any] = {"records": {}, "images": {}}
        with (
            open(output / "faults.jsonl", "w") as faults,
            open(output / "exclude.txt", "w") as ids,
            TemporaryFile(dir=output) as linked,
        ):
            for index in {id(place.members): place.members for place in self.places}.values():
                for fault in index.faults:
                    self._tell(faults, fault._asdict())
            for name, paths in files.items():
                numbers["records"][name] = numbers["images"][name] = 0
                for path in paths:
                    records = _Records(name, path, self.kind, self.bar)
                    numbers["records"][name] += records.count
                    for group in range(records.file.num_row_groups):
                        numbers["images"][name] += self._link(records, group, linked, faults, ids)
            parts = [part for place in self.places for part in place.members.parts]
            index = _index_of_rows(linked, parts)
            index.write(output / "gmai.images")
            numbers["linked files"] = len(index.columns["part"])
        self.sources.pop("", None)
        return numbers | {"faults": dict(self.faults), "sources": self.sources}

    def _tell(self, faults: IO[str], fault: dict[str, Any]) -> None:
        source, reason = _source_of(fault.get("image", "")), fault["reason"]
        if source not in self.sources:
            unknown = "not known here; read the source's own terms"
            self.sources[source] = {"licence": getattr(agreement_of("", [source]), "name", unknown)}
        self.sources[source][reason] = self.sources[source].get(reason, 0) + 1
        self.faults[reason] += 1
        fault |= {"source": source, "licence": self.sources[source]["licence"]}
        faults.write(json.dumps(fault) + "\n")

    def _link(
        self, records: _Records, group: int, linked: IO[bytes], faults: IO[str], ids: IO[str]
    ) -> int:
        """Keep where the images are that are there once, write down the faults; return how many images."""
        names = [name for name in records.file.schema_arrow.names if name != "name"]
        table = records.file.read_row_group(group, names, use_threads=False)
        where = {"dataset": records.dataset, "file": records.path}
        is_image = table["fault"].is_null().to_numpy()
        for row in np.flatnonzero(~is_image).tolist():
            fault = json.loads(table["fault"][row].as_py())
            if name := fault.pop("id", None):
                ids.write(f"dataset: {records.dataset}\nid: {json.dumps(name)}\n")
            self._tell(faults, {**where, "line": table["line"][row].as_py(), **fault})
        keys = [
            np.stack([table[f"{half}{n}"].to_numpy()[is_image] for half in _HALVES], axis=1)
            for n in range(len(records.starts))
        ]
        count, offset = np.zeros(len(keys[0]), np.int64), 0
        rows = np.zeros(len(count), _ROW)
        for place in self.places:
            wanted = keys[records.starts.index(_COPY if place.source else place.prefix)]
            at = np.flatnonzero((wanted != digests([""])).any(axis=1))
            if place.source:
                own = pc.equal(table["source"], place.source).to_numpy()[is_image]
                at = at[own[at]]
            place_rows, found = place.members.find(wanted[at])
            count[at] += found
            at, place_rows = at[found > 0], place_rows[found > 0]
            for name, values in place.members.columns.items():
                rows[name][at] = values[place_rows]
            rows["part"][at] += np.uint32(offset)
            offset += len(place.members.parts)
        rows["high"], rows["low"] = keys[0].T
        good = (count == 1) & (rows["kind"] != UNREADABLE)
        linked.write(rows[good].tobytes())
        bad = np.flatnonzero(is_image)[~good]
        images = records.file.read_row_group(group, ["name"])["name"].take(bad) if len(bad) else []
        for image, line, times in zip(images, table["line"].take(bad), count[~good], strict=True):
            fault = self._missing(image.as_py(), int(times))
            self._tell(faults, {**where, "line": line.as_py(), **fault})
        return len(count)

    def _missing(self, image: str, times: int) -> dict[str, Any]:
        if not times:
            problem = "it is in none of the archives and folders"
            return {"image": image, "reason": "missing_image", "problem": problem}
        told = {holder for one in self.places for holder in one.members.holders(one.name_of(image))}
        problem = (
            f"it is there {times} times, or packed in another way: {' and '.join(sorted(told))}"
        )
        return {"image": image, "reason": "ambiguous_image", "problem": problem}


def _index_of_rows(file: IO[bytes], parts: Sequence[Part]) -> Index:
    """Sort the rows that were written to a file; of equal ones, an image of several records, one stays."""
    rows = np.memmap(file, _ROW, "r") if file.tell() else np.zeros(0, _ROW)
    order = np.lexsort((rows["low"], rows["high"]))
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.any([np.diff(rows[half][order]) != 0 for half in _HALVES], axis=0)
    order = order[is_first]
    return Index(parts, {name: rows[name][order] for name in COLUMNS})


if __name__ == "__main__":
    sys.exit(main())
