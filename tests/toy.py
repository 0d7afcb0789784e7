# SPDX-License-Identifier: Apache-2.0

"""Small corpora for the tests: a few conversations, synthetic pictures and a mixture file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from gmai_xtuner.core.mixture import DatasetEntry, load_mixture


def record(identifier: str, *texts: str, image: str | list[str] | None = None) -> dict[str, Any]:
    """A record in LLaVA form; ``texts`` are the human's, the model's, the human's, ..."""
    turns = [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]
    return {"id": identifier, "image": image, "conversations": turns}


@dataclass(frozen=True)
class Corpus:
    """A folder with ``mixture.yaml``, one ``<name>.jsonl`` a dataset, and ``images/``."""

    folder: Path

    @property
    def mixture(self) -> Path:
        return self.folder / "mixture.yaml"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def annotations(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def entry(self, name: str) -> DatasetEntry:
        return next(entry for entry in load_mixture(self.mixture).entries if entry.name == name)


def write_corpus(
    folder: Path,
    datasets: Mapping[str, Sequence[dict[str, Any] | bytes]],
    *,
    images: Sequence[str] = (),
    fields: Mapping[str, Mapping[str, Any]] | None = None,
) -> Corpus:
    """Write a corpus.

    Args:
        folder: is made.
        datasets: name -> records; bytes are written as a line as they are.
        images: names of pictures to draw, 40 x 30 noise by default; the suffix says the format.
        fields: name -> further fields of the dataset in the mixture file.
    """
    corpus = Corpus(folder)
    corpus.images.mkdir(parents=True)
    for number, name in enumerate(images):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(corpus.images / name)
    entries = {}
    for name, records in datasets.items():
        lines = [
            line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
            for line in records
        ]
        corpus.annotations(name).write_bytes(b"\n".join(lines) + b"\n")
        entries[name] = {
            "annotations": f"{name}.jsonl",
            "image_root": "images",
            **((fields or {}).get(name, {})),
        }
    corpus.mixture.write_text(yaml.safe_dump({"datasets": entries}, sort_keys=False))
    return corpus
