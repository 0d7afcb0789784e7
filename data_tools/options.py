# SPDX-License-Identifier: Apache-2.0

"""The sections of a job but for its sources; unknown keys are errors, values never change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gmai_xtuner.core.http import key_of


class Options(BaseModel):
    """A section of the job file. `job.load` turns pydantic's errors into errors with lines."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


# Kind of visual perception -> weight in the draw. Modality and department are the same for all of a source
# and soon learnt, so they come less often.
PERCEPTION_KINDS: Mapping[str, float] = {
    "classification": 1.0,
    "detection": 1.0,
    "localisation": 1.0,
    "region": 1.0,
    "yes_no": 1.0,
    "multiple_choice": 1.0,
    "counting": 0.5,
    "modality": 0.25,
    "department": 0.25,
}


class MakeOptions(Options):
    """The section ``make``: how many conversations are made of a record; docs/corpus.md explains its keys.

    Of a number with a fraction the fraction is the share of the records that have one more. Which these are
    follows from the job's seed and the record's id.
    """

    caption: float = Field(1.0, ge=0, le=10)
    region_caption: float = Field(1.0, ge=0, le=100)
    instruction: float = Field(0.5, ge=0, le=10)
    dialogue: float = Field(0.5, ge=0, le=10)
    perception: float = Field(2.0, ge=0, le=10)
    text_single: float = Field(0.2, ge=0, le=10)
    text_multi: float = Field(0.2, ge=0, le=10)
    chinese: float = Field(0.2, ge=0, le=1)
    perception_kinds: dict[str, float] = Field(default_factory=lambda: dict(PERCEPTION_KINDS))
    dialogue_turns: tuple[int, int] = (2, 4)
    negatives: bool | None = None
    max_regions: int = Field(4, ge=1)
    max_boxes: int = Field(20, ge=1)

    @field_validator("perception_kinds", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        """A list of kinds stands for equal weights."""
        return dict.fromkeys(value, 1.0) if isinstance(value, list | tuple) else value

    @field_validator("perception_kinds")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for kind, weight in value.items():
            if kind not in PERCEPTION_KINDS:
                known = ", ".join(PERCEPTION_KINDS)
                raise ValueError(f"{kind!r} is no kind of perception; known are {known}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {kind} must be 0 or more, got {weight}")
        return value

    @model_validator(mode="after")
    def _sensible(self) -> MakeOptions:
        fewest, most = self.dialogue_turns
        if not 2 <= fewest <= most <= 10:
            expected = "the fewest and the most questions, from 2 to 10"
            raise ValueError(f"dialogue_turns must be {expected}, got [{fewest}, {most}]")
        if self.perception and not any(self.perception_kinds.values()):
            advice = "name a kind, or set perception: 0"
            raise ValueError(f"perception_kinds leaves nothing to draw: {advice}")
        return self


class CheckOptions(Options):
    """The section ``checks``: bounds of an accepted conversation; docs/corpus.md explains them.

    Lengths are in words, a Chinese character counts as one: ``min_words`` of all answers of a caption or a
    text form together, ``max_words`` of one answer. ``allowed_phrases`` would count as a leak or a refusal,
    ``further_leaks`` do as well.
    """

    agreement: bool = True
    modality: bool = True
    side: bool = True
    figures: bool = True
    boxes: bool = True
    leaks: bool = True
    min_words: int = Field(4, ge=1)
    max_words: int = Field(400, ge=1)
    language_share: float = Field(0.5, ge=0, le=1)
    allowed_phrases: tuple[str, ...] = ()
    further_leaks: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sensible(self) -> CheckOptions:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words is {self.min_words} and max_words {self.max_words}")
        return self


Demand = Literal[
    "attribution", "share-alike", "non-commercial", "no-derivatives", "agreement", "unknown"
]


class OutputOptions(Options):
    """The section ``corpus``: what the output folder holds; docs/corpus.md explains its keys."""

    held_out: float = Field(default=0.05, ge=0, le=0.5)
    near_duplicates: int | None = Field(default=None, ge=0, le=4)
    parquet: bool = False
    prompts: bool = False
    licences: tuple[str, ...] | None = None
    refuse: tuple[Demand, ...] = ()
    publishable: bool = False
    examples: int = Field(default=24, ge=0, le=200)


# --- writer: who writes, under which limits and for how much money ---------------------------------


class TemplateOptions(Options):
    """Sentences made from the annotation alone: no model, no key, no network."""

    name: Literal["template"] = "template"


class Price(Options):
    """Dollars a million tokens; ``cached_input`` for prompt tokens that the server had cached."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)


class Budget(Options):
    """The most that a job may cost over all of its runs, prompts and answers together; None: no bound.

    A request is sent only if it can't exceed the budget even at its greatest length. Requests whose answer
    never came (a time-out, a killed run) are counted as if they had had it: the server may bill them.
    """

    dollars: float | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)


class ImageTokens(Options):
    """The number of tokens of an image, as its server counts them; docs/corpus.md explains the keys."""

    by: Literal["tiles", "patches", "constant"] = "tiles"
    base: int = Field(default=85, ge=0)
    tile: int = Field(default=170, ge=0)
    multiplier: float = Field(default=1.0, gt=0)
    max_patches: int = Field(default=1536, ge=1)
    constant: int = Field(default=1024, ge=0)

    def count(self, width: int, height: int, *, detail: str | None) -> int:
        """Return the tokens of an image of ``width`` by ``height`` pixels as it is sent.

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


class ImageOptions(Options):
    """How an image is attached; docs/corpus.md explains the keys."""

    longest_side: int = Field(default=1024, ge=32)
    quality: int = Field(default=90, ge=0, le=95)
    detail: Literal["auto", "low", "high"] | None = None
    tokens: ImageTokens = ImageTokens()


_IN_VARIABLE = "name an environment variable in key_variable"


class OpenAIOptions(Options):
    """Any server that speaks the Chat Completions API, asked one conversation at a time.

    docs/corpus.md explains the keys. The key itself is never in the job, the ledger or a message.
    """

    name: Literal["openai"] = "openai"
    model: str = Field(min_length=1)
    terms: str = ""
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    max_tokens_name: Literal["auto", "max_completion_tokens", "max_tokens"] = "auto"
    structured: Literal["auto", "json_schema", "json_object", "text"] = "auto"
    seeded: bool = False
    chinese: Literal["direct", "translate"] = "direct"
    image: ImageOptions = ImageOptions()
    retries: int = Field(default=2, ge=0, le=10)
    in_flight: int = Field(default=16, ge=1, le=1024)
    requests_a_minute: float | None = Field(default=None, gt=0)
    tokens_a_minute: float | None = Field(default=None, gt=0)
    timeout: float = Field(default=180, gt=0)
    server_retries: int = Field(default=6, ge=0, le=50)
    patience: float = Field(default=900, gt=0)
    price: Price | None = None
    budget: Budget = Budget()
    cache: Path | None = None

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected an address such as http://localhost:8000/v1, got {value!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError(f"the address must not hold a key: {_IN_VARIABLE}")
        return value.rstrip("/")

    @field_validator("parameters")
    @classmethod
    def _are_free(cls, value: dict[str, Any]) -> dict[str, Any]:
        own = dict.fromkeys(("messages", "stream", "n"), "")
        own |= {name: name for name in ("model", "temperature", "top_p")}
        own |= dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_tokens_name")
        own |= {"seed": "seeded", "response_format": "structured"}
        for name in value:
            if name in own:
                instead = f"; its option is {own[name]}" if own[name] else ""
                raise ValueError(f"{name} is set by the writer and can't be a parameter{instead}")
            if "key" in name.lower() or "authorization" in name.lower():
                raise ValueError(f"{name} looks like a key: {_IN_VARIABLE}")
        return value

    @model_validator(mode="after")
    def _money_has_a_price(self) -> OpenAIOptions:
        if self.budget.dollars is not None and self.price is None:
            advice = "add price: {input: ..., output: ...}, dollars a million tokens"
            raise ValueError(f"a budget in dollars needs the price: {advice}")
        return self

    def key(self) -> str | None:
        """Return the key in the environment; None for a server that needs none.

        An `EndpointError` if there is none.
        """
        return None if self.key_variable is None else key_of(self.key_variable)


class OpenAIBatchOptions(OpenAIOptions):
    """The Batch API: submitted, polled and collected, if need be across several runs of the command."""

    name: Literal["openai_batch"] = "openai_batch"  # type: ignore[assignment]
    discount: float = Field(default=0.5, gt=0, le=1)
    max_requests: int = Field(default=50_000, ge=1, le=50_000)
    max_bytes: int = Field(default=200_000_000, ge=1_000, le=200_000_000)
    max_batches: int | None = Field(default=None, ge=1)
    wait: float = Field(default=0, ge=0)
    poll: float = Field(default=30, gt=0)


WriterOptions = Annotated[
    TemplateOptions | OpenAIOptions | OpenAIBatchOptions, Field(discriminator="name")
]
