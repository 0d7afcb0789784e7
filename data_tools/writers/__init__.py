# SPDX-License-Identifier: Apache-2.0

"""Writers that ask a model: `model_writer` is the job's one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools import licences
from data_tools.options import OpenAIBatchOptions, TemplateOptions

if TYPE_CHECKING:
    from data_tools.job import Job
    from data_tools.readers import SourceOptions
    from data_tools.writers.openai_batch import OpenAIBatchWriter
    from data_tools.writers.openai_writer import OpenAIWriter
    from data_tools.writers.prompts import Prompts


def prompts_of(job: Job, *, grounded: bool) -> Prompts:
    """Return what writes a job's prompts; ``grounded``: with the annotation in them."""
    from data_tools.worker import worker_taxonomy
    from data_tools.writers.prompts import Prompts

    return Prompts(job.checks, worker_taxonomy(job.taxonomy), grounded=grounded)


def model_writer(
    job: Job, *, grounded: bool, folder: Path | None = None
) -> OpenAIWriter | OpenAIBatchWriter:
    """Return the writer of a job that asks a model; images lie below ``folder``, or in the corpus."""
    # These need the libraries of the API.
    from data_tools.writers.openai_batch import OpenAIBatchWriter
    from data_tools.writers.openai_writer import OpenAIWriter

    options = job.writer
    assert not isinstance(options, TemplateOptions)
    prompts = prompts_of(job, grounded=grounded)
    folder, name = folder or job.output, str(job.output)
    origins = licences.Origins(job)
    if isinstance(options, OpenAIBatchOptions):
        return OpenAIBatchWriter(options, prompts, folder=folder, job=name, origins=origins)
    return OpenAIWriter(options, prompts, folder=folder, job=name, origins=origins)


def check_sending(job: Job, sources: Iterable[SourceOptions]) -> None:
    """Check that what these sources hold may go to the server of the job's writer, before any is read.

    An `EndpointError` if one of them may not; the first is named, with what to do.
    """
    url = getattr(job.writer, "base_url", None)
    origins = [licences.permission_to_send(source, job.agreements) for source in sources]
    if url is not None and any(origin.forbidden for origin in origins):
        from gmai_xtuner.core.sending import Guard

        Guard(url).check(origins)
