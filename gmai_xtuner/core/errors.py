# SPDX-License-Identifier: Apache-2.0

"""Errors of both products: each says what is wrong, where, and what to do about it."""

from __future__ import annotations


class GMAIError(ValueError):
    """Base of the project's own errors."""


class DataError(GMAIError):
    """One record of one dataset can't be used: what was expected, what came, where, and what to do.

    ``record`` is its id, or its line or position in the file; ``reason`` a short stable key under which
    skipped records are counted, e.g. ``"missing_image"``.
    """

    def __init__(
        self,
        problem: str,
        *,
        dataset: str | None = None,
        record: str | None = None,
        remedy: str | None = None,
        reason: str = "bad_record",
    ) -> None:
        self.problem, self.dataset, self.record = problem, dataset, record
        self.remedy, self.reason = remedy, reason
        named = (f"dataset {dataset!r}" if dataset else "", f"record {record}" if record else "")
        place = ", ".join(filter(None, named))
        message = f"{place}: {problem}" if place else problem
        super().__init__(f"{message.rstrip('.')}. {remedy}" if remedy else message)


class ImageError(DataError):
    """An image can't be opened, is too large, or is damaged."""


class ArchiveError(GMAIError):
    """An archive of images can't be read as a whole, or is another one than was indexed."""


class Unusable(GMAIError):
    """An image, a volume or an annotation that can't be used; whoever reads many of them leaves it out.

    It is counted under ``reason``; ``detail`` is particular to this one, and never who the patient is.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class MixtureError(GMAIError):
    """The mixture file is invalid; the message has the file, the line and the remedy."""


class ModelLoadError(GMAIError):
    """A checkpoint does not fit the model that is to take it; the message names the keys."""


class EvaluationError(GMAIError):
    """An evaluation can't begin, go on or be scored; the message says what to do."""


class CorpusError(GMAIError):
    """A job of the corpus builder stops; its command prints the text and exits with status 1."""


class JobError(CorpusError):
    """The job file is wrong; the text begins with file and line."""


class SourceError(CorpusError):
    """A source can't be read as a whole: no folder, a table without the column that the job names."""


class EndpointError(CorpusError):
    """The endpoint refuses every request: a wrong key, an unknown model."""


def is_unicode(text: str) -> bool:
    """Tell whether UTF-8 can hold a text: JSON, YAML and file names can bring half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
