# SPDX-License-Identifier: Apache-2.0

import pytest
from pydantic import TypeAdapter, ValidationError

from data_tools.options import ImageTokens, OpenAIBatchOptions, OpenAIOptions, WriterOptions
from data_tools.writers.asking import Account
from data_tools.writers.ledger import Expense
from data_tools.writers.request import expense, text_tokens
from tests.tables import tables

TABLES = tables(__file__)


@pytest.mark.parametrize(("width", "height", "detail", "tokens"), TABLES["tiles"])
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
    ("text", "tokens"), TABLES["texts_are_counted_too_high_rather_than_too_low"]
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


# --- options ---


read = TypeAdapter(WriterOptions).validate_python


def test_the_name_says_which():
    assert read({"name": "template"}).name == "template"
    assert type(read({"name": "openai", "model": "m"})) is OpenAIOptions
    assert type(read({"name": "openai_batch", "model": "m"})) is OpenAIBatchOptions


@pytest.mark.parametrize(("values", "message"), TABLES["what_makes_no_sense_is_refused"])
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        read(values)
