# SPDX-License-Identifier: Apache-2.0

"""A store in memory, with the methods that the output reads, and records to fill it with."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from data_tools.checks import CheckOptions
from data_tools.items import FORMS, TEXT_FORMS, Item, Problem, Turn
from data_tools.job import OutputOptions
from data_tools.records import Drop, Label, Provenance, Record
from data_tools.store import FunnelRow, StoredConversation, Usage


@dataclass
class FakeStore:
    all_records: list[Record]
    all_accepted: list[StoredConversation]
    all_rejected: list[StoredConversation] = field(default_factory=list)
    rows: list[FunnelRow] = field(default_factory=list)
    left_out: list[tuple[str, Drop]] = field(default_factory=list)
    used: Usage = field(default_factory=Usage)

    def records(self) -> Iterator[Record]:
        return iter(self.all_records)

    def accepted(self) -> Iterator[StoredConversation]:
        return iter(self.all_accepted)

    def rejected(self) -> Iterator[StoredConversation]:
        return iter(self.all_rejected)

    def drops(self) -> Iterator[tuple[str, Drop]]:
        return iter(self.left_out)

    def funnel(self) -> list[FunnelRow]:
        return self.rows

    def usage(self) -> Usage:
        return self.used


def record(number: int = 0, *, source: str = "blood", **changes: Any) -> Record:
    """A detection record of ``source``; ``changes`` are fields of it or of its provenance."""
    values: dict[str, Any] = {
        "id": f"2d#det#microscopy#{source}#cell_{number}.png",
        "image": f"images/{number % 100:02d}/{source}_{number}.png",
        "width": 64,
        "height": 48,
        "modality": "Microscopy",
        "department": "Hematology",
        "clinical_task": "Cell Recognition",
        "source_task": "2D detection",
        "labels": (
            Label("red blood cell", (2, 3, 20, 30)),
            Label("platelet", (30, 10, 40, 20), 61, {"side": "left"}),
        ),
        "attributes": {"stain": "Wright"},
    }
    origin: dict[str, Any] = {
        "source": source,
        "dataset": "Blood Cells",
        "licence": "MIT",
        "url": "https://example.org/blood",
        "file": f"cell_{number}.png",
        "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
        "part": {},
        "group": f"{source}/cell_{number}",
    }
    for key, value in changes.items():
        (values if key in values else origin)[key] = value
    return Record(**values, provenance=Provenance(**origin))


def item(of: Record, form: str = "caption", *, language: str = "en", **changes: Any) -> Item:
    """An item with a seed that depends on its id alone."""
    name = f"{of.id}#{form}" + ("" if language == "en" else f"#{language}")
    seed = int.from_bytes(
        hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "little"
    )
    return Item(**{"id": name, "form": form, "language": language, "seed": seed} | changes)


def kept(of: Record, form: str = "caption", *, answer: str | None = None, **changes: Any):
    """An accepted conversation of a record."""
    mark = "" if form in TEXT_FORMS else "<image>\n"
    own = "" if mark else f" Of {of.provenance.file}."  # a text that others have too is left out
    text = answer or f"A {of.modality} picture that shows {', '.join(of.names)}.{own}"
    turns = [Turn("human", f"{mark}What is seen?"), Turn("gpt", text)]
    if form in ("dialogue", "text_multi"):
        turns += [Turn("human", "And how many?"), Turn("gpt", f"{len(of.labels)}.")]
    return StoredConversation(item(of, form, **changes), of, tuple(turns))


def rejected(of: Record, reason: str, *, detail: str = "", answer: str = "I can't help."):
    return StoredConversation(
        item(of, "instruction"), of, None, (Problem(reason, detail),), "Describe it.", answer
    )


def job(sources: Mapping[str, Mapping[str, Any]] | None = None, **corpus: Any) -> Any:
    """As much of a job as the output reads; ``corpus`` are its section's keys."""
    sources = sources or {"blood": {}}
    return SimpleNamespace(
        path=Path("jobs/demo.yaml"),
        title="Demo corpus",
        seed=0,
        workers=2,
        writer=SimpleNamespace(name="template", terms=""),
        make=SimpleNamespace(negatives=None),
        sources=[
            SimpleNamespace(
                **{
                    "name": name,
                    "reader": "voc",
                    "dataset": "Blood Cells",
                    "licence": "MIT",
                    "url": "https://example.org/blood",
                    "anonymous_names": False,
                    "text_in_pixels": "keep",
                    "negatives": True,
                }
                | dict(values)
            )
            for name, values in sources.items()
        ],
        corpus=OutputOptions(**corpus),
        agreements=(),
        checks=CheckOptions(),
    )


def draw(folder: Path, of: Record, *, seed: int | None = None) -> None:
    """Store a picture for a record."""
    generator = np.random.default_rng(abs(hash(of.image)) % 2**32 if seed is None else seed)
    low = generator.integers(40, 220, (of.height // 8 or 1, of.width // 8 or 1, 3), dtype=np.uint8)
    path = folder / of.image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(low).resize((of.width, of.height), Image.Resampling.BICUBIC).save(path)


def corpus(folder: Path, count: int = 40, *, source: str = "blood", **changes: Any) -> FakeStore:
    """A store with pictures of ``count`` records of one source, a conversation of every form each."""
    records = [record(number, source=source, **changes) for number in range(count)]
    for number, one in enumerate(records):
        draw(folder, one, seed=number)
    choose = random.Random(0)
    accepted = [
        kept(one, form, language=choose.choice(("en", "zh"))) for one in records for form in FORMS
    ]
    return FakeStore(
        records,
        accepted,
        rows=[FunnelRow(source, "read", "", count), FunnelRow(source, "record", "", count)],
    )
