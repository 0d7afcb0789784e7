# SPDX-License-Identifier: Apache-2.0

"""What all sections of a job have in common: unknown keys are errors, values never change."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """A section of the job file. `job.load` turns pydantic's errors into errors with lines."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
