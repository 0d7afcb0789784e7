# SPDX-License-Identifier: Apache-2.0

"""Models that know a few answers by heart, as exports: what the page shows must come from somewhere."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gmai_xtuner.checkpoint.bases import load_language_model, load_vision_tower
from gmai_xtuner.checkpoint.export import save_xtuner_layout
from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.constants import IMAGE_TOKEN_INDEX
from gmai_xtuner.generate import Predictor, Prompt, user_turn
from gmai_xtuner.model.llava import num_image_tokens
from tests.model.exporting import predictor_of

Lesson = tuple[str, Image.Image | None, str]
"""A question, the picture that goes with it, and the answer; one that ends with … is taught to go on."""


def write_export(
    folder: Path, bases: Path, *, seed: int, lessons: Sequence[Lesson], steps: int = 120
) -> Path:
    """A stage-3 export with its own language model and vision tower.

    Args:
        folder: new.
        bases: of :func:`examples.tiny_bases.write_tiny_bases`.
        seed: of what is random.
        lessons: learnt by heart; any other question gives random words.
        steps: of the optimiser at the most, each with all lessons.
    """
    torch.manual_seed(seed)
    model = GMAILLaVAModel(
        llm=load_language_model(str(bases / "llm"), torch_dtype=torch.float32),
        visual_encoder=load_vision_tower(str(bases / "vision"), torch_dtype=torch.float32),
        use_activation_checkpointing=False,
    )
    _teach(model, bases, lessons, steps)
    cfg = {
        "model": {},
        "tokenizer": {
            "type": "gmai_xtuner.checkpoint.tokenizer.load_tokenizer",
            "pretrained_model_name_or_path": str(bases / "llm"),
        },
        "image_processor": {
            "type": "transformers.CLIPImageProcessor.from_pretrained",
            "pretrained_model_name_or_path": str(bases / "vision"),
        },
        "train_dataloader": {"dataset": {}},
    }
    save_xtuner_layout(model, cfg, str(folder), fp32=True, save_kwargs={"safe_serialization": True})
    return folder


def _teach(model: GMAILLaVAModel, bases: Path, lessons: Sequence[Lesson], steps: int) -> None:
    predictor = predictor_of(model, bases)
    if not lessons:
        return
    taught = []
    for question, picture, answer in lessons:
        images = () if picture is None else (picture,)
        prompt = predictor.encode(Prompt((user_turn(question, len(images)),), images))
        end = "" if answer.endswith("…") else "<|im_end|>"
        text = predictor.encoder.tokenizer.encode(
            answer.removesuffix("…") + end, add_special_tokens=False
        )
        ids = np.concatenate([prompt, np.array(text.ids)]).astype(np.int64)
        taught.append((*_widened(predictor, ids, images), len(text.ids)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = torch.zeros(())
        for ids, pixels, learnt in taught:
            places = torch.nonzero(ids == IMAGE_TOKEN_INDEX).flatten()
            embeds = model.embed(ids[None], pixels, places)
            logits = model.llm(inputs_embeds=embeds).logits[0, -learnt - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[-learnt:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01 * len(lessons):
            break
    assert loss.item() < 0.02 * len(lessons), f"not learnt: {loss.item()}"


def _widened(
    predictor: Predictor, ids: np.ndarray, images: Sequence[Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with a place for each image token, and the pixel values."""
    tokens = num_image_tokens(predictor.model.visual_encoder.config)
    size = predictor.transform.image_size
    pixels = [predictor.transform(image) for image in images]
    return (
        torch.from_numpy(np.repeat(ids, np.where(ids == IMAGE_TOKEN_INDEX, tokens, 1))),
        torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size),
    )
