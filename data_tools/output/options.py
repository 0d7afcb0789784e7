"""The job's section ``corpus``: what the output folder holds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_tools.options import Options

Demand = Literal[
    "attribution", "share-alike", "non-commercial", "no-derivatives", "agreement", "unknown"
]


class OutputOptions(Options):
    """What the corpus folder holds beside the conversations.

    Args:
        held_out: share of the patients, cases, videos, slides or single pictures that is written to
            ``held_out/`` and is in no training file; 0 holds out nothing.
        near_duplicates: pictures whose 64-bit perceptual hashes differ in at most so many bits are put on
            the same side; every picture is then decoded once. Default: identical pictures only.
        parquet: write each conversation file as Parquet too, beside the JSONL file.
        prompts: write ``prompts.jsonl``: the exact prompt and answer of each conversation that a model wrote.
        licences: keep sources under these licences only, as the job names them; case, spaces and hyphens
            don't matter. Default: all.
        refuse: leave out sources whose licence makes one of these demands; ``agreement`` is a licence
            that is granted to a person, ``unknown`` one that isn't recognised.
        examples: how many conversations the report shows; as many rejected ones at most.
    """

    held_out: float = Field(default=0.05, ge=0, le=0.5)
    near_duplicates: int | None = Field(default=None, ge=0, le=4)
    parquet: bool = False
    prompts: bool = False
    licences: tuple[str, ...] | None = None
    refuse: tuple[Demand, ...] = ()
    examples: int = Field(default=24, ge=0, le=200)
