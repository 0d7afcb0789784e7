# SPDX-License-Identifier: Apache-2.0

"""Errors of both products: each says what is wrong, where, and what to do about it."""

from __future__ import annotations


class GMAIError(ValueError):
    """Base of the project's own errors."""


class DataError(GMAIError):
    """One record of one dataset can't be used.

    Args:
        problem: what was expected and what came.
        dataset: name of the dataset in the mixture file.
        record: id of the record, or its line or position in the file.
        remedy: what the user can do.
        reason: short stable key under which skipped records are counted, e.g. ``"missing_image"``.
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
        self.problem = problem
        self.dataset = dataset
        self.record = record
        self.remedy = remedy
        self.reason = reason
        place = ", ".join(
            part
            for part in (
                f"dataset {dataset!r}" if dataset else "",
                f"record {record}" if record else "",
            )
            if part
        )
        message = f"{place}: {problem}" if place else problem
        if remedy:
            message = f"{message.rstrip('.')}. {remedy}"
        super().__init__(message)

    def at(self, *, dataset: str | None = None, record: str | None = None) -> DataError:
        """Return the same error with the place that its raiser could not know.

        Args:
            dataset: name of the dataset; what is already known stays.
            record: id, line or position of the record; what is already known stays.
        """
        return type(self)(
            self.problem,
            dataset=self.dataset or dataset,
            record=self.record or record,
            remedy=self.remedy,
            reason=self.reason,
        )

    def __reduce__(self):
        # Exceptions cross process boundaries (cache and data-loader workers) by pickling.
        return (
            _rebuild_data_error,
            (type(self), self.problem, self.dataset, self.record, self.remedy, self.reason),
        )


def _rebuild_data_error(cls, problem, dataset, record, remedy, reason):
    return cls(problem, dataset=dataset, record=record, remedy=remedy, reason=reason)


class ImageError(DataError):
    """An image can't be opened, is too large, or is damaged."""


class Unusable(GMAIError):
    """An image, a volume or an annotation that can't be used; whoever reads many of them leaves it out.

    Args:
        reason: same text for all of a kind, under which it is counted.
        detail: what is particular to this one; never who the patient is.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

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
