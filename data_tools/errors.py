"""Moved to :mod:`gmai_xtuner.core.errors`; goes as soon as nothing imports it from here."""

from gmai_xtuner.core.errors import CorpusError, EndpointError, JobError, SourceError

__all__ = ["CorpusError", "EndpointError", "JobError", "SourceError"]
