"""What all that answer have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.core.imaging.images import decode_rgb, open_rgb
from gmai_xtuner.evaluate.questions import ImageSource, load_image


@dataclass(frozen=True, slots=True)
class Job:
    """One question that is to be asked.

    Args:
        id: of the question.
        prompt: what is asked; without ``<image>`` marks the images come first.
        images: files, bytes of files, or images inside another file.
        max_new_tokens: length of the answer at the most.
        protocol: ``name/version`` of the protocol that asks.
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...]
    max_new_tokens: int
    protocol: str


@dataclass(frozen=True, slots=True)
class Given:
    """What became of a job.

    Args:
        job: the job.
        text: the answer in full; None if there is none.
        seconds: the job's share of the time of its batch, or of its request.
        problem: short stable key where there is no answer, e.g. ``"damaged_image"``.
        detail: what went wrong, with the file or the server's words.
    """

    job: Job
    text: str | None
    seconds: float = 0.0
    problem: str = ""
    detail: str = ""


class Answerer(Protocol):
    """Something that answers.

    Attributes:
        name: as tables call it.
        model: its hash.
        generation: what decides an answer besides prompt and ``max_new_tokens``.
    """

    name: str
    model: str
    generation: Mapping[str, Any]

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        """Answers as they come, in any order, each once; of this process's share of the jobs.

        Raises:
            EvaluationError: it can't go on; what was yielded before stands.
        """
        ...


def sorted_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The longest first: jobs of one batch are alike, and what doesn't fit into memory shows at once."""
    return sorted(jobs, key=lambda job: (-len(job.images), -len(job.prompt), job.id))


def batches_of(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Batches of jobs with equally many images and the same longest answer."""
    batches: list[list[Job]] = []
    for job in sorted(sorted_jobs(jobs), key=lambda job: (-len(job.images), -job.max_new_tokens)):
        last = batches[-1] if batches else []
        alike = last and (len(last[0].images), last[0].max_new_tokens) == (
            len(job.images),
            job.max_new_tokens,
        )
        if alike and len(last) < size:
            last.append(job)
        else:
            batches.append([job])
    return batches


def open_picture(source: ImageSource, name: str) -> Image.Image:
    """A question's picture as training reads one.

    Raises:
        ImageError: as :func:`gmai_xtuner.core.imaging.images.open_rgb`.
    """
    content = load_image(source)
    return decode_rgb(content, name) if isinstance(content, bytes) else open_rgb(content)


def split_at_images(prompt: str, number: int) -> list[str | None]:
    """Texts and, as None, images in their order; without marks the images come first.

    Raises:
        ValueError: marks and images differ in number.
    """
    marks = prompt.count(IMAGE_TOKEN)
    if not marks:
        return [*[None] * number, prompt]
    if marks != number:
        raise ValueError(f"{marks} {IMAGE_TOKEN} marks in the prompt, but {number} images")
    parts: list[str | None] = []
    for position, text in enumerate(prompt.split(IMAGE_TOKEN)):
        if position:
            parts.append(None)
        if text.strip():
            parts.append(text.strip("\n"))
    return parts
