"""Errors that stop a job. They say where, what was expected, what came, and what to do."""

from __future__ import annotations


class CorpusError(ValueError):
    """Whatever makes a job stop; the command prints its text and exits with status 1."""


class JobError(CorpusError):
    """The job file is wrong; the text begins with file and line."""


class SourceError(CorpusError):
    """A source can't be read as a whole: a missing folder, a table without the column that the job names."""


class EndpointError(CorpusError):
    """The endpoint refuses every request: a wrong key, an unknown model."""
