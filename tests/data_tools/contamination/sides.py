# SPDX-License-Identifier: Apache-2.0

"""A corpus and a benchmark with known overlaps."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data_tools import overlap
from tests.toy import record


def picture(seed: int, side: int = 96) -> Image.Image:
    """Soft blobs, as much alike as medical pictures of different kinds are."""
    low = np.random.default_rng(seed).integers(0, 255, (9, 9), dtype=np.uint8)
    return Image.fromarray(low).resize((side, side), Image.Resampling.BICUBIC)


def as_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def write_corpus(folder: Path) -> Path:
    """Pictures of the seeds 0 to 5 (of the benchmark) changed in known ways, and 20 to 23 of its own."""
    images = folder / "images"
    images.mkdir(parents=True)
    picture(0).save(images / "copy.png")
    picture(0).convert("RGB").save(images / "copy_as_rgb.tif")
    picture(1).save(images / "recoded.jpg", quality=60)
    picture(2).resize((61, 61)).save(images / "smaller.png")
    picture(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / "flipped.png")
    deep = np.asarray(picture(4), dtype=np.uint16) * 257
    Image.fromarray(deep).save(images / "deep.png")
    (images / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("L", (40, 40), 7).save(images / "plain.png")
    picture(20).save(images / "synpic54610.png")
    for seed in (21, 22, 23):
        picture(seed).save(images / f"own{seed}.png")
    names = sorted(path.name for path in images.iterdir())
    write_lines(
        folder / "seen.jsonl",
        [
            record(f"see-{name}", "<image>\nWhat is shown here now?", "A blob.", image=name)
            for name in names
        ]
        + [
            record("leak", "Is there a pleural effusion <image>", "Yes.", image="copy.png"),
            record("absent", "<image>\nWhere?", "There.", image="gone.png"),
        ],
    )
    write_lines(
        folder / "told.jsonl",
        [
            record("word-for-word", "Which organ makes INSULIN?", "The pancreas."),
            record("other-answer", "Which organ makes insulin?", "The liver."),
            record("paraphrase", "Please say which organ makes insulin in humans", "The pancreas."),
            record("中文", "胰岛素由哪个器官产生？", "胰腺。"),
            record("far", "Why is the sky blue over there?", "Because."),
        ],
    )
    mixture = {
        "datasets": {
            "seen": {"annotations": "seen.jsonl", "image_root": "images"},
            "told": {"annotations": "told.jsonl"},
        }
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture, sort_keys=False))
    return folder / "mixture.yaml"


def write_benchmark(folder: Path) -> Path:
    """Eight pictures, two of which the corpus has pixel by pixel; questions, two without."""
    images = folder / "imgs"
    images.mkdir(parents=True)
    for seed in range(6):
        picture(seed).save(images / f"{seed}.png")
    picture(30).save(images / "synpic54610.png")
    Image.new("L", (40, 40), 7).save(images / "blank.png")
    asked = [
        ("0.png", "Is there a pleural effusion?", "yes"),
        *((f"{seed}.png", f"How many are in {seed}?", "2") for seed in range(1, 6)),
        ("synpic54610.png", "What is shown here now?", "x"),
        ("blank.png", "Is it blank?", "no"),
        (None, "Which organ makes insulin?", "the pancreas"),
        (None, "胰岛素，由哪个器官产生", "胰腺"),
    ]
    rows = [
        {
            "qid": number,
            "question": question,
            "answer": answer,
            **({"img_name": name} if name else {}),
        }
        for number, (name, question, answer) in enumerate(asked, 1)
    ]
    (folder / "test.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


def as_base64(image: Path) -> str:
    return base64.b64encode(image.read_bytes()).decode()


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def compare(
    corpus: Path, benchmark: Path, *options: Any, folder: Path | None = None, status: int = 0
) -> dict[str, Any]:
    """Run the command and return what ``overlap.json`` says."""
    folder = folder or benchmark.parent / "overlap"
    own = ["--output", folder, "--cache", folder.parent / "hashes.sqlite", "--workers", 1]
    assert overlap.main([str(one) for one in (corpus, benchmark, *own, *options)]) == status
    return json.loads((folder / "overlap.json").read_text(encoding="utf-8"))
