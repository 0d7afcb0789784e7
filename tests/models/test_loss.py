"""The chunked loss against torch's own cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gmai_xtuner.models.loss import weighted_cross_entropy


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100])
def test_chunked_equals_plain_in_value_and_gradients(chunk_size):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False).double()
    hidden = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (8,))
    weights = torch.rand(8)

    losses = F.cross_entropy(head(hidden), targets, reduction="none")
    plain = (losses * weights).sum()
    expected = torch.autograd.grad(plain, (hidden, head.weight))

    total = weighted_cross_entropy(head, hidden, targets, weights, chunk_size=chunk_size)
    got = torch.autograd.grad(total, (hidden, head.weight))

    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), plain, rtol=1e-6, atol=1e-6)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_only_a_chunk_of_logits_exists_at_a_time():
    sizes = []

    def head(hidden):
        sizes.append(hidden.shape[0])
        return hidden @ torch.ones(4, 5)

    hidden = torch.randn(10, 4, requires_grad=True)
    arguments = (hidden, torch.zeros(10, dtype=torch.long), torch.ones(10))
    weighted_cross_entropy(head, *arguments, chunk_size=4).backward()
    assert sizes[:3] == [4, 4, 2]
    assert max(sizes) == 4


def test_nothing_to_learn_gives_zero_and_keeps_the_graph():
    hidden = torch.randn(0, 4, requires_grad=True)
    head = torch.nn.Linear(4, 5)
    loss = weighted_cross_entropy(
        head, hidden, torch.zeros(0, dtype=torch.long), torch.zeros(0), chunk_size=4
    )
    assert loss.item() == 0.0
    assert loss.requires_grad
