# SPDX-License-Identifier: Apache-2.0

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gmai_xtuner.data import dataset as dataset_module
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.token_cache import TokenCache, open_cache
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer
from gmai_xtuner.data.tokenize_records import CacheOptions
from tests.toy import Corpus

OPTIONS = CacheOptions(
    max_length=256,
    num_image_tokens=64,
    max_images=3,
    over_length="cut",
    on_bad_sample="raise",
    check_images="header",
    max_pixels=10_000,
)


@pytest.fixture(scope="session")
def encode(tokenizer: PreTrainedTokenizerFast) -> ConversationTokenizer:
    template = ChatTemplate.from_xtuner("internlm2_chat")
    return ConversationTokenizer.from_pretrained(tokenizer, template)


@pytest.fixture
def cached(tmp_path: Path, encode: ConversationTokenizer) -> Callable[..., TokenCache]:
    """Open the cache of a corpus' dataset ``toy``."""

    def open_it(corpus: Corpus, options: CacheOptions = OPTIONS, **changes) -> TokenCache:
        arguments = {"cache_dir": tmp_path / "cache", "num_workers": 1, **changes}
        return open_cache(corpus.entry("toy"), encode, options, **arguments)

    return open_it


@pytest.fixture
def build(
    tiny_bases: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., SoftPackedDataset]:
    """Build a dataset of a mixture's stage 1."""

    def build_it(mixture: Path | str, **changes) -> SoftPackedDataset:
        arguments = {
            "tokenizer": tokenizer,
            "vision": str(tiny_bases / "vision"),
            "cache_dir": str(tmp_path / "cache"),
            "max_length": 256,
            "max_images": 3,
            "num_workers": 1,
        }
        return SoftPackedDataset(str(mixture), "stage1", **{**arguments, **changes})

    return build_it


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a dataset says of itself."""
    lines: list[str] = []
    monkeypatch.setattr(dataset_module, "info", lines.append)
    return lines


def run_at_once(work: Callable[[], Any]) -> list[Any]:
    """What two processes give that call the same function at the same moment, with their ids."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()

    def call() -> None:
        barrier.wait()
        results.put((os.getpid(), work()))

    processes = [context.Process(target=call) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(30)
    assert found[0][0] != found[1][0]
    return [result for _, result in found]
