"""The chunked loss against torch's own cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gmai_xtuner.models import loss as loss_module
from gmai_xtuner.models.loss import install_loss_head, weighted_cross_entropy


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


def test_only_a_chunk_of_logits_exists_at_a_time(monkeypatch):
    sizes = []
    plain = F.cross_entropy

    def counting(logits, *arguments, **options):
        sizes.append(tuple(logits.shape))
        return plain(logits, *arguments, **options)

    monkeypatch.setattr(loss_module.F, "cross_entropy", counting)
    weighted_cross_entropy(*example(), chunk_size=3).backward()
    assert sizes == [(3, 11), (3, 11), (2, 11)]


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
