# SPDX-License-Identifier: Apache-2.0

"""Demands of a licence, read off its name, and what a job keeps, sends and publishes because of them.

Only the name is looked at, as the job states it. Nothing here is legal advice: a licence that isn't
recognised is called unknown, never free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from gmai_xtuner.core.agreements import Agreement, Origin, agreement_of, plain_host, simplified
from gmai_xtuner.core.errors import CorpusError

if TYPE_CHECKING:
    from data_tools.job import Job
    from data_tools.options import OutputOptions
    from data_tools.readers import SourceOptions

_KNOWN = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
DEMANDS: dict[str, str] = _KNOWN["demands"]
_VERSION = r"( licen[cs]e)?( v| version)?( \d+)*( universal| licen[cs]e)?"
_CREATIVE_COMMONS = re.compile(
    r"cc((?: (?:by|sa|nc|nd))+)(?: ([1-4])(?: ([05]))?)?"
    r"(?: (?:international|unported|generic|igo|public|licen[cs]e|deed))*"
)


@dataclass(frozen=True, slots=True)
class Licence:
    """``name`` as the job states it, ``hub_name`` in a dataset card, ``demands`` keys of `DEMANDS`."""

    name: str
    hub_name: str
    demands: tuple[str, ...]


def read(name: str) -> Licence:
    """Return what is known of a licence by its name, such as ``"CC BY-NC-SA 4.0"``."""
    simple = simplified(name)
    for words, part in _KNOWN["words"].items():
        simple = re.sub(rf"\b{words}\b", part, simple)
    if match := _CREATIVE_COMMONS.fullmatch(simple):
        parts = match[1].split()
        hub_name = f"cc-{'-'.join(parts)}-{match[2]}.{match[3] or 0}" if match[2] else "cc"
        return Licence(
            name,
            hub_name if hub_name in _KNOWN["hub_names"] else "cc",
            tuple(demand for part, demand in _KNOWN["parts"].items() if part in parts),
        )
    simple = simplified(name)
    for pattern, hub_name, demands in _KNOWN["fixed"]:
        if re.fullmatch(f"(?:{pattern}){_VERSION}", simple):
            return Licence(name, hub_name, tuple(demands))
    return Licence(name, "other", ("unknown",))


def refusal(licence: str, options: OutputOptions) -> str | None:
    """Return why the job leaves out a source under a licence, as it is stated, or None if it is kept."""
    allowed = options.licences
    if allowed is not None and simplified(licence) not in {simplified(one) for one in allowed}:
        return "licence is not in the job's list"
    refused = [demand for demand in read(licence).demands if demand in options.refuse]
    if refused:
        return f"licence is refused: {', '.join(refused)}"
    return None


def restriction(
    source: SourceOptions, own: Sequence[Agreement] = (), licence: str = "", *, publish: bool
) -> str:
    """Return why a source's content may not go to third parties, or with ``publish`` be published; else "".

    ``licence`` is a record's own, instead of the source's. One that neither the table of agreements (with the
    job's ``own``) nor `read` knows forbids both.
    """
    licence = licence or source.licence
    agreement = agreement_of(licence, (source.name, source.dataset, source.url), own)
    if agreement is not None:
        free = agreement.publish if publish else agreement.third_parties
        read_on = f" (read on {agreement.read}: {agreement.text})" if agreement.read else ""
        return "" if free else f"{agreement.name}{read_on}"
    closed = ("agreement", "unknown", *(("no-derivatives",) if publish else ()))
    found = [DEMANDS[demand] for demand in read(licence).demands if demand in closed]
    return f"the licence {licence!r}: {found[0]}" if found else ""


def permission_to_send(
    source: SourceOptions, own: Sequence[Agreement] = (), licence: str = ""
) -> Origin:
    """Return where the content of a source may go, or that of a record under a ``licence`` of its own."""
    own_licence = licence not in ("", source.licence)
    return Origin(
        f"the source {source.name}" + (f" under {licence!r}" if own_licence else ""),
        restriction(source, own, licence, publish=False),
        frozenset(plain_host(one.host) for one in source.may_be_sent_to),
    )


class Origins(dict[tuple[str, str], Origin]):
    """Source and licence of a record -> where its content may go."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job, self._sources = job, {source.name: source for source in job.sources}

    def __missing__(self, key: tuple[str, str]) -> Origin:
        made = self[key] = permission_to_send(self._sources[key[0]], self._job.agreements, key[1])
        return made


@dataclass(frozen=True, slots=True)
class Terms:
    """What a job says of a record whose licence is its own: the rules that hold for sources."""

    options: OutputOptions
    agreements: tuple[Agreement, ...]

    def refusal(self, licence: str, source: SourceOptions) -> str | None:
        """Return why the job leaves out a record of the source, or None if it is kept."""
        if (found := refusal(licence, self.options)) or not self.options.publishable:
            return found
        return restriction(source, self.agreements, licence, publish=True) or None


def publishable_part(job: Job) -> Job:
    """Return the job without the sources that may not be published, if it asks for that.

    Nothing of them is read then, and what an earlier run has left of them in the output is forgotten. A
    `CorpusError` if none is left.
    """
    if not job.corpus.publishable:
        return job
    reasons = [restriction(source, job.agreements, publish=True) for source in job.sources]
    kept = tuple(source for source, why in zip(job.sources, reasons, strict=True) if not why)
    if not kept:
        told = "; ".join(f"{s.name}: {why}" for s, why in zip(job.sources, reasons, strict=True))
        raise CorpusError(f"{job.path}: corpus.publishable leaves no source: {told}.")
    return job.model_copy(update={"sources": kept})
