# SPDX-License-Identifier: Apache-2.0

"""The training dataset: a mixture file in, packs of whole conversations with their images out; flat batches.

Shapes: ``T`` tokens, ``S`` conversations, ``N`` images of ``P`` tokens each, ``M`` supervised tokens.

Two packs ``[A A A B B]`` and ``[C C C]`` (lower case: supervised) become a batch without padding::

    input_ids        A a a B b C C c
    position_ids     0 1 2 0 1 0 1 2
    cu_seqlens       0     3   5     8
    label_positions  0 1   3     6        the token before each supervised one
    label_targets    a a   b     c
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.registry import DATASETS, FUNCTIONS
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from xtuner.registry import BUILDER

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.errors import GMAIError, ImageError
from gmai_xtuner.core.exclusion import read_exclusions
from gmai_xtuner.core.hub import image_tokens
from gmai_xtuner.core.imaging.images import MAX_PIXELS
from gmai_xtuner.core.mixture import DatasetEntry, load_mixture, select
from gmai_xtuner.core.templates import environment
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.log import info
from gmai_xtuner.data.plan import DataPlan, unknown_lines
from gmai_xtuner.data.token_cache import OpenCache, TokenCache, open_cache, open_caches
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer, TokenizedConversation
from gmai_xtuner.data.tokenize_records import CacheOptions


class PackRef(NamedTuple):
    """Which pack is asked for: its index in an epoch's plan; a filler only keeps a rank in step."""

    epoch: int
    pack: int
    filler: bool = False


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One dataset of the mixture, as the stage sees it: records in its files, then what an epoch has of them.

    ``kept`` can be trained on, ``bad`` can't, of ``too_long`` nothing fits in a pack, of ``cut`` the first
    turns; ``held_out`` is validated on, ``neither`` has images of both sides, ``excluded`` is on the
    mixture's lists. ``tokens`` count those of images.
    """

    name: str
    category: str | None
    ratio: float
    records: int
    kept: int
    bad: int
    too_long: int
    cut: int
    held_out: int
    neither: int
    excluded: int
    conversations: int
    images: int
    tokens: int


@DATASETS.register_module()
@BUILDER.register_module()
class SoftPackedDataset(Dataset[dict[str, Any]]):
    """Soft-packed conversations of a mixture; items are packs of an epoch's plan.

    Args:
        mixture: mixture file (YAML or JSON, or the authors' ``example_list.json``).
        stage: whose ratios to take: ``stage1``, ``stage2``, ``stage3``.
        tokenizer: config of ``gmai_xtuner.checkpoint.tokenizer.load_tokenizer``, or a fast tokenizer. A
            config leaves it out: training takes that of ``model.llm``.
        vision: the vision tower's folder or hub name: size, mean and deviation of its images, and how
            many tokens an image takes (576 for CLIP ViT-L/14-336). A config leaves it out, too: training
            takes ``model.visual_encoder``.
        cache_dir: for token caches and plans.
        prompt_template: name in ``xtuner.utils.PROMPT_TEMPLATE``.
        add_bos: see :class:`gmai_xtuner.data.tokenization.ChatTemplate`.
        max_length: tokens of a pack, image tokens counted.
        max_images: images of a pack.
        image_mode: ``pad`` to a square with the mean colour (the authors' code), or ``resize`` (the
            paper's sentence).
        image_decoding: ``full``, or ``scaled``: large JPEG files at a fraction of their size, see
            :class:`gmai_xtuner.data.images.ImageTransform`.
        seed: of sampling and packing.
        quality: take only the mixture's datasets of this quality (``high`` or ``low``).
        on_bad_sample: ``raise`` or ``skip``; a dataset of the mixture may say otherwise.
        check_images: ``none``, ``exists``, ``header`` or ``decode``, when the cache is built.
        max_pixels: an image with more is refused.
        num_workers: processes that tokenise; default: all cores.
        held_out: share of the images that is kept for validation (:meth:`held_out_part`), see
            :mod:`gmai_xtuner.data.plan`; default 0.

    Raises:
        MixtureError: the mixture file is invalid.
        DataError: records or images can't be used; names dataset and record, of several all.
    """

    def __init__(
        self,
        mixture: str,
        stage: str,
        *,
        tokenizer: Mapping[str, Any] | PreTrainedTokenizerFast,
        vision: str,
        cache_dir: str,
        prompt_template: str = "internlm2_chat",
        add_bos: bool = True,
        max_length: int = 2048,
        max_images: int = 16,
        image_mode: str = "pad",
        image_decoding: str = "full",
        seed: int = 0,
        quality: str | None = None,
        on_bad_sample: str = "raise",
        check_images: str = "header",
        max_pixels: int = MAX_PIXELS,
        num_workers: int | None = None,
        held_out: float = 0.0,
    ) -> None:
        self.max_length = max_length
        self.max_pixels = max_pixels
        self.num_image_tokens = image_tokens(vision)
        if max_length <= self.num_image_tokens:
            raise GMAIError(
                f"max_length {max_length} leaves no room for text beside the {self.num_image_tokens} "
                "tokens of one image"
            )
        self.transform = self._image_transform(vision, image_mode, image_decoding)
        if isinstance(tokenizer, Mapping):
            tokenizer = BUILDER.build(tokenizer)
        template = ChatTemplate.from_xtuner(prompt_template, add_bos=add_bos)
        self.tokenizer, self.template = tokenizer, template
        batched = ConversationTokenizer.from_pretrained(tokenizer, template)

        def opened(entry: DatasetEntry) -> TokenCache:
            options = CacheOptions(
                max_length=max_length,
                num_image_tokens=self.num_image_tokens,
                max_images=max_images,
                over_length=entry.over_length,
                on_bad_sample=entry.on_bad_sample or on_bad_sample,
                check_images=check_images,
                max_pixels=max_pixels,
            )
            return open_cache(entry, batched, options, cache_dir=cache_dir, num_workers=num_workers)

        chosen = self._open_caches(mixture, stage, quality, opened)
        self.entries, ratios, self.caches = map(list, zip(*chosen, strict=True))
        names = [entry.name for entry in self.entries]
        known = load_mixture(mixture, check_files=False).known
        self.plan = DataPlan(
            self.caches,
            names=names,
            ratios=ratios,
            seed=seed,
            max_length=max_length,
            max_images=max_images,
            cache_dir=cache_dir,
            held_out=held_out,
            exclusions=read_exclusions(self.entries, known=known),
        )
        self.metainfo = {
            "datasets": names,
            "categories": [entry.category for entry in self.entries],
        }
        self._log_summary(stage)

    # The preflight overrides these two steps: it goes on where training must stop.

    def _image_transform(self, vision: str, mode: str, decoding: str) -> ImageTransform:
        return ImageTransform.from_pretrained(vision, mode=mode, decoding=decoding)

    def _open_caches(
        self, mixture: str, stage: str, quality: str | None, opened: OpenCache
    ) -> list[tuple[DatasetEntry, float, TokenCache]]:
        """Return the stage's datasets with their ratios and token caches."""
        chosen = select(load_mixture(mixture), stage=stage, quality=quality)
        caches = open_caches([entry for entry, _ in chosen], opened)
        return [(*one, cache) for one, cache in zip(chosen, caches, strict=True)]

    def held_out_part(self, at_most: int | None = None) -> SoftPackedDataset | None:
        """Return the conversations kept for validation, each once, with the same caches and images.

        ``at_most`` of a dataset; ``None`` where nothing is held out.
        """
        part = copy.copy(self)
        part.plan = replace(self.plan, split="held_out", at_most=at_most)
        return part if len(part.plan.samples) else None

    def __len__(self) -> int:
        """Packs of an epoch; the same for every epoch."""
        return len(self.plan.epoch(0).packs)

    def __getitem__(self, ref: PackRef | int) -> dict[str, Any]:
        """Return one pack.

        Args:
            ref: what the batch sampler asks for; a plain number means that pack of epoch 0.

        Returns:
            ``input_ids`` and ``labels`` int64 ``[t]`` with each image's placeholders widened,
            ``lengths`` of its conversations, ``pixel_values`` float32 ``[n, 3, S, S]``, ``ids``, and
            ``num_tokens`` and ``capacity``, the useful tokens and those that could be.

        Raises:
            ImageError: an image that was fine when the cache was built can't be read now.
        """
        epoch, pack, filler = ref if isinstance(ref, PackRef) else PackRef(0, int(ref))
        ids, labels, lengths, names = [], [], [], []
        pixels: list[torch.Tensor] = []
        for sample in self.plan.epoch(epoch).packs[pack]:
            dataset, row = (int(value) for value in self.plan.samples[sample])
            conversation = self.caches[dataset][row]
            tokens = conversation.input_ids.astype(np.int64)
            times = np.where(tokens == IMAGE_TOKEN_INDEX, self.num_image_tokens, 1)
            own = np.repeat(conversation.labels.astype(np.int64), times)
            ids.append(np.repeat(tokens, times))
            labels.append(np.full_like(own, IGNORE_INDEX) if filler else own)
            lengths.append(len(own))
            names.append(f"{self.entries[dataset].name}/{conversation.id}")
            pixels.extend(self._pixels(dataset, conversation, path) for path in conversation.images)
        size = self.transform.image_size
        return {
            "input_ids": torch.from_numpy(np.concatenate(ids)),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "lengths": lengths,
            "pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size),
            "ids": names,
            "num_tokens": 0 if filler else sum(lengths),
            "capacity": 0 if filler else self.max_length,
        }

    def _pixels(self, dataset: int, conversation: TokenizedConversation, path: str) -> torch.Tensor:
        entry = self.entries[dataset]
        try:
            file = os.path.join(entry.image_root or "", path)
            return self.transform.read(file, max_pixels=self.max_pixels)
        except ImageError as error:
            raise ImageError(
                error.problem,
                dataset=entry.name,
                record=conversation.id,
                remedy=f"{error.remedy or ''} To find and skip every such image before training, set "
                "check_images='decode' and on_bad_sample='skip'".strip(),
                reason=error.reason,
            ) from error

    def rows(self) -> list[DatasetRow]:
        """Count what the plan has of each dataset."""
        plan = self.plan
        held_out, excluded = plan.held_out_counts().tolist(), plan.excluded().conversations
        rows = []
        for number, part in enumerate(plan.counts_by_dataset()):
            entry, cache = self.entries[number], self.caches[number]
            skipped = cache.meta["skipped"]
            too_long = skipped.get("over_length", 0)
            rows.append(
                DatasetRow(
                    name=entry.name,
                    category=entry.category,
                    ratio=plan.ratios[number],
                    records=cache.meta["records"],
                    kept=cache.meta["kept"],
                    bad=sum(skipped.values()) - too_long,
                    too_long=too_long,
                    cut=cache.meta["cut"],
                    held_out=held_out[number][0],
                    neither=held_out[number][1],
                    excluded=excluded[number],
                    conversations=len(part),
                    images=int(part[:, 2].sum()),
                    tokens=int(part[:, 0].sum(dtype=np.int64)),
                )
            )
        return rows

    def _log_summary(self, stage: str) -> None:
        template = environment("gmai_xtuner.data").get_template("summary.txt.j2")
        rows, excluded = self.rows(), self.plan.excluded()
        more = {"excluded": excluded, "unknown_lines": unknown_lines}
        info(template.render(stage=stage, dataset=self, rows=rows, **more).rstrip())


# --- packs -> one flat batch ---


@FUNCTIONS.register_module()
def collate_packs(
    packs: Sequence[dict[str, Any]], *, weighting: str = "token"
) -> dict[str, dict[str, Any]]:
    """Join the packs of a micro-batch.

    Args:
        packs: items of :class:`SoftPackedDataset`.
        weighting: what a supervised token counts: ``token`` and ``micro_batch`` 1; ``sample`` 1/n and
            ``square`` 1/sqrt(n) in a conversation of n supervised tokens. In a config it is left out:
            training takes the batch sampler's.

    Returns:
        ``{"data": ...}`` as :meth:`gmai_xtuner.checkpoint.llava.GMAILLaVAModel.forward` takes it: besides
        the fields in the module's drawing ``lengths`` (S ints), ``pixel_values`` ``[N, 3, H, W]``,
        ``image_positions`` int64 ``[N * P]``, ``label_weights`` float32 ``[M]``, their sum
        ``label_weight`` (float: made here, the trainer need not wait for the device), ``num_tokens``,
        ``capacity`` (tokens the packs could hold), ``ids``. The training loop adds ``loss_denominator``.
    """
    input_ids = torch.cat([pack["input_ids"] for pack in packs])
    labels = torch.cat([pack["labels"] for pack in packs])
    lengths = [length for pack in packs for length in pack["lengths"]]
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    if int(starts[-1]) != len(input_ids) or len(labels) != len(input_ids):
        raise GMAIError(
            f"{len(input_ids)} tokens, {len(labels)} labels and lengths of {int(starts[-1])} in a batch"
        )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), starts.diff())
    # A conversation's first token must not be predicted from the end of the one before.
    labels[starts[:-1]] = IGNORE_INDEX
    supervised = torch.nonzero(labels != IGNORE_INDEX).flatten()
    weights = _weights(owner[supervised], len(lengths), weighting)
    return {
        "data": {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": (torch.arange(len(input_ids)) - starts[owner]).unsqueeze(0),
            "cu_seqlens": starts.to(torch.int32),
            "lengths": lengths,
            "pixel_values": torch.cat([pack["pixel_values"] for pack in packs]),
            "image_positions": torch.nonzero(input_ids == IMAGE_TOKEN_INDEX).flatten(),
            "label_positions": supervised - 1,
            "label_targets": labels[supervised],
            "label_weights": weights,
            "label_weight": float(weights.sum()),
            "num_tokens": sum(pack["num_tokens"] for pack in packs),
            "capacity": sum(pack["capacity"] for pack in packs),
            "ids": [name for pack in packs for name in pack["ids"]],
        }
    }


def _weights(owner: Tensor, conversations: int, weighting: str) -> Tensor:
    """float32 ``[M]``; ``owner`` is the conversation of each supervised token."""
    if weighting in ("token", "micro_batch"):
        return torch.ones(len(owner))
    if weighting not in ("sample", "square"):
        raise GMAIError(f"unknown weighting {weighting!r}")
    counts = torch.bincount(owner, minlength=conversations).to(torch.float32)[owner]
    return counts.reciprocal() if weighting == "sample" else counts.rsqrt()
