# SPDX-License-Identifier: Apache-2.0

"""Data of the ablation: real images, a public part, a generated part, held-out questions.

    python examples/ablation/data.py OUT [--images 160] [--public 80] [--questions 48]

Images and the public part are the quickstart's (see `examples/quickstart/corpus.py`): real crops; training
and held-out ones come from different regions. From the training images and what they show
`data_tools/generate.py` makes the generated part, as a user does; from the held-out ones, by the same job,
the questions. OUT gets the mixtures of the two runs: ``with.yaml``, and ``without.yaml``, a variant of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import corpus as quickstart  # noqa: E402

# What the images of a source of the quickstart show, and how they are described in a job.
SHOWN = {
    "skimage-retina": ("retina", "Fundus photography", "Ophthalmology"),
    "skimage-ihc": ("colonic tissue", "Pathology", "Laboratory Medicine and Pathology"),
    "pydicom-ct-small": ("chest", "CT", "Pulmonary Medicine"),
    "pydicom-ct-head": ("head", "CT", "Neurosurgery"),
    "pydicom-mr-abdomen": ("abdomen", "MR", "Gastroenterology and Hepatology"),
    "nibabel-mr-brain": ("brain", "MR", "Neurosurgery"),
}
GENERATED = "generated"
WITHOUT = {"base": "with.yaml", "without": [f"{GENERATED}-*"]}


class DataError(ValueError):
    """The data that were asked for can't be made."""


def job(root: Path, output: Path, *, title: str, make: dict[str, object]) -> dict[str, object]:
    """A job of ``data_tools/generate.py`` over folders ``root/<source>/<what is shown>/``."""
    sources = [
        {
            "name": name,
            "reader": "image_folder",
            "root": str((root / name).resolve()),
            "dataset": f"crops of {name}, see examples/quickstart/sources.py",
            "licence": "for examples",
            "modality": modality,
            "department": department,
            "clinical_task": "Attribute Recognition",
        }
        for name, (_, modality, department) in SHOWN.items()
        if (root / name).is_dir()
    ]
    return {
        "output": str(output.resolve()),
        "title": title,
        "workers": 1,
        "sources": sources,
        "make": {**make, "chinese": 0},
        "writer": {"name": "template"},
        "corpus": {"held_out": 0},
    }


def sort_by_label(pictures: Path, labelled: Path) -> int:
    """Copy crops to ``labelled/<source>/<what is shown>/``, as a labelled set lies on a disk; how many."""
    count = 0
    for picture in sorted(pictures.rglob("*.png")):
        source = picture.stem.rpartition("-")[0]
        target = labelled / source / SHOWN[source][0] / picture.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
        count += 1
    return count


def generate(job_file: Path, content: dict[str, object]) -> None:
    """Run the corpus builder as its command.

    Raises:
        DataError: it fails; with what it said.
    """
    job_file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(ROOT / "data_tools" / "generate.py"), str(job_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")


def as_slake(questions: Path, target: Path) -> int:
    """Single-turn conversations of a corpus folder as a question file in SLAKE's form; how many.

    ``target/test.json`` with images ``target/imgs/...``, which ``gmai_xtuner.evaluate`` reads. An answer of
    yes or no is CLOSED, any other OPEN.
    """
    rows = []
    for line in (questions / "percept.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        asked, answered = (turn["value"] for turn in record["conversations"][:2])
        closed = answered.strip().rstrip(".").casefold() in ("yes", "no")
        picture = target / "imgs" / record["image"]
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(questions / record["image"], picture)
        rows.append(
            {
                "img_id": len(rows),
                "img_name": record["image"],
                "question": asked.replace("<image>", "").strip(),
                "answer": answered,
                "q_lang": "en",
                "location": "",
                "modality": "",
                "answer_type": "CLOSED" if closed else "OPEN",
                "base_type": "vqa",
                "triple": [],
                "qid": len(rows),
                "content_type": "Modality",
            }
        )
    (target / "test.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return len(rows)


def write(
    folder: Path, *, pictures: int, public: int, questions: int, seed: int = 0
) -> dict[str, int]:
    """Write everything below a folder that is absent or empty.

    Args:
        folder: is made.
        images: conversations of the quickstart whose images the generated part is made of.
        public: conversations of the quickstart that are trained on in both runs.
        questions: held-out ones, a multiple of 16.
        seed: of all choices.

    Raises:
        DataError, CorpusError: it can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    real = folder / "real"
    quickstart.write_corpus(real, seed=seed, train=pictures + public, heldout=questions)
    lines = (real / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "public.jsonl").write_text("".join(lines[:public]), encoding="utf-8")
    for split in ("train", "heldout"):
        sort_by_label(real / "images" / split, folder / "labelled" / split)
    # What a question can be answered from: the image. Departments and names of labels could be guessed.
    asked = {"modality": 1}
    forms: dict[str, object] = {
        "caption": 1,
        "instruction": 0,
        "dialogue": 0,
        "text_single": 0,
        "text_multi": 0,
    }
    made = {**forms, "perception": 1, "perception_kinds": asked}
    generate(
        folder / "generated.yaml",
        job(folder / "labelled" / "train", folder / GENERATED, title=GENERATED, make=made),
    )
    generate(
        folder / "questions.yaml",
        job(
            folder / "labelled" / "heldout",
            folder / "questions",
            title="questions",
            make={**made, "caption": 0},
        ),
    )
    count = as_slake(folder / "questions", folder / "benchmark")
    mixture = {
        "base": f"{GENERATED}/mixture.yaml",
        "datasets": {
            "public": {
                "annotations": "public.jsonl",
                "image_root": "real/images",
                "category": "Medical Instruction",
                "quality": "high",
            }
        },
    }
    for name, content in (("with", mixture), ("without", WITHOUT)):
        text = yaml.safe_dump(content, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    generated = sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for path in (folder / GENERATED).glob("*.jsonl")
        if path.name in ("caption.jsonl", "percept.jsonl")
    )
    return {"public": public, "generated": generated, "questions": count}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the data of the ablation.")
    parser.add_argument("out", type=Path, help="folder, absent or empty")
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--public", type=int, default=80)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        found = write(
            options.out,
            pictures=options.pictures,
            public=options.public,
            questions=options.questions,
            seed=options.seed,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{count} {name}" for name, count in found.items()), "in", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
