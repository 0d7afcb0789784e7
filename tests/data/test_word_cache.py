# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from gmai_xtuner.data.word_cache import WordCache

MARK = "\u2581"
WORDS = st.sampled_from(
    ["The", "lung", "lungs", "is", "clear.", "\n", "气胸", "a\n", "<|im_end|>", "5mm"]
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.one_of(WORDS, st.just(""), st.text(max_size=4)), max_size=12).map(" ".join),
)


@pytest.fixture(scope="module")
def backend(tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


@pytest.fixture(scope="module")
def cache(backend) -> WordCache:
    found = WordCache.of(backend)
    assert found is not None
    return found


def whole(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_ids_are_those_of_the_whole_text(cache, backend, texts):
    assert cache(texts) == whole(backend, texts)
    assert cache(texts) == whole(backend, texts)  # now from the cache


def small(merges: list[tuple[str, str]], letters: str = MARK + "ab.\n", **changes) -> Tokenizer:
    """A byte-pair tokenizer with these merges."""
    pieces = ["<unk>", *letters]
    pieces += [a + b for a, b in merges if a + b not in pieces]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", MARK)
    state = json.loads(made.to_str())
    state["model"].update(changes)
    return Tokenizer.from_str(json.dumps(state))


def test_a_merge_over_a_space_keeps_the_words_together():
    tokenizer = small([(MARK, "a"), (".", MARK + "a")])
    assert tokenizer.encode("b. a").tokens == ["b", "." + MARK + "a"]  # the case occurs
    cache = WordCache.of(tokenizer)
    assert cache is not None
    texts = ["b. a", "b a. a b", "b a", ". .a"]
    assert cache(texts) == whole(tokenizer, texts)


def test_runs_of_spaces_stay_together():
    tokenizer = small([(MARK, MARK), (MARK + MARK, "a")])
    assert tokenizer.encode("b  a").tokens == ["b", MARK + MARK + "a"]
    cache = WordCache.of(tokenizer)
    assert cache is not None
    texts = ["b  a", "b   a", "  a ", "a  ", " a", " "]
    assert cache(texts) == whole(tokenizer, texts)


def test_unknown_characters_are_fused_as_in_the_whole_text():
    tokenizer = small([], letters="a")  # not even the mark is known
    assert tokenizer.encode("z z").tokens == ["<unk>"]
    cache = WordCache.of(tokenizer)
    assert cache is not None
    texts = ["zz a", "a zz", "z z", "z"]
    assert cache(texts) == whole(tokenizer, texts)


def test_long_words_are_not_kept(backend):
    cache = WordCache.of(backend)
    assert cache is not None
    cache(["short " + "x" * 500])
    assert all(len(word) <= 40 for word in (*cache._first, *cache._later))


@pytest.mark.parametrize("change", ["pre_tokenizer", "normalizer", "ignore_merges", "added_token"])
def test_tokenizers_without_the_proof_are_refused(change):
    tokenizer = small([(MARK, "a")])
    assert WordCache.of(tokenizer) is not None
    if change == "pre_tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif change == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
        )
    elif change == "ignore_merges":
        tokenizer = small([(MARK, "a")], ignore_merges=True)
    else:
        tokenizer.add_tokens(["a b"])
    assert WordCache.of(tokenizer) is None
