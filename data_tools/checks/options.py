"""What is asked of an answer: the section ``checks``."""

from __future__ import annotations

from pydantic import Field, model_validator

from data_tools.options import Options


class CheckOptions(Options):
    """Bounds of an accepted conversation. Lengths are in words; a Chinese character counts as one.

    Args:
        agreement: the label or a synonym is named, and no other label of the set is claimed.
        modality: no other modality is claimed.
        side: left and right are not contradicted where the annotation has a side.
        boxes: coordinates in an answer are those of the record.
        leaks: an answer doesn't speak of the annotation that it was given.
        min_words: of all answers of a caption or a text form together.
        max_words: of one answer.
        language_share: of the letters of all answers, at least so many are of the item's language.
        allowed_phrases: phrases that would count as a leak or a refusal, and don't for this corpus.
        further_leaks: phrases that count as a leak as well.
    """

    agreement: bool = True
    modality: bool = True
    side: bool = True
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
