# SPDX-License-Identifier: Apache-2.0

"""The model's answer to a fixed question about a fixed image, every so many optimiser steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner
from PIL import Image

from gmai_xtuner.core.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError, ImageError
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.generate import Predictor, Prompt
from gmai_xtuner.train.benchmarks import predictor_of
from gmai_xtuner.train.hooks import ProgressHook, is_due
from gmai_xtuner.train.resume import preserved_random_state


@dataclass(frozen=True, slots=True)
class Sample:
    """A question, ready to ask: ``ids`` is the prompt with one placeholder an image."""

    name: str
    ids: np.ndarray
    images: tuple[Image.Image, ...]
    question: str
    reference: str | None


@HOOKS.register_module()
class SampleAnswerHook(Hook):
    """Writes questions, reference answers and the model's greedy answers to the log and to TensorBoard.

    The image goes there once. All ranks take part (under ZeRO-3 each holds a part of the weights); training
    does not notice: random state, gradients and mode stay. Images are opened when training starts, so a
    wrong path is found then.

    Args:
        interval: optimiser steps from one answer to the next; the run ends with one. Default 125; 0 for
            never.
        samples: each a dict with ``question``, ``image`` (a path, or several; may be left out) and,
            if known, ``answer``. Default: the first held-out conversations with an image, of different
            datasets, up to their first answer.
        count: how many of those; default 1.
        max_new_tokens: length of an answer at the most; default 64.

    Raises:
        GMAIError: a sample without a question, or with an image that can't be opened; names it.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = 125,
        *,
        samples: Sequence[Mapping[str, Any]] | None = None,
        count: int = 1,
        max_new_tokens: int = 64,
    ) -> None:
        if interval < 0 or max_new_tokens < 1:
            raise GMAIError(
                "interval must be at least 0 and max_new_tokens at least 1, got "
                f"{interval} and {max_new_tokens}"
            )
        self.interval = interval
        self.samples = samples
        self.count = count
        self.max_new_tokens = max_new_tokens

    def before_train(self, runner: FlexibleRunner) -> None:
        if not self.interval:
            return
        dataset: SoftPackedDataset = runner.train_loop.dataloader.dataset
        with preserved_random_state():
            self._predictor = predictor_of(runner.model.module, dataset)
        runner.model.train()
        self._ready = (
            _held_out_samples(dataset, self.count)
            if self.samples is None
            else [_given_sample(self._predictor, sample) for sample in self.samples]
        )
        if not self._ready:
            runner.logger.info(
                "No sample answers: no held-out conversation has an image. Name samples in "
                "default_hooks.sample_answer.samples"
            )
        for sample in self._ready:
            for number, image in enumerate(sample.images):
                runner.visualizer.add_image(
                    f"sample_answer/{sample.name}/{number}", np.asarray(image), step=runner.iter
                )

    def after_step(self, runner: FlexibleRunner) -> None:
        due = is_due(runner.train_loop.step, self.interval) or self.is_last_train_iter(runner)
        if self.interval and due and not runner.train_loop.stop_training:
            self._answer(runner)

    def _answer(self, runner: FlexibleRunner) -> None:
        progress = [hook for hook in runner.hooks if isinstance(hook, ProgressHook)]
        for hook in progress:
            hook.before_val(runner)
        runner.model.eval()
        with preserved_random_state():
            for sample in self._ready:
                (answer,) = self._predictor.answer_batch(
                    [Prompt((), sample.images, sample.ids)],
                    max_new_tokens=self.max_new_tokens,
                    synced_gpus=get_world_size() > 1,
                )
                _log_answer(runner, sample, answer.text)
        runner.model.train()
        for hook in progress:
            hook.after_val(runner)


def _log_answer(runner: FlexibleRunner, sample: Sample, answer: str) -> None:
    if not is_main_process():
        # mmengine opens a visual backend at its first use, on whatever rank that is.
        return
    known = f"\n  reference: {sample.reference}" if sample.reference is not None else ""
    text = f"  question: {sample.question}{known}\n  answer: {answer}"
    step = runner.iter + 1
    runner.logger.info(f"Sample answer at iteration {step}, {sample.name}:\n{text}")
    if says_nothing(answer) and step == runner.max_iters:
        runner.logger.warning(
            f"The last sample answer, of {sample.name}, "
            f"{'repeats itself' if answer.strip() else 'is empty'}: this model has not learnt to answer"
        )
    for backend in runner.visualizer._vis_backends.values():
        # TensorBoard's writer has it; mmengine's interface of backends knows no text.
        add_text = getattr(backend.experiment, "add_text", None)
        if add_text is not None:
            markdown = "\n\n".join(line.strip() for line in text.splitlines())
            add_text(f"sample_answer/{sample.name}", markdown, global_step=step)


def says_nothing(answer: str) -> bool:
    """Return whether an answer is empty, or holds something of 1 to 30 characters five times on end."""
    return not answer.strip() or bool(re.search(r"([^\W\d].{0,29}?)(?:\s*\1){4}", answer))


def _held_out_samples(dataset: SoftPackedDataset, count: int) -> list[Sample]:
    """The first held-out conversation with an image of each of the first ``count`` datasets that have one."""
    part = dataset.held_out_part()
    samples: dict[int, Sample] = {}
    if part is None:
        return []
    images = part.plan.counts()[:, 2]
    for number, row in part.plan.samples[images > 0].tolist():
        if number in samples or len(samples) == count:
            continue
        entry, conversation = part.entries[number], part.caches[number][row]
        start, end = conversation.label_spans[0]
        ids, name = conversation.input_ids[:start], f"{entry.name}/{conversation.id}"
        shown = conversation.images[: int((ids == IMAGE_TOKEN_INDEX).sum())]
        pictures = tuple(_open(name, Path(entry.image_root or ".") / image) for image in shown)
        answer = dataset.tokenizer.decode(
            conversation.input_ids[start:end], skip_special_tokens=True
        )
        reference = " ".join(answer.split())
        samples[number] = Sample(name, ids, pictures, _question(dataset, ids), reference)
    return list(samples.values())


def _given_sample(predictor: Predictor, sample: Mapping[str, Any]) -> Sample:
    unknown = set(sample) - {"image", "question", "answer"}
    if unknown or not sample.get("question"):
        raise GMAIError(
            "each of default_hooks.sample_answer.samples needs a question, and may have image and answer; "
            f"got {dict(sample)}"
        )
    paths = sample.get("image") or ()
    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    question = str(sample["question"])
    text = question if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * len(paths) + question
    if text.count(IMAGE_TOKEN) != len(paths):
        raise GMAIError(
            f"{text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} marks, but {len(paths)} images in the sample "
            f"{dict(sample)}"
        )
    name = Path(paths[0]).name if paths else question[:40]
    ids = predictor.encoder.encode_prompt((Turn("user", text),))
    images = tuple(_open(name, Path(path)) for path in paths)
    return Sample(name, ids, images, question, sample.get("answer"))


def _open(name: str, path: Path) -> Image.Image:
    try:
        return open_rgb(path)
    except ImageError as error:
        raise GMAIError(f"sample answer {name}: {error}") from error


def _question(dataset: SoftPackedDataset, ids: np.ndarray) -> str:
    """The words of a prompt, without what the template puts around them."""
    text = dataset.tokenizer.decode(ids[ids != IMAGE_TOKEN_INDEX])
    for around in (*dataset.template.user.split("{input}"), *dataset.tokenizer.all_special_tokens):
        text = text.replace(around.strip() or " ", " ")
    return " ".join(text.split())
