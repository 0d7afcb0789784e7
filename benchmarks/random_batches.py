# SPDX-License-Identifier: Apache-2.0

"""Random conversations, and the batches that each side of ``train_step.py`` makes of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from xtuner.dataset.samplers.length_grouped import get_length_grouped_indices

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.data.dataset import collate_packs
from gmai_xtuner.data.packing import pack

IMAGE_SIZE, IMAGE_TOKENS = 336, 576
PICTURES = 8


@functools.cache
def _pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(PICTURES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def picture(index: int) -> torch.Tensor:
    """Pixel values of a conversation's image; noise, the same for every eighth conversation."""
    return _pictures()[index % PICTURES]


@dataclass(frozen=True)
class Conversation:
    """Ids and labels with one placeholder for its image, if it has one."""

    input_ids: np.ndarray
    labels: np.ndarray
    images: int

    @property
    def length(self) -> int:
        return len(self.input_ids) + self.images * (IMAGE_TOKENS - 1)


def draw_conversations(
    number: int, *, vocabulary: int, max_length: int, seed: int
) -> list[Conversation]:
    """Three of four have an image; text is log-normal with a median of 110 tokens and a mean of about
    200, of which 55 % are learnt. Mean 630 tokens: what captions, questions and dialogues mix to."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(number):
        images = int(rng.random() < 0.75)
        text = int(np.clip(rng.lognormal(np.log(110), 1.1), 16, max_length - images * IMAGE_TOKENS))
        ids = rng.integers(1, vocabulary, text)
        labels = np.where(np.arange(text) < 0.45 * text, IGNORE_INDEX, ids)
        if images:
            ids = np.insert(ids, 4, IMAGE_TOKEN_INDEX)
            labels = np.insert(labels, 4, IGNORE_INDEX)
        drawn.append(Conversation(ids, labels, images))
    return drawn


def fill_packs(
    drawn: Sequence[Conversation], packs: int, max_length: int
) -> tuple[list[Conversation], list[np.ndarray]]:
    """As many of the conversations as go into ``packs`` packs, and the packs."""
    lengths = np.array([conversation.length for conversation in drawn])
    images = np.array([conversation.images for conversation in drawn])

    def plan(number: int) -> list[np.ndarray]:
        done = pack(
            lengths[:number], max_length=max_length, images=images[:number], max_images=16, seed=0
        )
        return [done[index] for index in range(len(done))]

    number = int(np.searchsorted(lengths.cumsum(), packs * max_length))
    while len(plan(number)) > packs:
        number -= 1
    return list(drawn[:number]), plan(number)


def our_batches(
    conversations: Sequence[Conversation],
    packs: Sequence[np.ndarray],
    micro_batch: int,
    max_length: int,
) -> list[dict[str, Any]]:
    def item(members: np.ndarray) -> dict[str, Any]:
        chosen = [conversations[index] for index in members]
        times = [np.where(c.input_ids == IMAGE_TOKEN_INDEX, IMAGE_TOKENS, 1) for c in chosen]
        ids = [np.repeat(c.input_ids, t) for c, t in zip(chosen, times, strict=True)]
        labels = [np.repeat(c.labels, t) for c, t in zip(chosen, times, strict=True)]
        return {
            "input_ids": torch.from_numpy(np.concatenate(ids)),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "lengths": [c.length for c in chosen],
            "pixel_values": torch.cat(
                [torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)]
                + [picture(index)[None] for index in members if conversations[index].images]
            ),
            "ids": [str(index) for index in members],
            "num_tokens": sum(c.length for c in chosen),
            "capacity": max_length,
        }

    return [
        collate_packs([item(members) for members in packs[start : start + micro_batch]])
        for start in range(0, len(packs), micro_batch)
    ]


@dataclass(frozen=True)
class PaddedBatch:
    """``instances`` as xtuner's collate function takes them, and what is useful of them."""

    instances: list[dict[str, Any]]
    tokens: int
    padded_tokens: int


def xtuner_batches(
    conversations: Sequence[Conversation], size: int, order: str
) -> list[PaddedBatch]:
    """Batches of ``size`` conversations, ``shuffled`` or ``grouped`` by length."""
    generator = torch.Generator().manual_seed(0)
    if order == "grouped":
        # As its LLaVADataset says it: negative for a conversation without an image.
        modality = [c.length if c.images else -c.length for c in conversations]
        # Its fine-tuning config groups batch size times accumulation, 8 x 2.
        indices = get_length_grouped_indices(modality, size * 2, generator=generator)
    else:
        indices = torch.randperm(len(conversations), generator=generator).tolist()
    batches = []
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        lengths = [conversations[index].length for index in chosen]
        batches.append(
            PaddedBatch(
                [_instance(conversations[index], index) for index in chosen],
                sum(lengths),
                max(lengths) * len(lengths),
            )
        )
    return batches


def _instance(conversation: Conversation, index: int) -> dict[str, Any]:
    # Its LLaVADataset gives an image of zeros to a conversation without one.
    blank = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
    return {
        "input_ids": conversation.input_ids.tolist(),
        "labels": conversation.labels.tolist(),
        "pixel_values": picture(index) if conversation.images else blank,
    }
