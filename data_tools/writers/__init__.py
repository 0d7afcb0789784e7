# SPDX-License-Identifier: Apache-2.0

"""Writers that ask a model: `model_writer` is the job's one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_tools.job import Job
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
    """Return the writer of a job that asks a model.

    Args:
        job: its writer is not the template writer.
        grounded: whether prompts hold the annotation, and checks may use it.
        folder: below which the records' images are; default the corpus.
    """
    # They need the libraries of the API.
    from data_tools.writers.openai_batch import OpenAIBatchWriter
    from data_tools.writers.openai_writer import OpenAIWriter
    from data_tools.writers.options import OpenAIBatchOptions, TemplateOptions

    options = job.writer
    assert not isinstance(options, TemplateOptions)
    prompts, folder, name = (
        prompts_of(job, grounded=grounded),
        folder or job.output,
        str(job.output),
    )
    if isinstance(options, OpenAIBatchOptions):
        return OpenAIBatchWriter(options, prompts, folder=folder, job=name)
    return OpenAIWriter(options, prompts, folder=folder, job=name)


def check_key(job: Job) -> None:
    """Raise an `EndpointError` if the environment lacks the key of the job's server."""
    from data_tools.writers.options import TemplateOptions

    assert not isinstance(job.writer, TemplateOptions)
    job.writer.key()
