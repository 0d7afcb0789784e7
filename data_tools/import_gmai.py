# SPDX-License-Identifier: Apache-2.0

"""``python data_tools/import_gmai.py DIR``: a corpus as it lies on the hub -> a mixture file.

Nothing is unpacked: ``OUTPUT/gmai.images`` says where each image is whose whole path is there exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_tools.command import DONE, Bar, exit_status
from gmai_xtuner.core import archives
from gmai_xtuner.core.agreements import agreement_of
from gmai_xtuner.core.archives import COLUMNS, FOLDER, UNREADABLE, Index, Part, digests
from gmai_xtuner.core.conversation import parse_raw
from gmai_xtuner.core.errors import CorpusError, DataError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.core.records import iter_raw
from gmai_xtuner.core.yaml_lines import Document

_SKIPPED = 5
"""Parts of ``images/2d/cls/ct/SOURCE/a/b.png`` before the path in a user's own copy."""
_AT_ONCE = 50_000


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


@dataclass(frozen=True)
class _Place:
    """An index, what stands before its names in records, and the source that it is of (empty: any)."""

    index: Index
    prefix: str = ""
    source: str = ""

    def name_of(self, image: str) -> str:
        """Return the name under which an image may be there; empty if it may not."""
        if self.source:
            return image.split("/", _SKIPPED)[-1] if _source_of(image) == self.source else ""
        return image.removeprefix(self.prefix) if image.startswith(self.prefix) else ""


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


@dataclass
class _Plan:
    """Links images to files in one pass over the records, and writes down what is missing or wrong."""

    kind: Mapping[str, Any]
    places: Sequence[_Place]
    bar: Bar
    linked: list[dict[str, np.ndarray]] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)

    def write(self, files: Mapping[str, Sequence[str]], output: Path) -> dict[str, Any]:
        """Write the index of images, the faults and the ids that are to be left out; return the numbers."""
        numbers: dict[str, Any] = {"records": {}, "images": {}}
        with open(output / "faults.jsonl", "w") as faults, open(output / "exclude.txt", "w") as ids:
            for index in {id(place.index): place.index for place in self.places}.values():
                for fault in index.faults:
                    self._tell(faults, fault._asdict())
            for name, paths in files.items():
                counts = [self._read(name, path, faults, ids) for path in paths]
                numbers["records"][name], numbers["images"][name] = np.sum(counts, axis=0).tolist()
        columns = {name: np.concatenate([one[name] for one in self.linked]) for name in COLUMNS}
        # An image of several records is linked once.
        pairs = np.stack([columns["high"], columns["low"]], axis=1)
        once = np.unique(pairs, axis=0, return_index=True)[1]
        parts = [part for place in self.places for part in place.index.parts]
        index = Index(parts, {name: column[once] for name, column in columns.items()})
        index.write(output / "gmai.images")
        self.sources.pop("", None)
        found = {"linked files": len(once), "faults": dict(self.faults), "sources": self.sources}
        return numbers | found

    def _tell(self, faults: IO[str], fault: dict[str, Any]) -> None:
        source, reason = _source_of(fault.get("image", "")), fault["reason"]
        if source not in self.sources:
            unknown = "not known here; read the source's own terms"
            self.sources[source] = {"licence": getattr(agreement_of("", [source]), "name", unknown)}
        self.sources[source][reason] = self.sources[source].get(reason, 0) + 1
        self.faults[reason] += 1
        fault |= {"source": source, "licence": self.sources[source]["licence"]}
        faults.write(json.dumps(fault) + "\n")

    def _read(self, dataset: str, path: str, faults: IO[str], ids: IO[str]) -> tuple[int, int]:
        """Check records as training does, and link their images; return how many of both there are."""
        self.bar.stage(os.path.basename(path))
        images_first = self.kind["datasets"][dataset].get("image_marks") == "first"
        records = total = 0
        images = list[tuple[str, int]]()
        for raw in iter_raw(path, dataset=dataset):
            records += 1
            self.bar.advance()
            line = int(raw.default_id.rpartition(":")[2])
            where = {"dataset": dataset, "file": path, "line": line}
            try:
                found = parse_raw(raw, dataset=dataset, images_first=images_first)
            except DataError as error:
                self._tell(faults, where | {"reason": error.reason, "problem": str(error)})
                continue
            total += len(found.images)
            images += [(name, line) for name in found.images]
            ending = f"/{found.id.replace('#', '/')}"
            if "#" in found.id and not any(f"/{name}".endswith(ending) for name in found.images):
                problem = f"the id {found.id!r} names none of the record's images {found.images}"
                self._tell(faults, where | {"reason": "wrong_id", "problem": problem})
                ids.write(f"dataset: {dataset}\nid: {json.dumps(found.id)}\n")
            if len(images) >= _AT_ONCE:
                self._link(images, where, faults)
                images = []
        self._link(images, {"dataset": dataset, "file": path}, faults)
        return records, total

    def _link(self, images: Sequence[Any], where: Mapping[str, Any], faults: IO[str]) -> None:
        """Keep where the images are that are there once, and write down the others."""
        count, offset = np.zeros(len(images), np.int64), 0
        columns = {name: np.zeros(len(images), kind) for name, kind in COLUMNS.items()}
        for place in self.places:
            names = [place.name_of(name) for name, _ in images]
            at = np.array([number for number, name in enumerate(names) if name], np.int64)
            row, found = place.index.find(digests(filter(None, names)))
            count[at] += found
            at, row = at[found > 0], row[found > 0]
            for name, values in columns.items():
                values[at] = place.index.columns[name][row]
            columns["part"][at] += np.uint32(offset)
            offset += len(place.index.parts)
        columns["high"], columns["low"] = digests(name for name, _ in images).T
        good = (count == 1) & (columns["kind"] != UNREADABLE)
        self.linked.append({name: values[good] for name, values in columns.items()})
        for number in np.flatnonzero(~good).tolist():
            (name, line), times = images[number], int(count[number])
            holders = {x for one in self.places for x in one.index.holders(one.name_of(name))}
            told = " and ".join(sorted(holders))
            reason, problem = (
                "ambiguous_image",
                f"it is there {times} times, or can't be unpacked: in {told}",
            )
            if times == 0:
                reason, problem = "missing_image", "it is in none of the archives and folders"
            self._tell(
                faults, {**where, "line": line, "image": name, "reason": reason, "problem": problem}
            )


if __name__ == "__main__":
    sys.exit(main())
