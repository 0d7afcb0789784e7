# SPDX-License-Identifier: Apache-2.0

"""OmniMedVQA's 88,996 open-access answers, scored again with page: seconds, processor time and peak memory.

Questions in the authors' layout (42 files, 5 types, 8 modalities), images that many of them share, and stored
answers of which a tenth explain themselves are made from a seed and kept. The real command runs in a process
of its own; so do two commands that should begin at once.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from printing import REPOSITORY, parser, show

QUESTIONS = 88_996
FILES = 42
IMAGES = 128
TYPES = (
    *("Modality Recognition", "Anatomy Identification", "Disease Diagnosis", "Lesion Grading"),
    "Other Biological Attributes",
)
MODALITIES = (
    *("CT(Computed Tomography)", "X-Ray", "MR (Mag-netic Resonance Imaging)", "ultrasound"),
    *(
        "Fundus Photography",
        "Dermoscopy",
        "Microscopy Images",
        "OCT (Optical Coherence Tomography)",
    ),
)
TERMS = (
    *(
        "Pneumonia",
        "Pleural effusion",
        "Cardiomegaly",
        "Melanoma",
        "Nevus",
        "Drusen",
        "Glaucoma",
        "Lung",
    ),
    *(
        "Liver",
        "Kidney",
        "Spleen",
        "Glioma",
        "Meningioma",
        "Atelectasis",
        "Nodule",
        "Normal",
        "Adenocarcinoma",
    ),
)
ANSWERS = (
    *("{0}",) * 6,
    "{0}. {1}",
    "The answer is {0}.",
    "{1}",
    "The image shows {1}, since {2} would differ.",
)


def write(folder: Path, questions: int, seed: int) -> None:
    """Write the authors' files and their images, once."""
    if (folder / "written").is_file():
        return
    from PIL import Image

    rng = random.Random(seed)
    (folder / "Images").mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        Image.effect_noise((512, 512), 64).save(folder / "Images" / f"{number}.png")
    place = folder / "QA_information" / "Open-access"
    place.mkdir(parents=True, exist_ok=True)
    for file in range(FILES):
        records = []
        for number in range(file, questions, FILES):
            options = rng.sample(TERMS, 4)
            records.append(
                {
                    "dataset": f"Set {file}",
                    "question_id": f"set{file}_{number}",
                    "question_type": TYPES[number % len(TYPES)],
                    "question": f"Which finding or organ does image {number} of this series show best?",
                    "gt_answer": options[number % 4],
                    "image_path": f"Images/{number % IMAGES}.png",
                    **{
                        f"option_{letter}": one for letter, one in zip("ABCD", options, strict=True)
                    },
                    "modality_type": MODALITIES[file % len(MODALITIES)],
                }
            )
        (place / f"Set {file}.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "written").touch()


def answer(folder: Path, out: Path, seed: int) -> None:
    """Store an answer to each question, right in about two of three, as a run of the command does."""
    if (out / "answered").is_file():
        return
    from gmai_xtuner.evaluate.answerers import World
    from gmai_xtuner.evaluate.benchmarks import Target
    from gmai_xtuner.evaluate.runner import Options, prepare
    from gmai_xtuner.evaluate.store import Answer, AnswerStore, Given, Identity

    rng = random.Random(seed)
    prepared = prepare(Target("omnimedvqa", folder), Options(out), require_images=False)
    benchmark, (asked,) = prepared
    whose = ("model", "model", {"max_new_tokens": asked.max_new_tokens}, benchmark.hashes())
    place = out / f"{benchmark.name}-{benchmark.variant}"
    store = AnswerStore(place, Identity(benchmark.name, benchmark.variant, *whose))
    store.create()
    answers = []
    for question, job in asked.jobs():
        options = question.lettered()
        letter = question.target if rng.random() < 0.6 else rng.choice("ABCD")
        other = options["A" if letter == "B" else "B"]
        text = rng.choice(ANSWERS).format(letter, options[letter], other)
        given = Given(job, text, 0.1)
        answers.append(Answer.of(given, model="model", generation={"max_new_tokens": 2048}))
    with store.writer(World().rank) as add:
        add(answers)
    (out / "answered").touch()


def command(*arguments: str) -> dict[str, Any]:
    """Run the command in a process of its own."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    code = (
        "import resource, sys; from gmai_xtuner.evaluate.__main__ import main; status = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = int(done.stderr.split()[-1]) / 2**20
    return {"seconds": seconds, "processor_s": used, "peak_gib": peak}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--questions", type=int, default=QUESTIONS)
    arguments = options.parse_args()
    folder = arguments.work_dir / f"omnimedvqa-{arguments.questions}"
    out = folder / "run"
    # in processes of their own: the memory of a process counts for those that it starts
    for make, where in ((write, (folder, arguments.questions)), (answer, (folder, out))):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(make, *where, arguments.seed).result()
    again = (
        "model",
        "--benchmark",
        "omnimedvqa",
        "--data",
        str(folder),
        "--out",
        str(out),
        "--score-only",
    )
    show(
        {
            "questions": arguments.questions,
            "scoring": [{"what": "with page", **command(*again)}],
            "compare": [{"what": "two such runs", **command("compare", str(out), str(out))}],
            "starting": [{"what": "protocols", **command("protocols")}],
        },
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
