# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from data_tools.writers.asking import Account
from data_tools.writers.ledger import Expense
from data_tools.writers.options import ImageTokens, OpenAIBatchOptions, OpenAIOptions
from data_tools.writers.request import expense, text_tokens


@pytest.mark.parametrize(
    ("width", "height", "detail", "tokens"),
    [
        # The three examples of OpenAI's guide.
        (1024, 1024, "high", 765),
        (2048, 4096, "high", 1105),
        (4096, 8192, "low", 85),
        # By hand: one tile; 513 pixels are two; the shortest side of a small picture isn't scaled up.
        (512, 512, "high", 255),
        (513, 512, "high", 425),
        (224, 224, None, 255),
        (768, 768, "auto", 765),
        (8, 6, None, 255),
    ],
)
def test_tiles(width, height, detail, tokens):
    assert ImageTokens().count(width, height, detail=detail) == tokens


@pytest.mark.parametrize(
    ("width", "height", "multiplier", "tokens"),
    [
        (1024, 1024, 1.0, 1024),  # OpenAI's example
        (1024, 1024, 1.62, 1659),
        (33, 32, 1.0, 2),
        (1800, 2400, 1.0, 1536),  # its second example has 1,452: the cap is an upper bound
    ],
)
def test_patches(width, height, multiplier, tokens):
    counted = ImageTokens(by="patches", multiplier=multiplier).count(width, height, detail="low")
    assert counted == tokens


def test_a_constant():
    assert ImageTokens(by="constant", constant=256).count(9999, 1, detail=None) == 256


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # Counted with InternLM2's vocabulary of 92,544 pieces.
        ("The chest X-ray shows an enlarged heart and small pleural effusions on both sides.", 19),
        ("这张胸部X光片显示心脏增大,双侧少量胸腔积液。", 17),
        (
            '{"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"], '
            '"additionalProperties": false}',
            31,
        ),
        ("x1=120, y1=45, x2=310, y2=288", 19),
    ],
)
def test_texts_are_counted_too_high_rather_than_too_low(text, tokens):
    assert tokens <= text_tokens(text) - 20 <= 2.6 * tokens


def test_an_expense_by_hand():
    price = OpenAIOptions(model="m", price={"input": 2.5, "output": 10, "cached_input": 1.25})
    assert expense(1000, 100, price).dollars == pytest.approx(0.0025 + 0.001)
    assert expense(1000, 100, price, cached_tokens=400).dollars == pytest.approx(
        600 * 2.5e-6 + 400 * 1.25e-6 + 100 * 10e-6
    )
    assert expense(1000, 100, price, cached_tokens=5000).dollars == pytest.approx(
        0.00125 + 0.001
    )  # no more than there are
    batch = OpenAIBatchOptions(model="m", price=price.price)
    assert expense(1000, 100, batch).dollars == pytest.approx(0.00175)
    assert expense(1000, 100, OpenAIOptions(model="m")) == Expense(1000, 100, 0.0)


def account(spent: Expense, **budget: float) -> Account:
    price = {"input": 1, "output": 1}
    return Account(OpenAIOptions(model="m", price=price, budget=budget), spent)


def test_an_account_reserves_before_and_settles_after():
    found = account(Expense(50, 0), tokens=100)
    assert found.fits(Expense(30, 20))
    assert not found.fits(Expense(30, 21))
    found.reserve(Expense(30, 10))
    assert not found.fits(Expense(6, 5))
    found.settle(Expense(30, 10), Expense(20, 5))
    assert (found.spent, found.reserved) == (Expense(70, 5), Expense())
    assert found.fits(Expense(25, 0))


def test_a_budget_of_many_small_sums_isnt_overdrawn_by_rounding():
    found = account(Expense(), dollars=1.0)
    for _ in range(9):
        found.reserve(Expense(1, 1, 0.1))
        found.settle(Expense(1, 1, 0.1), Expense(1, 1, 0.1))
    assert found.fits(Expense(1, 1, 0.1))
    assert not found.fits(Expense(1, 1, 0.1001))
