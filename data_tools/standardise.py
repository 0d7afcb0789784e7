# SPDX-License-Identifier: Apache-2.0

"""One unit of a source -> standard records, with every sample that is left out under its reason."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_tools import readers
from data_tools.lexicon import SIDE_KEYS, SIDES, bounds_nothing, contradicts, words_of
from data_tools.licences import Terms
from data_tools.preprocess.burned_in import BURNED_IN, NOTE, find_text, without_edges
from data_tools.preprocess.clean import clean_annotations
from data_tools.preprocess.images import read_pixels, store_image
from data_tools.privacy import Names, salted, texts_in
from data_tools.readers import SourceOptions
from data_tools.readers.files import UNKNOWN, listed
from data_tools.records import (
    ANYTHING,
    Annotation,
    Box,
    Drop,
    Drops,
    Label,
    Provenance,
    Record,
    Sample,
    Unit,
)
from data_tools.store import StoredRecord, encode
from data_tools.taxonomy import Taxonomy
from gmai_xtuner.core.archives import locate
from gmai_xtuner.core.errors import CorpusError, Unusable, is_unicode
from gmai_xtuner.core.files import sha256_of_file

VERSION = 6
"""A new number makes finished jobs read their sources again."""

IMAGES = "images"
CLASSIFICATION = "2D classification"
_DIMENSION_AND_TASK = {
    "2D classification": ("2d", "cls"),
    "2D detection": ("2d", "det"),
    "2D segmentation": ("2d", "seg"),
    "3D segmentation": ("3d", "seg"),
}


@dataclass(frozen=True, slots=True)
class UnitResult:
    """The outcome of reading a unit, in the order in which it was read.

    ``samples`` counts images and annotations that the reader gave or dropped. ``files``, below the root, are
    what samples come from, have their own names: `Names.sealed` before they are kept. ``fingerprint``
    changes if a file of the unit does, ``regions`` counts labels with a box.
    """

    drops: tuple[Drop, ...] = ()
    samples: int = 0
    files: tuple[str, ...] = ()
    fingerprint: bytes = b""
    stored: tuple[StoredRecord, ...] = ()
    regions: int = 0

    @classmethod
    def of(cls, records: Sequence[Record], **other: Any) -> UnitResult:
        """Return the result with these records."""
        stored = tuple(StoredRecord(r.id, encode(r), duplicate_key(r), r.image) for r in records)
        regions = sum(label.box is not None for record in records for label in record.labels)
        return cls(stored=stored, regions=regions, **other)

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(one.record for one in self.stored)


def read_unit(
    source: SourceOptions,
    unit: Unit,
    *,
    folder: Path,
    taxonomy: Taxonomy,
    terms: Terms | None = None,
    names: Names | None = None,
) -> UnitResult:
    """Read a unit, clean its annotations, store its images below ``folder``, the corpus, make its records.

    ``terms`` hold for samples under a licence of their own; ``names`` are the source's, if they are made.
    """
    names = names or Names(salted(source))
    records: list[Record] = []
    drops = Drops()
    samples = 0
    files: dict[str, None] = {}
    with drops.image(unit.key):
        for sample, left_out, incomplete in readers.samples(source, unit):
            drops.found += left_out
            if sample is None:
                continue
            samples += 1
            where = "#".join(filter(None, (sample.source_file, part_slug(sample.part))))
            with drops.image(where, stage="record"):
                drops.lose(*incomplete)
                if not is_unicode(sample.source_file):
                    raise Unusable("file name is not valid Unicode")
                files[sample.source_file] = None
                if sample.licence and terms and (why := terms.refusal(sample.licence, source)):
                    raise Unusable("licence of the record is not for this corpus", why)
                records.append(_record(source, sample, drops, where, folder, taxonomy, names))
    samples += sum(drop.stage == "read" for drop in drops.found)
    paths = (unit.key, *files, *texts_in(unit.payload))
    labels = {name for record in records for name in (*record.names, *record.incomplete)}
    told = names.drops(drops.found, paths, labels)
    return UnitResult.of(records, drops=tuple(told), samples=samples, files=tuple(files))


def _record(
    source: SourceOptions,
    sample: Sample,
    drops: Drops,
    where: str,
    folder: Path,
    taxonomy: Taxonomy,
    names: Names,
) -> Record:
    annotations = _named(source, sample, drops, where)
    modality = _modality(source, sample, taxonomy)
    group = _group(source, sample)
    if source.text_in_pixels != "keep":
        sample, annotations = _without_text(source, sample, annotations, drops, where)
    stored = store_image(sample.image, folder / IMAGES)
    if stored.turned and any(a.box is not None or a.mask is not None for a in annotations):
        raise Unusable(
            "picture with regions is rotated by EXIF",
            "whether boxes and masks are those of the upright picture can't be known",
        )
    sha256 = _sha256(source, sample)
    incomplete = _names(source, drops.incomplete)
    with drops.image(where) as lost:
        size = (stored.width, stored.height)
        rules = source.clean
        found = clean_annotations(annotations, size=size, rules=rules, drops=drops, where=where)
        labels = _distinct(found)
        incomplete |= lost
    if not labels:
        raise Unusable("no label left by the rules")
    task, clinical = source.source_task or _task(source, sample, labels), source.clinical_task
    attributes = dict(sample.attributes) | dict(source.attributes)
    sides = {attributes.get(key, "").lower() for key in SIDE_KEYS}.intersection(SIDES)
    _check_contradictions(source, labels, incomplete, sides)
    for text in (group, *attributes, *map(str, (*attributes.values(), *sample.part.values()))):
        if not is_unicode(text):
            raise Unusable("text that no UTF-8 can hold", ascii(text))
    part = {key: names.text(v) if isinstance(v, str) else v for key, v in sample.part.items()}
    file = names.file(sample.source_file)
    return Record(
        id=_id(source, file, part, modality, task),
        image=f"{IMAGES}/{stored.path}",
        width=stored.width,
        height=stored.height,
        modality=modality,
        department=taxonomy.find("departments", source.department or "None"),
        clinical_task=taxonomy.find("clinical_tasks", clinical) if clinical else None,
        source_task=task,
        labels=tuple(labels),
        attributes=attributes,
        provenance=Provenance(
            source=source.name,
            dataset=source.dataset or source.name,
            licence=sample.licence or source.licence,
            url=source.url,
            file=file,
            sha256=sha256,
            part=part,
            group=f"{source.name}/{names.group(group)}",
            preprocessing={key: names.text(text) for key, text in sample.preprocessing.items()},
        ),
        incomplete=_told(source, incomplete),
        examined=_told(source, _names(source, sample.examined)),
    )


def _named(source: SourceOptions, sample: Sample, drops: Drops, where: str) -> list[Annotation]:
    """Return the annotations with the corpus' names for labels; those that the job doesn't name are lost."""
    if not sample.annotations:
        raise Unusable("no label")
    labels = None if source.labels is None else {k.strip(): v for k, v in source.labels.items()}
    named = []
    unknown: dict[str, None] = {}
    codes: dict[str, set[str]] = defaultdict(set)
    for annotation in sample.annotations:
        label = code = annotation.label.strip()
        if labels is not None and code not in labels:
            unknown[code] = None
            continue
        if labels is not None:
            label = (labels[code] or "").strip()
            if labels[code] is None:
                raise Unusable("unclear label", f"{code!r} is null in the job's `labels`")
        if not label:
            raise Unusable("no label", "its name is empty")
        texts = (label, *annotation.attributes, *annotation.attributes.values())
        if not all(map(is_unicode, texts)):
            raise Unusable("label that no UTF-8 can hold", ascii(label))
        codes[label].add(code)
        named.append(replace(annotation, label=label))
    if not source.masks_are_objects:
        named = _merged(named, {label for label, of in codes.items() if len(of) > 1})
    if unknown:
        detail = f"{listed(list(unknown), at_most=200)} not in the job's `labels`"
        if not named:
            raise Unusable(UNKNOWN, detail)
        drops.add(UNKNOWN, where, detail, lost=unknown, stage="record")
    return named


def _without_text(
    source: SourceOptions, sample: Sample, annotations: list[Annotation], drops: Drops, where: str
) -> tuple[Sample, list[Annotation]]:
    """Look for text in the pixels, and do what ``text_in_pixels`` says; `Unusable` if the image falls."""
    pixels, turned = sample.image, False
    if isinstance(pixels, Path):
        pixels, turned, _ = read_pixels(pixels)
    found, note = find_text(pixels), "none found"
    if found and source.text_in_pixels == "flag":
        note = f"found in {len(found)} places"
    elif found:
        height, width = pixels.shape[:2]
        rest = without_edges(found, width, height) if source.text_in_pixels == "crop" else None
        if rest is None or turned:
            raise Unusable(BURNED_IN, f"{len(found)} places in {width} x {height}")
        x1, y1, x2, y2 = rest
        pixels, note = np.ascontiguousarray(pixels[y1:y2, x1:x2]), f"edges cut off, {rest} is left"
        if find_text(pixels):
            raise Unusable(BURNED_IN, "also beside the edges")
        cut = [_cut(annotation, rest) for annotation in annotations]
        for label in (a.label for a, left in zip(annotations, cut, strict=True) if left is None):
            drops.add("region cut off with burned-in text", where, lost=[label], stage="clean")
        sample, annotations = replace(sample, image=pixels), [one for one in cut if one is not None]
    return replace(sample, preprocessing={**sample.preprocessing, NOTE: note}), annotations


def _cut(annotation: Annotation, rest: Box) -> Annotation | None:
    """Return an annotation of the image that is cut to ``rest``; None if nothing of it is left."""
    left, top, right, bottom = rest
    if annotation.mask is not None:
        mask = annotation.mask[top:bottom, left:right]
        return replace(annotation, mask=mask) if mask.any() else None
    if annotation.box is None:
        return annotation
    x1, y1, x2, y2 = annotation.box
    box = (max(x1, left) - left, max(y1, top) - top, min(x2, right) - left, min(y2, bottom) - top)
    return replace(annotation, box=box) if box[0] < box[2] and box[1] < box[3] else None


def _merged(annotations: list[Annotation], labels: set[str]) -> list[Annotation]:
    """Make one map of what several codes of a label map are together: whole and core are one tumour."""
    found: dict[Any, Annotation] = {}
    for number, one in enumerate(annotations):
        is_map = one.label in labels and one.mask is not None and one.box is None
        key = (one.label, *sorted(one.attributes.items())) if is_map else number
        before = found[key].mask if key in found else None
        if before is not None and one.mask is not None:
            one = replace(one, mask=before | one.mask)
        found[key] = one
    return list(found.values())


def _modality(source: SourceOptions, sample: Sample, taxonomy: Taxonomy) -> str:
    """The job's word goes before the file's."""
    modality = source.modality or sample.modality
    if not modality:
        raise Unusable("no modality", "neither the job nor the file names it")
    try:
        return taxonomy.find("modalities", modality)
    except CorpusError as error:
        raise Unusable("unknown modality", str(error)) from error


def _group(source: SourceOptions, sample: Sample) -> str:
    if source.group is not None:
        match = re.search(source.group, sample.source_file)
        found = match and (match.group(1) if match.re.groups else match.group(0))
        if not found:
            raise Unusable("path without the job's `group`", f"{source.group!r} doesn't match")
        return found
    # Slices and frames of one file belong together whether or not the reader says so.
    return sample.group or sample.source_file


def _names(source: SourceOptions, labels: Iterable[str]) -> set[str]:
    """Return the corpus' names for labels of the source; those that the job doesn't name stay as they are."""
    own = source.labels
    named = (label if own is None else own.get(label, label) for label in map(str.strip, labels))
    return {name.strip() for name in named if name and name.strip()}


def _told(source: SourceOptions, names: Iterable[str]) -> tuple[str, ...]:
    """Return names for the record: one that the job's ``labels`` lack may be anything, even a person's."""
    if source.labels is not None and source.anonymous_names:
        known = {ANYTHING, *((name or "").strip() for name in source.labels.values())}
        names = {name if name in known else UNKNOWN for name in names}
    return tuple(sorted(names))


def _check_contradictions(
    source: SourceOptions, labels: list[Label], incomplete: set[str], sides: set[str]
) -> None:
    """Raise `Unusable` if a label denies or excludes another, or itself, or isn't of the image's side."""
    whole = dict.fromkeys(label.name for label in labels if label.box is None)
    for label in labels:
        if label.box is not None and bounds_nothing(label.name):
            detail = f"{label.name!r} at {list(label.box)}; give it without a box"
            raise Unusable("box that is said to show nothing", detail)
        if sides and words_of(label.name).intersection(SIDES) - sides:
            raise Unusable("labels that contradict each other", f"{label.name!r}, side {sides}")
    all_of_it = [*dict.fromkeys(label.name for label in labels), *sorted(incomplete)]
    for name in whole:
        others = [other for other in all_of_it if other != name]
        if against := next((other for other in others if contradicts(name, other)), None):
            if against == ANYTHING:
                raise Unusable("no finding in an image of which something was left out", name)
            raise Unusable("labels that contradict each other", f"{name!r} and {against!r}")
    for group in source.exclusive:
        if len(both := [name for name in whole if name in group]) > 1:
            raise Unusable("labels that contradict each other", " and ".join(map(repr, both)))


def _task(source: SourceOptions, sample: Sample, labels: list[Label]) -> str:
    """Return the task by what is said of this image: a table may hold classes or boxes."""
    default = source.default_source_task
    if all(label.box is None for label in labels):
        return CLASSIFICATION
    if default != CLASSIFICATION:
        return default
    if all(label.area is None for label in labels):
        return "2D detection"
    return "3D segmentation" if "axis" in sample.part else "2D segmentation"


def _distinct(labels: list[Label]) -> list[Label]:
    """Return the labels without repetitions of the very same finding, in their order."""
    kept: dict[Any, Label] = {}
    for label in labels:
        attributes = tuple(sorted(label.attributes.items()))
        kept.setdefault((label.name, label.box, label.area, attributes), label)
    return list(kept.values())


# --- names and hashes -----------------------------------------------------------------------------


def slug(text: str) -> str:
    """Lower case, runs of anything but letters and digits as one ``_``: ``X-ray`` -> ``x_ray``."""
    return re.sub(r"[^\w]+", "_", text.lower()).strip("_") or "_"


def part_slug(part: Mapping[str, int | str]) -> str:
    """``{"axis": "z", "slice": 40}`` -> ``z_0040``; empty without parts."""
    return "_".join(f"{v:04d}" if isinstance(v, int) else slug(v) for v in part.values())


def _id(
    source: SourceOptions, file: str, parts: Mapping[str, int | str], modality: str, task: str
) -> str:
    """Unique if a file's part is; the store makes the rest unique."""
    dimension, kind = _DIMENSION_AND_TASK[task]
    path = [part.replace("%", "%25").replace("#", "%23") for part in file.split("/")]
    names = (dimension, kind, slug(modality), source.name, *path, part_slug(parts))
    return "#".join(names[: None if parts else -1])


def duplicate_key(record: Record) -> bytes:
    """Return 16 bytes that are the same for records of the same pixels, labels, modality and attributes."""
    pixels = PurePosixPath(record.image).stem.partition("-")[0]  # see `preprocess.images`
    labels = sorted(
        json.dumps([label.name, label.box, label.area, sorted(label.attributes.items())])
        for label in record.labels
    )
    text = json.dumps([pixels, labels, record.modality, record.attributes], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _sha256(source: SourceOptions, sample: Sample) -> str:
    if sample.sha256:
        return sample.sha256
    path = source.root / sample.source_file
    try:
        if path.is_dir():
            return _folder_sha256(path, path.stat().st_mtime_ns)
        if not path.exists() and (found := locate(path)):
            return hashlib.sha256(found[0].content(found[1], sample.source_file)).hexdigest()
        return sha256_of_file(path)
    except (OSError, ValueError) as error:
        detail = getattr(error, "strerror", None) or str(error)
        raise Unusable("source file can't be read", detail) from error


@lru_cache(maxsize=64)
def _folder_sha256(path: Path, changed: int) -> str:
    """Return the hash of a folder's files, names and contents, sorted."""
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        digest.update(f"{file.name}\0".encode("utf-8", "surrogatepass"))
        digest.update(sha256_of_file(file).encode())
    return digest.hexdigest()
