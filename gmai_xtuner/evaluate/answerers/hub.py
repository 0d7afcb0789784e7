"""Any image-text model of transformers, asked by its own processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.evaluate.answerers.answerer import split_at_images
from gmai_xtuner.evaluate.answerers.local import LocalAnswerer, Pictures
from gmai_xtuner.evaluate.answerers.ours import local_folder
from gmai_xtuner.evaluate.fingerprint import hash_files

NESTED = ("Idefics", "SmolVLM", "Mllama", "Pixtral", "Gemma3", "Aya", "Llama4")
"""Beginnings of the processors that take a list of pictures for each text; others take one list for all."""


class HubAnswerer(LocalAnswerer):
    """Pads on the left, so that a batch answers as its questions do alone.

    Args:
        model: in evaluation mode on its device.
        processor: the model's own, with a chat template.
        name: as tables call it.
        digest: the model's hash.
        batch_size: questions asked together.

    Raises:
        ModelLoadError: no chat template.
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
        super().__init__(
            name=name,
            model=digest,
            generation={
                "decoding": "greedy",
                "precision": str(model.dtype).removeprefix("torch."),
                "processor": type(processor).__name__,
            },
            batch_size=batch_size,
        )
        self._model = model.eval()
        self._processor = processor
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._nested = type(processor).__name__.startswith(NESTED)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], pictures: Sequence[Pictures], max_new_tokens: int
    ) -> list[str]:
        texts = [
            self._processor.apply_chat_template(
                [{"role": "user", "content": _content(prompt, len(own))}],
                add_generation_prompt=True,
            )
            for prompt, own in zip(prompts, pictures, strict=True)
        ]
        inputs = self._processor(
            text=texts, images=self._images(pictures), padding=True, return_tensors="pt"
        ).to(self._model.device)
        for key, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[key] = value.to(self._model.dtype)
        output = self._model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._processor.tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip()
            for text in self._processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        ]

    def _images(self, pictures: Sequence[Pictures]) -> list[Any] | None:
        if not pictures[0]:
            return None
        if self._nested:
            return [list(own) for own in pictures]
        return [picture for own in pictures for picture in own]


def _content(prompt: str, number: int) -> list[dict[str, str]]:
    return [
        {"type": "image"} if part is None else {"type": "text", "text": part}
        for part in split_at_images(prompt, number)
    ]


def load_from_hub(
    name: str,
    *,
    shown: str,
    dtype: torch.dtype | None,
    device: torch.device,
    batch_size: int,
    cache: Path,
) -> HubAnswerer:
    """Load a model of transformers; no code that comes with it is run.

    Args:
        name: folder or hub name.
        shown: as tables call it.
        dtype: None: bf16 on a GPU, fp32 on the CPU.
        device: where it runs.
        batch_size: questions asked together.
        cache: folder where hashes are remembered.

    Raises:
        ModelLoadError: transformers can't load it; names the model and the reason.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelLoadError(
            f"{name!r} is neither an export of this project nor an image-text model that transformers loads "
            f"here: {error}"
        ) from error
    return HubAnswerer(
        model.to(device),
        processor,
        name=shown,
        digest=hash_files({"model": local_folder(name)}, cache=cache),
        batch_size=batch_size,
    )
