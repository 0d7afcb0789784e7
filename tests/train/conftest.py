# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gmai_xtuner.checkpoint.bases import load_language_model, load_vision_tower
from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.data.dataset import SoftPackedDataset
from tests.toy import Corpus


@pytest.fixture(scope="session")
def tiny_model(tiny_bases: Path) -> GMAILLaVAModel:
    """A model of the tiny bases; its weights and gradients are to be left as they are."""
    torch.manual_seed(0)
    return GMAILLaVAModel(
        load_language_model(str(tiny_bases / "llm"), torch_dtype=torch.float32),
        load_vision_tower(str(tiny_bases / "vision")),
        loss_chunk_size=7,
    )


@pytest.fixture
def build(
    tiny_bases: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., SoftPackedDataset]:
    """Build the dataset of a corpus with a part held out; packs hold two images at the most."""

    def build_it(corpus: Corpus, *, held_out: float) -> SoftPackedDataset:
        return SoftPackedDataset(
            str(corpus.mixture),
            "stage1",
            tokenizer=tokenizer,
            vision=str(tiny_bases / "vision"),
            cache_dir=str(tmp_path / "cache"),
            max_length=160,
            held_out=held_out,
            num_workers=1,
        )

    return build_it
