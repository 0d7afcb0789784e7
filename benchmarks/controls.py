# SPDX-License-Identifier: Apache-2.0

"""The flags of `evaluate --controls`, on planted models whose fault is known: how many of each are flagged.

A benchmark of four-option questions is drawn in PMC-VQA's format; what is right stands in its images alone.
Models answer in this process by a rule and a seed, through runner, store and scorer of the command:

- honest: recognises what an image shows as often as it says (50 to 100 %), else takes another option;
- image-blind: never opens an image; from the words it guesses the right option of 60 % of the questions;
- position-biased: honest, but says "A" every third time, as sure as before;
- overconfident: honest, but 97 % sure of all that it says.
"""

from __future__ import annotations

import csv
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from printing import parser, quiet_stdout, show

from gmai_xtuner.core.rng import Rng, seed_of
from gmai_xtuner.evaluate.answerers import World
from gmai_xtuner.evaluate.controls import NONE_ABOVE
from gmai_xtuner.evaluate.questions import ImageSource, open_image
from gmai_xtuner.evaluate.runner import Options, Target, ask, prepare, score
from gmai_xtuner.evaluate.store import Given, Job

FLAGS = {
    "honest": "",
    "image-blind": "image-blind",
    "position-biased": "position-biased",
    "overconfident": "overconfident",
}
_OPTION = re.compile(r"^([A-D])\. (.+)$", re.MULTILINE)


def write_benchmark(folder: Path, questions: int, seed: int) -> Path:
    """Write questions whose image names the right option by its colour."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(questions):
        color = (number % 256, number // 256, 200)
        Image.new("RGB", (4, 4), color).save(folder / "images" / f"{number}.png")
        options = [f"finding {number}{letter}" for letter in "wxyz"]
        place = Rng(seed_of(str(number), seed)).below(4)
        options[0], options[place] = options[place], options[0]
        rows.append([f"{number}.png", f"What is in image {number}?", options[place], *options])
        rows[-1] += ["ABCD"[place]]
    head = ["Figure_path", "Question", "Answer", *(f"Choice {one}" for one in "ABCD")]
    with (folder / "test_clean.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*head, "Answer_label"], *rows])
    return folder


@cache
def shown_in(image: ImageSource) -> str:
    """Return what an image shows; a grey one shows nothing that is asked about."""
    red, green, _ = open_image(image, "image").getpixel((0, 0))
    return f"finding {red + 256 * green}w"


class Planted:
    """Answers by a rule.

    Args:
        kind: a key of ``FLAGS``.
        seed: which model of its kind.
    """

    repeats = True
    generation: Mapping[str, Any] = {}

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.name = self.model = f"{kind} {seed}"

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        yield [self._answer(job) for job in jobs]

    def _answer(self, job: Job) -> Given:
        rng = Rng(seed_of(job.id, self.seed))
        options = {text: letter for letter, text in _OPTION.findall(job.prompt)}
        sure = 0.5 + rng.share() / 2
        if self.kind == "image-blind":
            sure = 0.6
            wanted = next((text for text in options if text.endswith("w")), None)
        else:
            wanted = shown_in(job.images[0])
        wanted = wanted if wanted in options else NONE_ABOVE
        if wanted not in options:
            sure, wanted = 0.25, rng.pick(list(options))
        elif rng.share() >= sure:
            wanted = rng.pick([text for text in options if text != wanted])
        letter = options[wanted]
        if self.kind == "position-biased" and rng.share() < 1 / 3:
            letter = "A"
        sure = 0.97 if self.kind == "overconfident" else sure
        shares = dict.fromkeys(options.values(), (1 - sure) / 3) | {letter: sure}
        return Given(job, letter, probabilities=shares)


def flagged(kind: str, data: Path, models: int, seed: int) -> Counter[str]:
    """Return how many models of a kind get each flag."""
    found: Counter[str] = Counter()
    for number in range(models):
        with tempfile.TemporaryDirectory() as out:
            options = Options(Path(out), report_questions=0, controls=True)
            prepared = prepare(Target("pmc_vqa", data), options)
            answers = ask(prepared, Planted(kind, seed + number), options, world=World())
            (result,) = score(prepared, answers, options, world=World())
            found.update(flag.split(" (")[0] for flag in result.flags)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", type=int, default=100, help="of each kind")
    options.add_argument("--questions", type=int, default=200, help="of the benchmark")
    arguments = options.parse_args()
    logging.disable(logging.WARNING)
    start, rows = time.perf_counter(), []
    with quiet_stdout(), tempfile.TemporaryDirectory() as folder:
        data = write_benchmark(Path(folder) / "set", arguments.questions, arguments.seed)
        for kind in FLAGS:
            counts = flagged(kind, data, arguments.models, arguments.seed)
            rows.append({"model": kind, **{flag: counts[flag] for flag in FLAGS.values() if flag}})
    result = {
        "models": arguments.models,
        "questions": arguments.questions,
        "flagged": rows,
        "seconds": time.perf_counter() - start,
    }
    show(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
