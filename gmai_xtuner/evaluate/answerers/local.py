# SPDX-License-Identifier: Apache-2.0

"""Models in this process: batched answers of our own exports and of transformers' image-text models."""

from __future__ import annotations

import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import LogitsProcessorList

from gmai_xtuner.checkpoint.layouts import SETTINGS_FILE, is_xtuner_layout
from gmai_xtuner.checkpoint.weights import adapter_base
from gmai_xtuner.core.errors import EvaluationError, ImageError, ModelLoadError
from gmai_xtuner.core.hub import layout_of, pickle_allowed, read_json
from gmai_xtuner.evaluate.answerers import Answerer, ModelOptions, hash_files
from gmai_xtuner.evaluate.questions import open_image
from gmai_xtuner.evaluate.store import Given, Job, sorted_jobs, split_at_images
from gmai_xtuner.generate import Answered, FirstTokens, Predictor, Prompt, user_turn

log = logging.getLogger(__name__)
Images = list[Image.Image]
_READERS = 4
_FIRST_FAILED = 8
NESTED = ("Idefics", "SmolVLM", "Mllama", "Pixtral", "Gemma3", "Aya", "Llama4")
"""Beginnings of the processors that take a list of images for each text; others take one list for all."""


def batches_of(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Group jobs into batches with equally many images and the same longest answer."""

    def kind(job: Job) -> tuple[int, int]:
        return -len(job.images), -job.max_new_tokens

    ordered = sorted(sorted_jobs(jobs), key=kind)
    alike = [list(group) for _, group in itertools.groupby(ordered, kind)]
    return [group[i : i + size] for group in alike for i in range(0, len(group), size)]


def read_ahead(
    batches: Sequence[Sequence[Job]], *, readers: int = _READERS
) -> Iterator[tuple[Sequence[Job], list[Images | ImageError]]]:
    """Yield each batch with its images, or why they can't be read; the next batch's are read meanwhile."""
    with ThreadPoolExecutor(readers, "images") as pool:
        coming = [[pool.submit(_open_images, job) for job in batch] for batch in batches[:1]]
        for batch, later in itertools.zip_longest(batches, batches[1:], fillvalue=()):
            futures = coming.pop()
            coming.append([pool.submit(_open_images, job) for job in later])
            yield batch, [future.result() for future in futures]


class LocalAnswerer(ABC):
    """Asks in batches of jobs of like length, halved for good where one does not fit into the GPU.

    The next batch's images are read meanwhile.
    """

    repeats = True

    def __init__(
        self, *, name: str, model: str, generation: Mapping[str, Any], batch_size: int
    ) -> None:
        self.name, self.model, self.generation = name, model, generation
        self.batch_size = batch_size
        self._asked = self._failed = 0

    @abstractmethod
    def generate(
        self, jobs: Sequence[Job], images: Sequence[Images], max_new_tokens: int
    ) -> list[Answered]:
        """Greedy answers to jobs with equally many images."""

    def answers(
        self, jobs: Sequence[Job], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Given]]:
        mine = batches_of(jobs, self.batch_size)[rank::world_size]
        for batch, images in read_ahead(mine):
            yield self._answer(batch, images)

    def _answer(self, batch: Sequence[Job], images: Sequence[Images | ImageError]) -> list[Given]:
        start = time.monotonic()
        given: list[Given] = []
        ready: list[tuple[Job, Images]] = []
        for job, own in zip(batch, images, strict=True):
            if isinstance(own, ImageError):
                given.append(Given(job, None, 0.0, own.reason, str(own)))
            else:
                ready.append((job, own))
        found = self._texts(ready)
        share = round((time.monotonic() - start) / max(1, len(ready)), 4)
        for (job, _), one in zip(ready, found, strict=True):
            if isinstance(one, ValueError):
                self._failed += 1
                given.append(Given(job, None, 0.0, "cannot_be_asked", str(one)))
            else:
                self._asked += 1
                ended = "length" if one.is_cut else "stop"
                given.append(Given(job, one.text, share, "", "", ended, one.shares))
        if not self._asked and self._failed >= _FIRST_FAILED:
            # it is not the questions that are wrong
            raise EvaluationError(
                f"{self.name} could be asked none of the first {self._failed} questions: {given[-1].detail}"
            )
        return given

    def _texts(self, ready: Sequence[tuple[Job, Images]]) -> Sequence[Answered | ValueError]:
        """Answers; where one question can't be asked, e.g. since it is too long, the others still are."""
        if not ready:
            return []
        try:
            return self._generate(ready)
        except ValueError as error:
            if len(ready) == 1:
                return [error]
            return [text for one in ready for text in self._texts([one])]

    def _generate(self, ready: Sequence[tuple[Job, Images]]) -> list[Answered]:
        found: list[Answered] = []
        while len(found) < len(ready):
            part = ready[len(found) : len(found) + self.batch_size]
            jobs, images = zip(*part, strict=True)
            try:
                found += self.generate(jobs, images, jobs[0].max_new_tokens)
            except torch.cuda.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.batch_size = len(part) // 2
                torch.cuda.empty_cache()
                log.warning(
                    "%d questions at once do not fit into the GPU's memory: %d from here on",
                    *(len(part), self.batch_size),
                )
        return found


def _open_images(job: Job) -> Images | ImageError:
    try:
        places = enumerate(job.images, 1)
        return [open_image(source, f"image {n} of question {job.id}") for n, source in places]
    except ImageError as error:
        return error


class ExportAnswerer(LocalAnswerer):
    """Asks an export of this project with the template and the image path of training."""

    def __init__(self, predictor: Predictor, *, name: str, model: str, batch_size: int) -> None:
        dtype = next(predictor.model.parameters()).dtype
        generation = {"decoding": "greedy", "precision": str(dtype).removeprefix("torch.")}
        super().__init__(name=name, model=model, generation=generation, batch_size=batch_size)
        self.predictor = predictor

    def generate(
        self, jobs: Sequence[Job], images: Sequence[Images], max_new_tokens: int
    ) -> list[Answered]:
        pairs = zip(jobs, images, strict=True)
        prompts = [Prompt((user_turn(job.prompt, len(own)),), tuple(own)) for job, own in pairs]
        labels = [job.labels for job in jobs]
        return self.predictor.answer_batch(prompts, max_new_tokens=max_new_tokens, labels=labels)


class HubAnswerer(LocalAnswerer):
    """Asks a transformers model by its own processor and chat template; a ``ModelLoadError`` without one.

    It pads on the left, so that a batch answers as its questions do alone.
    """

    def __init__(
        self, model: Any, processor: Any, *, name: str, digest: str, batch_size: int
    ) -> None:
        tokenizer = processor.tokenizer
        if not (processor.chat_template or tokenizer.chat_template):
            raise ModelLoadError(
                f"{name!r} has no chat template, so how it wants to be asked is not known. Put one into "
                "chat_template.json beside its processor"
            )
        generation = {
            "decoding": "greedy",
            "precision": str(model.dtype).removeprefix("torch."),
            "processor": type(processor).__name__,
        }
        super().__init__(name=name, model=digest, generation=generation, batch_size=batch_size)
        self._model, self._processor = model.eval(), processor
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._nested = type(processor).__name__.startswith(NESTED)

    @torch.no_grad()
    def generate(
        self, jobs: Sequence[Job], images: Sequence[Images], max_new_tokens: int
    ) -> list[Answered]:
        contents = (_content(job.prompt, len(own)) for job, own in zip(jobs, images, strict=True))
        turns = ([{"role": "user", "content": content}] for content in contents)
        ask, tokenizer = self._processor.apply_chat_template, self._processor.tokenizer
        texts = [ask(turn, add_generation_prompt=True) for turn in turns]
        pixels: list[Any] | None = [list(own) for own in images] if images[0] else None
        if pixels and not self._nested:
            pixels = list(itertools.chain.from_iterable(pixels))
        inputs = self._processor(text=texts, images=pixels, padding=True, return_tensors="pt")
        inputs = inputs.to(self._model.device)
        for key, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[key] = value.to(self._model.dtype)
        first = FirstTokens(tokenizer)
        output = self._model.generate(
            **inputs,
            logits_processor=LogitsProcessorList([first]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **dict.fromkeys(("temperature", "top_p", "top_k")),
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        stop = self._model.generation_config.eos_token_id
        stops = set(stop) if isinstance(stop, list) else {stop}
        found = []
        for row, (job, ids) in enumerate(zip(jobs, new, strict=True)):
            is_cut = len(ids) >= max_new_tokens and not stops & set(ids.tolist())
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            found.append(Answered(text, is_cut, first.shares(row, job.labels)))
        return found


def _content(prompt: str, number: int) -> list[dict[str, str]]:
    parts = split_at_images(prompt, number)
    return [{"type": "image"} if one is None else {"type": "text", "text": one} for one in parts]


def load_local(options: ModelOptions, *, cache: Path, local_rank: int = 0) -> Answerer:
    """Load an export of ours, or a model of transformers; no code that comes with either is run.

    Arguments and errors as of :func:`~gmai_xtuner.evaluate.answerers.make_answerer`.
    """
    default = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    device = torch.device(options.device or default)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    folder = Path(options.model)
    looks_ours = (folder / "projector").is_dir() or (folder / SETTINGS_FILE).is_file()
    if options.loader == "ours" or (options.loader == "auto" and looks_ours):
        return _load_export(options, dtype, device, cache)
    if options.llm or options.vision:
        told = f"--llm and --vision belong to exports of this project; {options.model!r} is none"
        raise EvaluationError(told)
    return _load_from_hub(options, dtype, device, cache)


def _load_export(
    options: ModelOptions, dtype: torch.dtype | None, device: torch.device, cache: Path
) -> ExportAnswerer:
    """Load an export, and hash everything that it was loaded from."""
    from gmai_xtuner.loading import load_model

    folder, llm, vision = Path(options.model), options.llm, options.vision
    predictor = load_model(folder, llm=llm, vision=vision, dtype=dtype, device=device)
    bases = bases_of(folder, llm, vision)
    parts = {"model": folder} | {part: local_folder(base) for part, base in bases.items()}
    model, size = hash_files(parts, cache=cache), options.batch_size
    return ExportAnswerer(predictor, name=options.shown, model=model, batch_size=size)


_CANT_LOAD = (
    *(OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, RuntimeError),
    SafetensorError,
)
"""What transformers raises for a folder that is no model, or a damaged one."""


def _load_from_hub(
    options: ModelOptions, dtype: torch.dtype | None, device: torch.device, cache: Path
) -> HubAnswerer:
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = options.model
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    safe: dict[str, Any] = {
        "trust_remote_code": False
    }  # without it transformers would ask the user
    try:
        processor = AutoProcessor.from_pretrained(name, **safe)
        safe["use_safetensors"] = None if pickle_allowed() else True
        model = AutoModelForImageTextToText.from_pretrained(name, torch_dtype=dtype, **safe)
    except _CANT_LOAD as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelLoadError(
            f"{name!r} is neither an export of this project nor an image-text model that transformers "
            f"{transformers.__version__} loads ({why}). A newer model is served "
            f"in an environment of its own (vllm serve {name}) and asked by --endpoint "
            "http://localhost:8000/v1; don't upgrade transformers here, xtuner needs this version"
        ) from error
    digest, size = hash_files({"model": local_folder(name)}, cache=cache), options.batch_size
    model = model.to(device)
    return HubAnswerer(model, processor, name=options.shown, digest=digest, batch_size=size)


def bases_of(folder: Path, llm: str | None, vision: str | None) -> dict[str, str]:
    """Return the bases outside an export that it is loaded from, named by the caller or by its own files.

    An adapter names its base, a folder in LLaVA's layout its vision tower.
    """
    found = {"llm": llm, "vision": vision}
    if is_xtuner_layout(folder):
        for part, name in (("llm", "llm_adapter"), ("vision", "visual_encoder_adapter")):
            if found[part] is None and (folder / name).is_dir():
                found[part] = adapter_base(folder / name)
    else:
        config = read_json(folder / "config.json")
        if layout_of(config) != "plain":
            found["vision"] = vision or config.get("mm_vision_tower")
    return {part: base for part, base in found.items() if base}


def local_folder(name: str) -> Path:
    """Return where the files of a folder, or of a hub name that has just been loaded, lie."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True))
