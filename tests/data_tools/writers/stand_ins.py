# SPDX-License-Identifier: Apache-2.0

"""Prompts, checks, records and tasks as small as they can be, for tests of the request loop."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.items import Conversation, Item, Problem, SourceContext, Task, Turn
from data_tools.options import OpenAIOptions
from data_tools.records import Label, Provenance, Record
from data_tools.writers.ledger import Expense, Ledger
from data_tools.writers.openai_writer import OpenAIWriter
from data_tools.writers.prompts import Prompt
from gmai_xtuner.core.agreements import Origin

AT_MOST = 37 + 48 + 40 + 50
"""The upper bound of a request below, by hand: "Be exact." 9 bytes, "item0" 5 and the schema's 119 as JSON;
37 of them are digits and marks, the other 96 count half; 10 for each of three texts and the request; 50 for
the answer."""
CONTEXT = SourceContext("toy", "Toy", ("cell",))
ORIGINS = {("toy", "MIT"): Origin("the source toy")}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}


class Prompts:
    """The user's text is the item's id, then the reason of the attempt before. ``wrong`` answers fail."""

    def __init__(self, *, images: bool = False, box: bool = False) -> None:
        self.images, self.box = images, box

    def build(self, task: Task, *, problems: Sequence[Problem] = ()) -> Prompt:
        reasons = "".join(f" Not again: {problem.reason}." for problem in problems)
        image = task.record.image if self.images else None
        user = f"{task.item.id}{reasons}"
        return Prompt("Be exact.", user, image, self.box, SCHEMA, max_tokens=50)

    def translate(
        self, conversation: Conversation, task: Task, *, problems: Sequence[Problem] = ()
    ) -> Prompt:
        return Prompt("Translate.", f"zh {conversation[-1].text}", None, False, SCHEMA, 50)

    def read_answer(self, text: str, task: Task) -> Conversation | Problem:
        try:
            return (Turn("human", "What is it?"), Turn("gpt", json.loads(text)["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            return Problem("not the JSON that was asked for", str(error))

    def check(self, conversation: Conversation, task: Task) -> list[Problem]:
        return [Problem("bad label")] if "wrong" in conversation[-1].text else []


def record(name: str = "r", image: str = "images/0.png", size: tuple[int, int] = (8, 6)) -> Record:
    provenance = Provenance("toy", "Toy", "MIT", "", f"{name}.png", "0" * 64, {}, f"toy/{name}")
    labels = (Label("cell", (1, 1, 5, 4)),)
    return Record(
        name, image, *size, "Microscopy", "Hematology", None, "2D detection", labels, {}, provenance
    )


def tasks(count: int, *, language: str = "en", images: int = 1, start: int = 0) -> Iterator[Task]:
    for number in range(start, start + count):
        image = f"images/{number % images}.png"
        item = Item(f"item{number}", "caption", language, focus=0, seed=number)
        yield Task(item, record(f"r{number}", image), CONTEXT)


def write_images(folder: Path, count: int = 1, size: tuple[int, int] = (8, 6)) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")


def options(folder: Path, url: str, **more: Any) -> OpenAIOptions:
    values: dict[str, Any] = {
        "model": "m",
        "base_url": url,
        "key_variable": None,
        "cache": folder / "cache" / "answers.sqlite",
        "timeout": 5,
        "server_retries": 2,
        "in_flight": 8,
    }
    return OpenAIOptions(**values | more)


def writer(folder: Path, url: str, *, prompts: Any = None, **more: Any) -> OpenAIWriter:
    job = more.pop("job", "job")
    return OpenAIWriter(
        options(folder, url, **more), prompts or Prompts(), folder=folder, job=job, origins=ORIGINS
    )


def spent(folder: Path, job: str = "job") -> Expense:
    """What a job has spent over all of its runs."""
    with Ledger(folder / "cache" / "answers.sqlite", job=job) as ledger:
        return ledger.spent()
