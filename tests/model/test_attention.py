# SPDX-License-Identifier: Apache-2.0

"""Every backend against the plain definition: each conversation on its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.model.attention import (
    SequenceBoundaries,
    choose_backend,
    install_boundary_attention,
    sdpa_loop_attention,
    varlen_attention,
)


def one_by_one(query, key, value, lengths, scaling):
    """Causal softmax attention written out, for each conversation separately; [1, T, H, D]."""
    groups = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for length in lengths:
        q = query[0, :, start : start + length]
        k = key[0, :, start : start + length].repeat_interleave(groups, dim=0)
        v = value[0, :, start : start + length].repeat_interleave(groups, dim=0)
        scores = q @ k.transpose(1, 2) * scaling
        future = torch.ones(length, length, dtype=torch.bool).triu(1).to(scores.device)
        outputs.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v)
        start += length
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0)


def boundaries_of(lengths, *, device="cpu"):
    starts = np.cumsum([0, *lengths])
    return SequenceBoundaries(
        torch.tensor(starts, dtype=torch.int32, device=device), tuple(lengths)
    )


def random_qkv(total, heads, kv_heads, width, *, seed, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        values = torch.randn(1, n, total, width, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    return draw(heads), draw(kv_heads), draw(kv_heads)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    seed=st.integers(0, 10),
)
def test_the_loop_equals_each_conversation_on_its_own(lengths, heads, seed):
    qkv = random_qkv(sum(lengths), *heads, 8, seed=seed)
    expected = one_by_one(*qkv, lengths, 0.25)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), qkv)

    got = sdpa_loop_attention(*qkv, boundaries_of(lengths), 0.25)
    grads = torch.autograd.grad((got * weight).sum(), qkv)

    torch.testing.assert_close(got, expected)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference)


def test_the_kernel_is_handed_grouped_heads(monkeypatch):
    lengths, handed = [1, 5, 3], []

    def kernel(query, key, value, *_, scale, **__):
        handed.append([one.shape for one in (query, key, value)])
        heads = (one.transpose(0, 1)[None] for one in (query, key, value))
        return sdpa_loop_attention(*heads, boundaries_of(lengths), scale)[0]

    monkeypatch.setattr("gmai_xtuner.model.attention._varlen_attn", kernel)
    qkv = random_qkv(9, 4, 2, 8, seed=1)
    got = varlen_attention(*qkv, boundaries_of(lengths), 0.25)
    assert handed == [[(9, 4, 8), (9, 2, 8), (9, 2, 8)]]
    expected = one_by_one(*qkv, lengths, 0.25)
    torch.testing.assert_close(got, expected)
    pairs = (torch.autograd.grad(out.square().sum(), qkv) for out in (got, expected))
    for grad, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(grad, reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("public", [True, False], ids=["varlen_attn", "aten"])
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 64), ((32, 8), 128)])
def test_varlen_kernel_equals_each_conversation_on_its_own(heads, width, public, monkeypatch):
    if not public:
        monkeypatch.setattr("gmai_xtuner.model.attention._varlen_attn", None)
    lengths = [1, 130, 64, 700]
    qkv = random_qkv(sum(lengths), *heads, width, seed=1, dtype=torch.bfloat16, device="cuda")
    reference = [tensor.detach().double().requires_grad_() for tensor in qkv]
    expected = one_by_one(*reference, lengths, 0.125)
    got = varlen_attention(*qkv, boundaries_of(lengths, device="cuda"), 0.125).double()
    assert (got - expected).norm() / expected.norm() < 1e-2
    grads = torch.autograd.grad(got.square().sum(), qkv)
    expected_grads = torch.autograd.grad(expected.square().sum(), reference)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad.double() - expected_grad).norm() / expected_grad.norm() < 2e-2


def test_choice_of_the_backend():
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float32) == "sdpa_loop"
    with pytest.raises(GMAIError, match=r"needs an NVIDIA GPU.*got cpu"):
        choose_backend("varlen", cpu, torch.bfloat16)
    with pytest.raises(GMAIError, match="'flash'"):
        choose_backend("flash", cpu, torch.bfloat16)


def test_refuses_a_model_whose_attention_can_not_be_told():
    with pytest.raises(GMAIError, match="Linear"):
        install_boundary_attention(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_of_left_padding_sees_nothing(dtype):
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    install_boundary_attention(llm)
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    places = torch.arange(4)
    mask = llm.model._update_causal_mask(
        padded, torch.zeros(2, 4, 8, dtype=dtype), places, None, False
    )
    seen = mask[:, 0] == 0
    assert seen.any(-1).all()
    causal = [[place < row + 1 for place in range(4)] for row in range(4)]
    assert seen[1].tolist() == causal
    assert seen[0, 2:].tolist() == [[False, False, True, False], [False, False, True, True]]
