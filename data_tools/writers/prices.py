"""What requests cost, before and after they are sent: tokens of texts and pictures, dollars, the budget.

Before a request is sent it is counted at what it can cost at most; the server's own count replaces that as
soon as it is known.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from data_tools.options import Options

MILLION = 1_000_000
# Tokens that a chat template adds to a message and to a request; OpenAI's cookbook counts 3 and 3
# ("How to count tokens with tiktoken"), open models' templates up to about 10.
TOKENS_A_MESSAGE = 10
SINGLE = re.compile(rb"[0-9!-/:-@\[-`{-~]")


class Price(Options):
    """Dollars a million tokens; ``cached_input`` for prompt tokens that the server had cached."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)


class Budget(Options):
    """What a job may cost over all of its runs, prompt and answers together; None: no bound.

    A request is sent only if it can't exceed the budget even at its greatest length. Requests whose answer
    never came (a time-out, a killed run) are counted as if they had had it: the server may bill them.
    """

    dollars: float | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)


class ImageTokens(Options):
    """How many tokens a picture is.

    Args:
        by: ``tiles`` as OpenAI counts gpt-4o, gpt-4.1 and their like, ``patches`` as it counts the mini and
            nano models since gpt-4.1 and o4-mini, ``constant`` for other servers.
        base, tile: tokens of a picture and of each of its tiles: 85 and 170 for gpt-4o and gpt-4.1,
            75 and 150 for o1 and o3, 2833 and 5667 for gpt-4o-mini. With ``detail: low`` only the base.
        multiplier: of patches: 1.62 for gpt-4.1-mini, 2.46 for gpt-4.1-nano, 1.72 for o4-mini.
        max_patches: a larger picture is scaled down to so many.
        constant: for ``constant``.
    """

    by: Literal["tiles", "patches", "constant"] = "tiles"
    base: int = Field(default=85, ge=0)
    tile: int = Field(default=170, ge=0)
    multiplier: float = Field(default=1.0, gt=0)
    max_patches: int = Field(default=1536, ge=1)
    constant: int = Field(default=1024, ge=0)

    def count(self, width: int, height: int, *, detail: str | None) -> int:
        """Tokens of a picture of ``width`` by ``height`` pixels as it is sent.

        Source of both formulas: OpenAI, "Images and vision", section "Calculating costs"
        (https://platform.openai.com/docs/guides/images-vision). Tiles: scaled down to fit 2048 x 2048,
        then down to a shortest side of 768, then counted in squares of 512; without a ``detail`` it is
        counted as ``high``, the dearer one. Patches: squares of 32, at most ``max_patches``.
        """
        if self.by == "constant":
            return self.constant
        if self.by == "patches":
            patches = math.ceil(width / 32) * math.ceil(height / 32)
            return math.ceil(min(patches, self.max_patches) * self.multiplier)
        if detail == "low":
            return self.base
        scale = min(1.0, 2048 / max(width, height))
        scale = min(scale, 768 / min(width, height))
        tiles = math.ceil(round(width * scale, 6) / 512) * math.ceil(round(height * scale, 6) / 512)
        return self.base + self.tile * tiles


@dataclass(frozen=True, slots=True)
class Expense:
    """Tokens and dollars of one request or of many."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Expense) -> Expense:
        return Expense(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.dollars + other.dollars,
        )

    def __sub__(self, other: Expense) -> Expense:
        return Expense(
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
            self.dollars - other.dollars,
        )


def text_tokens(*texts: str) -> int:
    """At most so many tokens are these messages, with the template's own.

    Each ASCII digit and punctuation mark is counted as one token, as many vocabularies have them, and the
    rest as one token for two bytes of UTF-8. InternLM2's vocabulary needs one for 4.3 bytes of English prose,
    3.8 of Chinese and 1.5 of a list of coordinates, so that prose is counted at about twice the truth. Only
    words of a script that the vocabulary lacks could be more. OpenAI's own tokeniser would have to be
    downloaded and says nothing of other models.
    """
    data = "".join(texts).encode("utf-8", "surrogatepass")
    single = len(SINGLE.findall(data))
    return single + math.ceil((len(data) - single) / 2) + TOKENS_A_MESSAGE * (len(texts) + 1)


def expense(
    prompt_tokens: int,
    completion_tokens: int,
    price: Price | None,
    *,
    cached_tokens: int = 0,
    discount: float = 1.0,
) -> Expense:
    """Of one request; ``cached_tokens`` of the prompt's are charged at their own price if it has one."""
    if price is None:
        return Expense(prompt_tokens, completion_tokens)
    cached_price = price.input if price.cached_input is None else price.cached_input
    cached_tokens = min(max(cached_tokens, 0), prompt_tokens)
    dollars = (prompt_tokens - cached_tokens) * price.input + cached_tokens * cached_price
    dollars += completion_tokens * price.output
    return Expense(prompt_tokens, completion_tokens, dollars * discount / MILLION)


class Account:
    """What a job has spent and what its requests under way can still cost.

    Args:
        budget: over all runs.
        spent: by earlier runs.
    """

    def __init__(self, budget: Budget, spent: Expense) -> None:
        self.budget = budget
        self.spent = spent
        self.reserved = Expense()

    def fits(self, at_most: Expense) -> bool:
        """Whether the budget bears ``at_most`` besides what is spent and reserved."""
        total = self.spent + self.reserved + at_most
        dollars, tokens = self.budget.dollars, self.budget.tokens
        # Sums of many small floats: a billionth of a dollar is no overdraft.
        return (dollars is None or total.dollars <= dollars + 1e-9) and (
            tokens is None or total.tokens <= tokens
        )

    def reserve(self, at_most: Expense) -> None:
        self.reserved = self.reserved + at_most

    def settle(self, at_most: Expense, actual: Expense) -> None:
        """What was reserved as ``at_most`` has cost ``actual``."""
        self.reserved = self.reserved - at_most
        self.spent = self.spent + actual
