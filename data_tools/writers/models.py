"""The writer of a job that asks a model, with the prompts and checks that belong to the job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.checks import check, check_translation
from data_tools.items import Conversation, Item, Problem, SourceContext
from data_tools.records import Record
from data_tools.worker import worker_taxonomy
from data_tools.writers import prompts
from data_tools.writers.endpoint import key_of
from data_tools.writers.openai_batch import OpenAIBatchWriter
from data_tools.writers.openai_writer import OpenAIWriter
from data_tools.writers.options import OpenAIBatchOptions, OpenAIOptions
from data_tools.writers.outcome import Task

if TYPE_CHECKING:
    from data_tools.job import Job


class JobPrompts:
    """`asking.Prompts` of a job.

    Args:
        job: its checks and taxonomy.
        grounded: whether prompts hold the annotation, and checks may use it.
    """

    def __init__(self, job: Job, *, grounded: bool) -> None:
        self._checks = job.checks
        self._taxonomy = worker_taxonomy(job.taxonomy)
        self._grounded = grounded

    def build(
        self, item: Item, record: Record, context: SourceContext, *, problems: Sequence[Problem]
    ) -> prompts.Prompt:
        return prompts.build(
            item, record, context, self._taxonomy, grounded=self._grounded, problems=problems
        )

    def translate(
        self,
        conversation: Conversation,
        item: Item,
        record: Record,
        context: SourceContext,
        *,
        problems: Sequence[Problem],
    ) -> prompts.Prompt:
        return prompts.translate(
            conversation, item, record, context, self._taxonomy, problems=problems
        )

    def read_answer(self, text: str, item: Item, record: Record) -> Conversation | Problem:
        try:
            return prompts.read_answer(text, item, record)
        except prompts.AnswerError as error:
            return Problem(error.reason, error.detail)

    def check(
        self, conversation: Conversation, item: Item, record: Record, context: SourceContext
    ) -> list[Problem]:
        return check(
            conversation,
            item,
            record,
            context,
            self._taxonomy,
            self._checks,
            grounded=self._grounded,
        )

    def check_translation(
        self, conversation: Conversation, original: Conversation, item: Item, context: SourceContext
    ) -> list[Problem]:
        return check_translation(conversation, original, context)


def model_writer(
    job: Job, *, grounded: bool, folder: Path | None = None
) -> OpenAIWriter | OpenAIBatchWriter:
    """The job's writer.

    Args:
        job: its writer is not the template writer.
        grounded: see `JobPrompts`.
        folder: below which the records' pictures are; default the corpus.
    """
    options = job.writer
    assert isinstance(options, OpenAIOptions)
    asked = JobPrompts(job, grounded=grounded)
    folder = folder or job.output
    if isinstance(options, OpenAIBatchOptions):
        return OpenAIBatchWriter(options, asked, folder=folder, job=str(job.output))
    return OpenAIWriter(options, asked, folder=folder, job=str(job.output))


def check_key(job: Job) -> None:
    """Raises:
    EndpointError: the environment has no key for the job's server.
    """
    assert isinstance(job.writer, OpenAIOptions)
    key_of(job.writer)


def question(job: Job, task: Task, *, grounded: bool) -> prompts.Prompt:
    """What the model is asked first about an item."""
    asked = JobPrompts(job, grounded=grounded)
    return asked.build(task.item, task.record, task.context, problems=())
