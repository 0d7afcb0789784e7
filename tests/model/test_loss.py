# SPDX-License-Identifier: Apache-2.0

"""The chunked loss against torch's own cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gmai_xtuner.model.loss import install_loss_head, weighted_cross_entropy
from tests.model.test_llava import build_model, loss_and_gradients, make_batch, make_pack


def example(*, requires_grad=True):
    torch.manual_seed(0)
    hidden = torch.randn(8, 6, dtype=torch.float64, requires_grad=requires_grad)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=requires_grad)
    return hidden, weight, torch.randint(0, 11, (8,)), torch.rand(8)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100])
def test_chunked_equals_plain_in_value_and_gradients(chunk_size):
    hidden, weight, targets, weights = example()
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    plain = 0.7 * (losses * weights).sum()
    expected = torch.autograd.grad(plain, (hidden, weight))

    total = 0.7 * weighted_cross_entropy(hidden, weight, targets, weights, chunk_size=chunk_size)
    got = torch.autograd.grad(total, (hidden, weight))

    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), plain, rtol=1e-6, atol=1e-6)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


class LargestWithVocabulary(TorchDispatchMode):
    """Rows of the largest tensor with a vocabulary's columns that any operation gives."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.dtypes = vocabulary, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
                self.dtypes.add(tensor.dtype)
        return result


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_only_a_chunk_of_logits_exists_at_a_time(chunk_size):
    torch.manual_seed(0)
    hidden = torch.randn(200, 2, requires_grad=True)
    weight = torch.randn(97, 2, requires_grad=True)  # `weight.T` has 2 rows of 97
    targets, weights = torch.randint(0, 97, (200,)), torch.rand(200)
    with LargestWithVocabulary(97) as chunked:
        weighted_cross_entropy(hidden, weight, targets, weights, chunk_size=chunk_size).backward()
    with LargestWithVocabulary(97) as plain:
        (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights).sum().backward()
    assert chunked.rows == chunk_size
    assert plain.rows == 200


@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_equals_plain_for_every_weighting_through_the_model(weighting, dtype):
    packs = [
        make_pack((1, 3, 14), (0, 5, 2)),
        make_pack((2, 4, 9), seed=1),
    ]
    model = build_model(dtype=dtype, loss_chunk_size=4)
    batch = make_batch(*packs, denominator=11.0, weighting=weighting)
    data = batch["data"]
    assert len(data["label_targets"]) == 25
    assert len(set(data["label_weights"].tolist())) == (1 if weighting == "token" else 3)
    chunked = loss_and_gradients(model, [batch])

    model.zero_grad()
    logits = model(**batch, mode="tensor")[0, data["label_positions"]]
    losses = F.cross_entropy(logits.float(), data["label_targets"], reduction="none")
    plain = (losses * data["label_weights"]).sum() / 11.0
    plain.backward()

    assert chunked[0] == pytest.approx(plain.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                chunked[1][name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name
            )


def test_the_scale_of_the_gradients_is_not_rounded_to_bf16():
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = torch.randn(50, 32).bfloat16()
    targets, weights = torch.randint(0, 50, (64,)), torch.ones(64)
    weighted_cross_entropy(hidden, weight, targets, weights).backward()
    unscaled, hidden.grad = hidden.grad.double(), None
    # 1 / 2.99 lies almost half a bf16 step beside the next bf16 number.
    (weighted_cross_entropy(hidden, weight, targets, weights) / 2.99).backward()
    ratio = (hidden.grad.double() * unscaled).sum() / unscaled.square().sum()
    assert ratio.item() == pytest.approx(1 / 2.99, rel=2e-4)


def test_no_gradient_is_made_where_none_is_recorded():
    hidden, weight, targets, weights = example()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        weighted_cross_entropy(hidden, weight, targets, weights)
    assert counter.get_total_flops() == 2 * 8 * 6 * 11


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets, weights = example()
    weight = weight.detach()
    weighted_cross_entropy(hidden, weight, targets, weights, chunk_size=3).backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


def test_nothing_to_learn_gives_zero_and_keeps_the_graph():
    hidden = torch.randn(0, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = weighted_cross_entropy(hidden, weight, none, torch.zeros(0), chunk_size=4)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_the_head_gives_logits_or_the_loss():
    hidden, weight, targets, weights = example()
    head = torch.nn.Linear(6, 11, bias=False).double()
    head.weight.data.copy_(weight)
    install_loss_head(head)
    torch.testing.assert_close(head(hidden), hidden @ weight.T)
    expected = weighted_cross_entropy(hidden, weight, targets, weights)
    torch.testing.assert_close(head(hidden, targets, weights), expected)
    with pytest.raises(ValueError, match="bias"):
        install_loss_head(torch.nn.Linear(2, 2))
