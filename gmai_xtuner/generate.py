# SPDX-License-Identifier: Apache-2.0

"""Ask a trained model.

Shapes: ``B`` prompts asked together, ``T`` tokens of a prompt, image tokens counted, ``D`` width.
"""

from __future__ import annotations

import queue
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import all_gather_object
from PIL import Image
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer
from gmai_xtuner.model.llava import num_image_tokens

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""A token of sentencepiece that stands for a byte of a character that has no token."""

ImageLike = str | Path | Image.Image | torch.Tensor
"""A file, a picture, or what :meth:`Predictor.pixels` made of one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Turns up to where the assistant is to answer, and the images of their ``<image>`` marks, in order.

    ``ids`` in the place of turns are those of a prompt that is tokenised, with one placeholder an image.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageLike, ...] = ()
    ids: np.ndarray | None = None


class Answered(NamedTuple):
    """An answer, whether it was cut, and how likely its first token was each label (:class:`FirstTokens`)."""

    text: str
    is_cut: bool
    shares: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0, the default, takes the likeliest token; else from 1e-6 to 100.
        top_p: share of the probability that is drawn from, over 0; with a temperature only.
        seed: of the draw, 64 bits; None: another one each time.
        repetition_penalty: over 1 makes tokens that came already less likely; from 0.01 to 100.

    Raises:
        ValueError: a value with which the model can't compute: scores divided by it would be infinite.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # Written as "is within", not as "is outside": comparisons with NaN are false, so it is refused.
        ranges = {
            "temperature": ("0, or 1e-6 to 100", 1e-6 <= (self.temperature or 1) <= 100),
            "top_p": ("1e-6 to 1", 1e-6 <= self.top_p <= 1),
            "seed": ("of 64 bits", -(2**63) <= (self.seed or 0) < 2**63),
            "repetition_penalty": ("0.01 to 100", 0.01 <= self.repetition_penalty <= 100),
        }
        for name, (allowed, fits) in ranges.items():
            if not fits:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")

    def arguments(self) -> dict[str, Any]:
        """Return what ``generate`` takes."""
        draws = self.temperature > 0
        options = {"temperature": self.temperature, "top_p": self.top_p} if draws else {}
        defaults = {"temperature": None, "top_p": None, "top_k": None, "do_sample": draws}
        return defaults | options | {"repetition_penalty": self.repetition_penalty}


GREEDY = Sampling()


class PromptTooLong(GMAIError):
    """A prompt of ``length`` tokens or more leaves a model of ``limit`` positions none to answer at."""

    def __init__(self, length: int, limit: int) -> None:
        self.length, self.limit = length, limit
        super().__init__(
            f"the prompt has {length} tokens or more, images included, but the model has {limit} positions, "
            "for prompt and answer together. Give fewer images or a shorter conversation"
        )


class AnswerStream(Iterator[str]):
    """An answer in pieces, as they come; closing it stops the model after the token that it is at.

    ``prompt_tokens`` counts the prompt with its image tokens, ``new_tokens`` what the model has made so far.
    ``is_cut`` says, when all is read, that the answer ended at its greatest length, and not by itself.
    """

    def __init__(
        self, prompt_tokens: int, pieces: Callable[[AnswerStream], Generator[str, None, None]]
    ) -> None:
        self.prompt_tokens, self.new_tokens, self.is_cut = prompt_tokens, 0, False
        self._pieces = pieces(self)
        self.close = self._pieces.close

    def __next__(self) -> str:
        return next(self._pieces)


class Predictor:
    """Answers questions about images.

    What takes a prompt raises, before anything is computed, ``ValueError`` where marks and images differ in
    number and :class:`PromptTooLong` where no position is left to answer at.

    The model is on its device; template and image transform are those of training.
    """

    def __init__(
        self,
        model: GMAILLaVAModel,
        *,
        tokenizer: PreTrainedTokenizerFast,
        template: ChatTemplate,
        transform: ImageTransform,
    ) -> None:
        self.settings: dict[str, Any] = {}  # of the folder that it was loaded from
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.transform = transform
        self.encoder = ConversationTokenizer.from_pretrained(tokenizer, template)
        self._image_tokens = num_image_tokens(model.visual_encoder.config)
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        stop = tokenizer.convert_tokens_to_ids(template.suffix) if template.suffix_is_eos else None
        self.stop_ids = [i for i in (stop, tokenizer.eos_token_id) if i is not None]

    @property
    def context_length(self) -> int:
        """Positions of the model, for prompt and answer together."""
        return self.model.llm.config.max_position_embeddings

    def num_tokens(self, prompt: Prompt) -> int:
        """Return the length of a prompt, image tokens counted."""
        return self._length(self.encode(prompt))

    def answer(
        self,
        question: str,
        images: Sequence[ImageLike] = (),
        *,
        system: str | None = None,
        **options: Any,
    ) -> str:
        """Answer one question; without ``<image>`` marks the images come first, as in training.

        Options are those of :meth:`answer_batch`, here and of :meth:`generate`.
        """
        turns = (*([Turn("system", system)] if system else []), user_turn(question, len(images)))
        return self.generate(turns, images, **options)

    def generate(self, turns: Sequence[Turn], images: Sequence[ImageLike], **options: Any) -> str:
        """The assistant's next turn."""
        (found,) = self.answer_batch([Prompt(tuple(turns), tuple(images))], **options)
        return found.text

    # Not inference_mode: weights that ZeRO-3 gathers inside could not be trained afterwards.
    @torch.no_grad()
    def answer_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        labels: Sequence[Sequence[str]] = (),
        synced_gpus: bool = False,
    ) -> list[Answered]:
        """The assistant's next turn for each of ``B`` prompts, computed together.

        Shorter prompts are padded on the left, masked, and keep their own positions, so that an answer
        does not depend on its neighbours (but for rounding, which in low precision can turn a tie).

        An answer ends at the model's last position, if it comes there before ``max_new_tokens``. A prompt
        that leaves less room than that is computed apart: its end is not that of the others.

        Args:
            labels: of each prompt, how its answer may begin; see :class:`FirstTokens`.
            synced_gpus: every rank runs as many passes as the longest of them, as ZeRO-3 needs.
        """
        if not prompts:
            return []
        embeds = self._embed_all(prompts)
        answers = [Answered("", True)] * len(prompts)
        groups = list(self._by_room(embeds, max_new_tokens).items())
        if synced_gpus:
            # A rank with fewer groups than another makes a token that nobody reads.
            groups += [(1, [])] * (max(all_gather_object(len(groups))) - len(groups))
        _seed(sampling)
        for room, numbers in groups:
            first = FirstTokens(self.tokenizer)
            output = self.model.llm.generate(
                **self._padded([embeds[number] for number in numbers] or embeds[:1], room),
                **sampling.arguments(),
                logits_processor=LogitsProcessorList([first]),
                synced_gpus=synced_gpus,
            )
            for row, (number, ids) in enumerate(zip(numbers, output, strict=False)):
                is_cut = not set(self.stop_ids) & set(ids.tolist())
                shares = first.shares(row, labels[number]) if labels else None
                answers[number] = Answered(self._decode(ids), is_cut, shares)
        return answers

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageLike],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
    ) -> AnswerStream:
        """The assistant's next turn in pieces, as they come; joined, what :meth:`generate` returns."""
        embeds = self._embed_all([Prompt(tuple(turns), tuple(images))])
        (room,) = self._by_room(embeds, max_new_tokens)
        arguments = self._padded(embeds, room) | sampling.arguments()
        return AnswerStream(len(embeds[0]), partial(self._pieces, arguments, sampling))

    def _pieces(
        self, arguments: dict[str, Any], sampling: Sampling, stream: AnswerStream
    ) -> Generator[str, None, None]:
        tokens = _Tokens()

        @torch.no_grad()
        def run() -> None:
            try:
                _seed(sampling)
                criteria = StoppingCriteriaList([tokens])
                self.model.llm.generate(**arguments, stopping_criteria=criteria)
            finally:
                tokens.queue.put(None)

        given, ids = "", list[int]()
        with ThreadPoolExecutor(1) as executor:
            running = executor.submit(run)
            try:
                while (token := tokens.queue.get()) is not None:
                    ids.append(token)
                    stream.new_tokens = len(ids)
                    if _BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or ""):
                        continue  # what bytes mean is known when all that follow each other are there
                    text = self._decode(ids)
                    if len(text) > len(given) and text.startswith(given):
                        yield text[len(given) :]
                        given = text
                running.result()
                stream.is_cut = not ids or ids[-1] not in self.stop_ids
                whole = self._decode(ids)
                if len(whole) > len(given):
                    yield whole[len(given) :]
            finally:
                tokens.stopped = True

    def pixels(self, image: ImageLike) -> torch.Tensor:
        """float32 ``[3, S, S]`` on the CPU: what the model sees of an image, however large that is."""
        return image if isinstance(image, torch.Tensor) else self.transform(as_rgb(image))

    def encode(self, prompt: Prompt) -> np.ndarray:
        """int32 ids of a prompt, one placeholder an image; a text too long for any tokens isn't tokenised."""
        if prompt.ids is not None:
            return prompt.ids
        length = sum(len(turn.text) for turn in prompt.turns)
        if length > self._longest_token * self.context_length:
            raise PromptTooLong(-(-length // self._longest_token), self.context_length)
        # In an answer the mark is text, as a model may say anything.
        marks = sum(
            turn.text.count(IMAGE_TOKEN) for turn in prompt.turns if turn.role != "assistant"
        )
        if marks != len(prompt.images):
            raise ValueError(
                f"{marks} {IMAGE_TOKEN} marks in the text, but {len(prompt.images)} images"
            )
        return self.encoder.encode_prompt(prompt.turns)

    def _decode(self, ids: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _embed_all(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """``[T, D]`` of each prompt, every one of which leaves a position to answer at."""
        encoded = [self.encode(prompt) for prompt in prompts]
        longest = max(map(self._length, encoded))
        if longest >= self.context_length:
            raise PromptTooLong(longest, self.context_length)
        pairs = zip(encoded, prompts, strict=True)
        return [self._embed(ids.astype(np.int64), prompt.images) for ids, prompt in pairs]

    def _by_room(self, embeds: Sequence[torch.Tensor], max_new_tokens: int) -> dict[int, list[int]]:
        """Return tokens of the longest answer -> the prompts that have room for it, computed together.

        In one batch all answers end together, and positions beyond the model's last would change the rotary
        base of every prompt in it.
        """
        rooms = [min(max_new_tokens, self.context_length - len(rows)) for rows in embeds]
        return {room: [n for n, own in enumerate(rooms) if own == room] for room in rooms}

    def _padded(self, embeds: Sequence[torch.Tensor], room: int) -> dict[str, Any]:
        """What ``generate`` takes for prompts that all have room for so many new tokens."""
        longest = max(len(rows) for rows in embeds)
        padded = embeds[0].new_zeros((len(embeds), longest, embeds[0].shape[1]))
        mask = torch.zeros(padded.shape[:2], dtype=torch.long, device=padded.device)
        for number, rows in enumerate(embeds):
            padded[number, longest - len(rows) :] = rows
            mask[number, longest - len(rows) :] = 1
        return {
            "inputs_embeds": padded,
            "attention_mask": mask,
            "max_new_tokens": room,
            "use_cache": True,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.stop_ids[-1],
        }

    def _length(self, ids: np.ndarray) -> int:
        return len(ids) + int((ids == IMAGE_TOKEN_INDEX).sum()) * (self._image_tokens - 1)

    @torch.no_grad()
    def _embed(self, ids: np.ndarray, images: Sequence[ImageLike]) -> torch.Tensor:
        """``[T, D]`` of one prompt."""
        device, size = self.model.llm.device, self.transform.image_size
        repeats = np.where(ids == IMAGE_TOKEN_INDEX, self._image_tokens, 1)
        widened = torch.from_numpy(np.repeat(ids, repeats)).to(device)
        pixels = [self.pixels(image) for image in images]
        seen = torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size)
        places = torch.nonzero(widened == IMAGE_TOKEN_INDEX).flatten()
        return self.model.embed(widened[None], seen.to(device), places)[0]


def user_turn(question: str, num_images: int) -> Turn:
    """A user's turn; without ``<image>`` marks the images come first, each on a line, as in training."""
    marks = "" if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * num_images
    return Turn("user", marks + question)


def as_rgb(image: str | Path | Image.Image) -> Image.Image:
    """The image of a path, read as in training, or an opened one."""
    return image.convert("RGB") if isinstance(image, Image.Image) else open_rgb(image)


def _seed(sampling: Sampling) -> None:
    if sampling.temperature > 0 and sampling.seed is not None:
        torch.manual_seed(sampling.seed)


class FirstTokens(LogitsProcessor):
    """Keeps the scores of the answers' first tokens; changes none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._scores: torch.Tensor | None = None  # [B, V]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._scores is None:
            self._scores = scores
        return scores

    def shares(self, row: int, labels: Sequence[str]) -> dict[str, float] | None:
        """Return label -> its share of the labels' probability as the first token of an answer.

        None where the likeliest token is no label: then the answer says it in other words.
        """
        assert self._scores is not None
        ids = {label: self._ids(label) for label in labels}
        if int(self._scores[row].argmax()) not in {i for own in ids.values() for i in own}:
            return None
        probabilities = self._scores[row].float().softmax(-1)
        found = {label: float(probabilities[own].sum()) for label, own in ids.items()}
        total = sum(found.values())
        return {label: round(value / total, 6) for label, value in found.items()}

    def _ids(self, label: str) -> list[int]:
        """Return the tokens that are a label, with or without the mark of a word's beginning."""
        found = self._tokenizer.convert_tokens_to_ids([label, f"▁{label}", f"Ġ{label}"])
        return [i for i in found if i is not None and i != self._tokenizer.unk_token_id]


class _Tokens(StoppingCriteria):
    """Hands tokens from the generating thread to the one that reads, which may stop it."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.queue.put(int(input_ids[0, -1]))
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)
