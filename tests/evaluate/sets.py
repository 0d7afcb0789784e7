"""Tiny benchmarks in their authors' formats, and stand-ins for the model that answers them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gmai_xtuner.evaluate.store import Given, Job

TYPES = (
    "Modality Recognition",
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Other Biological Attributes",
)
SUFFIX = {
    "vqa_rad": ("VQA-RAD", "VQA_RAD Dataset Public.json"),
    "omnimedvqa": ("OmniMedVQA",),
    "pmc_vqa": ("PMC-VQA",),
}


def draw(file: Path, seed: int) -> None:
    """A small picture of noise; the suffix says the format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def write_vqa_rad(folder: Path, *, questions: int = 6) -> Path:
    """``questions`` of the test part, every second closed, and one of the training part."""
    records = []
    for number in range(questions):
        closed = number % 2 == 0
        draw(folder / "VQA_RAD Image Folder" / f"synpic{number // 2}.jpg", number)
        records.append(
            {
                "qid": number,
                "phrase_type": "test_freeform" if number < 4 else "test_para",
                "image_name": f"synpic{number // 2}.jpg",
                "image_organ": ("CHEST", "HEAD", "ABD")[number % 3],
                "question": f"Is finding {number} there?" if closed else f"What is at {number}?",
                "question_type": "PRES" if closed else "POS",
                "answer": ("Yes", "No")[number // 2 % 2] if closed else "left lung",
                "answer_type": "CLOSED " if closed else "OPEN",
            }
        )
    records.append({**records[0], "qid": 99, "phrase_type": "freeform"})
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(records))
    return folder


def write_omnimedvqa(folder: Path, *, each: int = 2) -> Path:
    """``each`` questions of each of the five types, in two files; the gold option goes round."""
    for part, modality in enumerate(("CT", "X-Ray")):
        records = []
        for number in range(each * len(TYPES)):
            if number % 2 != part:
                continue
            image = f"Images/{modality}/{number}.png"
            draw(folder / image, number)
            options = [f"choice {number} {letter}" for letter in "ABCD"]
            records.append(
                {
                    "dataset": modality,
                    "question_id": f"{modality}_{number:03d}",
                    "question_type": TYPES[number % len(TYPES)],
                    "question": f"Which choice is number {number}?",
                    "gt_answer": options[number % 4],
                    "image_path": image,
                    **{f"option_{a}": text for a, text in zip("ABCD", options, strict=True)},
                    "modality_type": modality,
                }
            )
        file = folder / "QA_information" / "Open-access" / f"{modality}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records))
    return folder


def write_pmc_vqa(folder: Path, *, questions: int = 4) -> Path:
    """``test_clean.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    head = ["Figure_path", "Question", "Answer"]
    head += [f"Choice {letter}" for letter in "ABCD"] + ["Answer_label"]
    with (folder / "test_clean.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(head)
        for number in range(questions):
            draw(folder / "images" / f"PMC{number}.jpg", number)
            choices = [f"{letter}:thing {number}{letter}" for letter in "ABCD"]
            label = "ABCD"[number % 4]
            writer.writerow(
                [
                    f"PMC{number}.jpg",
                    f"What is figure {number}?",
                    f"thing {number}{label}",
                    *choices,
                    label,
                ]
            )
    return folder


class FakeAnswerer:
    """Answers by a function of the job.

    Args:
        say: job -> answer, or None for none.
        stop_after: raises ``KeyboardInterrupt`` after so many answers.
    """

    def __init__(
        self,
        say: Callable[[Job], str | None],
        *,
        name: str = "fake",
        model: str = "sha256:fake",
        stop_after: int | None = None,
        **generation: object,
    ) -> None:
        self.say, self.name, self.model = say, name, model
        self.generation = {"decoding": "greedy", **generation}
        self.stop_after = stop_after
        self.asked: list[str] = []

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        for job in jobs[rank::world_size]:
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(job.id)
            text = self.say(job)
            yield [Given(job, text, 0.5, *(() if text is not None else ("refused", "no")))]
