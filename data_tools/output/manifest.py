# SPDX-License-Identifier: Apache-2.0

"""``manifest.parquet``, a row a conversation, with everything that is known of its origin; and its proof.

What isn't known is null. `verify` holds the rows against the files: every conversation and every image of
the folder by its hash, in both directions. ``croissant.json`` describes the folder in Croissant 1.1 with the
fields of its RAI extension (mlcommons.org/croissant).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from data_tools import licences
from data_tools.items import FILES, TEXT_FORMS
from data_tools.job import Job
from data_tools.output.files import CONVERSATION_FILES, HELD_OUT
from data_tools.privacy import method_of
from data_tools.store import StoredConversation
from data_tools.writers.prompts import PROMPT_VERSION
from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.files import sha256_of_file
from gmai_xtuner.core.records import iter_raw
from gmai_xtuner.core.strict_json import STRICT_JSON

NAME = "manifest.parquet"
CROISSANT = "croissant.json"
_ROWS = 5_000
_TEXT = (
    *("id", "file", "sha256", "image", "image_sha256", "form", "language", "source", "dataset"),
    *("dataset_version", "licence", "source_file", "source_sha256", "part"),
    *("deidentification_method", "writer", "model", "model_version", "review_verdict"),
)
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXT),
        ("box", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.string())),
        ("checks", pa.list_(pa.string())),
        ("deidentification_codes", pa.list_(pa.string())),
        ("prompt_version", pa.int32()),
        ("may_be_published", pa.bool_()),
    ]
)
_CHECKS = ("agreement", "modality", "side", "boxes", "figures", "leaks")
_CROISSANT = Path(__file__).with_name(CROISSANT)


class Manifest:
    """The manifest while the corpus is written into ``folder``; a context manager.

    ``images`` is the corpus folder, below which the images are.
    """

    def __init__(self, folder: Path, images: Path, job: Job) -> None:
        self._images, self._job = images, job
        self._writer = pq.ParquetWriter(folder / NAME, _SCHEMA, compression="zstd")
        self._rows: list[bytes] = []
        self._image_hash = lru_cache(maxsize=1)(
            _file_hash
        )  # an image's conversations follow each other
        self._deidentified = {source.name: method_of(source) for source in job.sources}
        sources = {source.name: source for source in job.sources}
        why_not = partial(licences.restriction, publish=True)
        self._published = cache(
            lambda name, licence: not why_not(sources[name], job.agreements, licence)
        )

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(
        self, kept: StoredConversation, line: bytes, *, held_out: bool, verdict: str | None
    ) -> None:
        """Add the row of a conversation that was written as ``line``."""
        item, record, job = kept.item, kept.record, self._job
        origin, name = record.provenance, FILES[item.form]
        shows = item.form not in TEXT_FORMS
        focus = None if item.focus is None else record.labels[item.focus]
        method, codes = self._deidentified.get(origin.source, (None, None))
        row = {
            "id": item.id,
            "file": f"{HELD_OUT}/{name}" if held_out else name,
            "sha256": hashlib.sha256(line).hexdigest(),
            "image": record.image if shows else None,
            "image_sha256": self._image_hash(self._images / record.image) if shows else None,
            "form": item.form,
            "language": item.language,
            "source": origin.source,
            "dataset": origin.dataset,
            "licence": origin.licence,
            "source_file": origin.file,
            "source_sha256": origin.sha256,
            "part": json.dumps(dict(origin.part)) if origin.part else None,
            "deidentification_method": method,
            "deidentification_codes": codes,
            "writer": job.writer.name if kept.prompt else "template",
            "model": getattr(job.writer, "model", None) if kept.prompt else None,
            "review_verdict": verdict,
            "box": None if focus is None or focus.box is None else list(focus.box),
            "labels": list(record.names if focus is None else (focus.name,)),
            "checks": [check for check in _CHECKS if getattr(job.checks, check)],
            "prompt_version": PROMPT_VERSION if kept.prompt else None,
            "may_be_published": self._published(origin.source, origin.licence),
        }
        self._rows.append(msgspec.json.encode(row))
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:  # pa.array would load pandas for them, 40 MiB
            text = b"\n".join(self._rows)
            form = pyarrow.json.ParseOptions(explicit_schema=_SCHEMA)
            read = pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1)
            self._writer.write_table(pyarrow.json.read_json(io.BytesIO(text), read, form))
            self._rows.clear()


def verify(folder: Path) -> tuple[dict[str, int], Iterator[str]]:
    """Hold the manifest against the conversations and images of a corpus, in both directions.

    Returns the number of conversations and images that the manifest names, and every difference. A
    `CorpusError` if there is no manifest, or it can't be read.
    """
    if not (folder / NAME).is_file():
        raise CorpusError(
            f"{folder} has no {NAME}: it is no corpus, or one of an older version. Run its job again"
        )
    conversations: dict[bytes, bytes] = {}
    images: dict[str, str] = {}
    problems: list[str] = []
    try:
        metadata = pq.read_metadata(folder / NAME)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise CorpusError(f"{folder / NAME}: not a readable Parquet file ({error})") from error
    empty = metadata.num_rows == 0
    if lacking := set(_SCHEMA.names) - set(metadata.schema.to_arrow_schema().names):
        raise CorpusError(f"{folder / NAME} lacks the columns {', '.join(sorted(lacking))}")
    for raw in () if empty else iter_raw(folder / NAME, columns=None):
        row: Any = raw.decode()
        key = _key(row["file"], row["id"])
        if key in conversations:
            problems.append(f"{NAME}: {row['file']} {row['id']} has two rows")
        conversations[key] = bytes.fromhex(row["sha256"])
        image, digest = row["image"], row["image_sha256"]
        if image is not None and images.setdefault(image, digest) != digest:
            problems.append(f"{NAME}: {row['image']} has two hashes")
    counts = {"conversations": len(conversations), "images": len(images)}
    return counts, _differences(folder, conversations, images, problems)


def _differences(
    folder: Path, conversations: dict[bytes, bytes], images: dict[str, str], problems: list[str]
) -> Iterator[str]:
    yield from problems
    for name in (*CONVERSATION_FILES, *(f"{HELD_OUT}/{name}" for name in CONVERSATION_FILES)):
        for place, line in _lines(folder / name):
            try:
                identity = str(STRICT_JSON.decode(line.decode())["id"])
            except (ValueError, TypeError, KeyError):
                yield f"{name}:{place}: no conversation"
                continue
            digest = conversations.pop(_key(name, identity), None)
            if digest is None:
                yield f"{name}:{place}: {identity} is not in the manifest, or is there twice"
            elif digest != hashlib.sha256(line).digest():
                yield f"{name}:{place}: {identity} differs from the manifest"
    if conversations:
        # Only hashes are kept of the rows: the second reading names those that are left.
        for raw in iter_raw(folder / NAME, columns=None):
            row: Any = raw.decode()
            if _key(row["file"], row["id"]) in conversations:
                yield f"{row['file']}: {row['id']} of the manifest is missing"
    recorded = set()
    for place, line in _lines(folder / "records.jsonl"):
        try:
            recorded.add(str(STRICT_JSON.decode(line.decode())["image"]))
        except (ValueError, TypeError, KeyError):
            yield f"records.jsonl:{place}: no record"
    for root, _, files in os.walk(folder / "images"):
        for file in files:
            name = (Path(root) / file).relative_to(folder).as_posix()
            known = images.pop(name, None)
            if known is None and name not in recorded:
                yield f"{name}: neither in the manifest nor in records.jsonl"
            elif known is not None and known != _file_hash(folder / name):
                yield f"{name}: differs from the manifest"
            recorded.discard(name)
    for name in sorted(images.keys() | recorded):
        yield f"{name}: missing"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line of a file; of none that isn't there."""
    if path.is_file():
        with path.open("rb") as lines:
            yield from ((number, line.rstrip(b"\n")) for number, line in enumerate(lines, 1))


def _key(file: str, identity: str) -> bytes:
    text = f"{file}\0{identity}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def _file_hash(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise CorpusError(f"{path}: a stored image can't be read ({error})") from error


def write_croissant(folder: Path, summary: dict[str, Any], job: Job) -> None:
    """Write ``croissant.json``, after all files that it names."""
    methods = {s.name: method_of(s)[0] for s in job.sources if s.name in summary["sources"]}
    digests = {name: file["sha256"] for name, file in summary["files"].items()}
    digests[NAME] = _file_hash(folder / NAME)
    closed = [name for name, source in summary["sources"].items() if source["not_published"]]
    values = json.loads(_CROISSANT.read_text(encoding="utf-8"))
    values["name"] = summary["title"]
    values["description"] = (
        f"{summary['conversations']['count']} conversations about {summary['records']['pictures']} medical "
        "images, made from experts' annotations."
    )
    values["license"] = sorted({row["licence"] for row in summary["licences"]})
    values["distribution"] = [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "encodingFormat": "application/x-parquet" if name == NAME else "application/jsonlines",
            "sha256": digest,
        }
        for name, digest in digests.items()
    ]
    datasets = (source["dataset"] for source in summary["sources"].values())
    values["rai:dataCollection"] += "; ".join(datasets)
    if summary["writer"]["name"] != "template":
        told = values["rai:dataAnnotationProtocol"]
        by_model = told.replace("were made", "were written by a model or made")
        values["rai:dataAnnotationProtocol"] = by_model
    each = (f"{name}: {method}." for name, method in sorted(methods.items()))
    values["rai:personalSensitiveInformation"] += " ".join(each)
    if closed:
        values["rai:personalSensitiveInformation"] += f" May not be published: {', '.join(closed)}."
    text = json.dumps(values, ensure_ascii=False, indent=1)
    (folder / CROISSANT).write_text(f"{text}\n", encoding="utf-8")
