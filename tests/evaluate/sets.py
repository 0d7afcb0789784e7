# SPDX-License-Identifier: Apache-2.0

"""Tiny benchmarks in their authors' formats, and stand-ins for the model that answers them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gmai_xtuner.evaluate.store import Given, Job
from tests.evaluate.files import csv_file, json_file, omnimedvqa_record, vqa_rad_record

TYPES = (
    "Modality Recognition",
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Other Biological Attributes",
)


def draw(file: Path, seed: int) -> None:
    """Write a small image of noise; the suffix says the format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def write_vqa_rad(folder: Path, *, questions: int = 6) -> Path:
    """Write ``questions`` of the test part, every second closed, and one of the training part."""
    records = []
    for number in range(questions):
        closed, image = number % 2 == 0, f"synpic{number // 2}.jpg"
        draw(folder / "VQA_RAD Image Folder" / image, number)
        record = vqa_rad_record(
            number,
            "test_freeform" if number < 4 else "test_para",
            image_name=image,
            image_organ=("CHEST", "HEAD", "ABD")[number % 3],
            question=f"Is finding {number} there?" if closed else f"What is at {number}?",
            question_type="PRES" if closed else "POS",
            answer=("Yes", "No")[number // 2 % 2] if closed else "left lung",
            answer_type="CLOSED " if closed else "OPEN",
        )
        records.append(record)
    records.append({**records[0], "qid": 99, "phrase_type": "freeform"})
    json_file(folder / "VQA_RAD Dataset Public.json", records)
    return folder


def write_omnimedvqa(folder: Path, *, each: int = 2) -> Path:
    """Write ``each`` questions of each of the five types, in two files; the gold option goes round."""
    for part, modality in enumerate(("CT", "X-Ray")):
        records = []
        for number in range(part, each * len(TYPES), 2):
            image = f"Images/{modality}/{number}.png"
            draw(folder / image, number)
            options = {letter: f"choice {number} {letter}" for letter in "ABCD"}
            record = omnimedvqa_record(
                f"{modality}_{number:03d}",
                dataset=modality,
                question_type=TYPES[number % len(TYPES)],
                question=f"Which choice is number {number}?",
                gt_answer=options["ABCD"[number % 4]],
                image_path=image,
                modality_type=modality,
                **{f"option_{letter}": text for letter, text in options.items()},
            )
            records.append(record)
        json_file(folder / "QA_information" / "Open-access" / f"{modality}.json", records)
    return folder


def write_pmc_vqa(folder: Path, *, questions: int = 4) -> Path:
    """Write ``test_clean.csv``."""
    choices = [f"Choice {letter}" for letter in "ABCD"]
    rows = []
    for number in range(questions):
        draw(folder / "images" / f"PMC{number}.jpg", number)
        label = "ABCD"[number % 4]
        texts = [f"{letter}:thing {number}{letter}" for letter in "ABCD"]
        question, answer = f"What is figure {number}?", f"thing {number}{label}"
        rows.append([f"PMC{number}.jpg", question, answer, *texts, label])
    head = ["Figure_path", "Question", "Answer", *choices, "Answer_label"]
    csv_file(folder / "test_clean.csv", head, rows)
    return folder


class FakeAnswerer:
    """Answers by a function of the job.

    Args:
        say: job -> answer, or None for none.
        stop_after: raises ``KeyboardInterrupt`` after so many answers.
    """

    repeats = False

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
