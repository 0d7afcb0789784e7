# SPDX-License-Identifier: Apache-2.0

"""The sections of a job but for its sources and writer; unknown keys are errors, values never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


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
                raise ValueError(
                    f"{kind!r} is no kind of perception; known are {', '.join(PERCEPTION_KINDS)}"
                )
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {kind} must be 0 or more, got {weight}")
        return value

    @model_validator(mode="after")
    def _sensible(self) -> MakeOptions:
        fewest, most = self.dialogue_turns
        if not 2 <= fewest <= most <= 10:
            raise ValueError(
                "dialogue_turns must be the fewest and the most questions, from 2 to 10, "
                f"got [{fewest}, {most}]"
            )
        if self.perception and not any(self.perception_kinds.values()):
            raise ValueError(
                "perception_kinds leaves nothing to draw: name a kind, or set perception: 0"
            )
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
