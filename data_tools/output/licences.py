# SPDX-License-Identifier: Apache-2.0

"""Demands of a licence, read off its name, and what a job keeps, sends and publishes because of them.

Only the name is looked at, as the job states it. Nothing here is legal advice: a licence that isn't
recognised is called unknown, never free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gmai_xtuner.core.agreements import Agreement, Origin, agreement_of, plain_host, simplified

if TYPE_CHECKING:
    from data_tools.job import Job, OutputOptions
    from data_tools.readers import SourceOptions

DEMANDS = {
    "attribution": "name the authors and the licence with every copy",
    "share-alike": "pass on what is made from it under the same licence only",
    "non-commercial": "no commercial use",
    "no-derivatives": "what is made from it may not be passed on",
    "agreement": "granted to a person who has signed an agreement; may not be passed on",
    "unknown": "the terms are not known to this tool; read them before the corpus is used or passed on",
}

# Licences without parts: pattern of the simplified name -> (name on huggingface.co, demands).
_FIXED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"(cc|creative commons)( ?0| zero)( universal| public domain dedication)*", "cc0-1.0", ()),
    (r"public domain( mark| dedication)?|pddl|us government work", "pddl", ()),
    (r"mit", "mit", ("attribution",)),
    (r"apache", "apache-2.0", ("attribution",)),
    (r"bsd 2( clause)?", "bsd-2-clause", ("attribution",)),
    (r"bsd( 3( clause)?)?", "bsd-3-clause", ("attribution",)),
    (r"odc by|open data commons attribution", "odc-by", ("attribution",)),
    (r"(odc )?odbl|open database", "odbl", ("attribution", "share-alike")),
    (r"(gnu )?(a|l)?gpl( ?v)?", "gpl", ("attribution", "share-alike")),
    (r"cdla permissive", "cdla-permissive-2.0", ("attribution",)),
    (r"cdla sharing", "cdla-sharing-1.0", ("attribution", "share-alike")),
    (r".*\b(credentialed|restricted|data use agreement|dua)\b.*", "other", ("agreement",)),
)
_VERSION = r"( licen[cs]e)?( v| version)?( \d+)*( universal| licen[cs]e)?"
_PARTS = {"by": "attribution", "sa": "share-alike", "nc": "non-commercial", "nd": "no-derivatives"}
_WORDS = {
    "attribution": "by",
    "sharealike": "sa",
    "share alike": "sa",
    "noncommercial": "nc",
    "non commercial": "nc",
    "noderivatives": "nd",
    "noderivs": "nd",
    "no derivatives": "nd",
    "creative commons": "cc",
}
_CREATIVE_COMMONS = re.compile(
    r"cc((?: (?:by|sa|nc|nd))+)(?: ([1-4])(?: ([05]))?)?"
    r"(?: (?:international|unported|generic|igo|public|licen[cs]e|deed))*"
)
# Versions that have a name on huggingface.co; another version of a licence is "cc" there.
_HUB_NAMES = {
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
} | {
    f"cc-by-{parts}-{version}"
    for parts in ("nc", "nd", "nc-nd", "nc-sa")
    for version in ("2.0", "3.0", "4.0")
    if (parts, version) not in (("nc", "2.0"), ("nd", "2.0"), ("nd", "3.0"), ("nc-nd", "2.0"))
}


@dataclass(frozen=True, slots=True)
class Licence:
    """``name`` as the job states it, ``hub_name`` in a dataset card, ``demands`` keys of `DEMANDS`."""

    name: str
    hub_name: str
    demands: tuple[str, ...]


def read(name: str) -> Licence:
    """Return what is known of a licence by its name, such as ``"CC BY-NC-SA 4.0"``."""
    simple = simplified(name)
    for words, part in _WORDS.items():
        simple = re.sub(rf"\b{words}\b", part, simple)
    if match := _CREATIVE_COMMONS.fullmatch(simple):
        parts = match[1].split()
        hub_name = f"cc-{'-'.join(parts)}-{match[2]}.{match[3] or 0}" if match[2] else "cc"
        return Licence(
            name,
            hub_name if hub_name in _HUB_NAMES else "cc",
            tuple(demand for part, demand in _PARTS.items() if part in parts),
        )
    simple = simplified(name)
    for pattern, hub_name, demands in _FIXED:
        if re.fullmatch(f"(?:{pattern}){_VERSION}", simple):
            return Licence(name, hub_name, demands)
    return Licence(name, "other", ("unknown",))


def refusal(
    licence: str, options: OutputOptions, names: Sequence[str] = (), own: Sequence[Agreement] = ()
) -> str | None:
    """Return why the job leaves out a source under this licence, or None if it is kept.

    Args:
        licence: as it is stated.
        options: of the job.
        names: of the set.
        own: agreements of the job.
    """
    allowed = options.licences
    if allowed is not None and simplified(licence) not in {simplified(one) for one in allowed}:
        return "licence is not in the job's list"
    refused = [demand for demand in read(licence).demands if demand in options.refuse]
    if refused:
        return f"licence is refused: {', '.join(refused)}"
    if options.publishable and restriction(licence, names, own, publish=True):
        return "may not be published"
    return None


def restriction(
    licence: str, names: Sequence[str], own: Sequence[Agreement] = (), *, publish: bool
) -> str:
    """Return why content may not be published, or not be sent to third parties; empty if it may.

    A licence that neither the table of agreements nor `read` knows forbids both.

    Args:
        licence: as it is stated.
        names: of the set.
        own: agreements of the job.
        publish: ask for publishing what is made of it; else for sending it.
    """
    agreement = agreement_of(licence, names, own)
    if agreement is not None:
        free = agreement.publish if publish else agreement.third_parties
        read_on = f" (read on {agreement.read}: {agreement.text})" if agreement.read else ""
        return "" if free else f"{agreement.name}{read_on}"
    closed = ("agreement", "unknown", *(("no-derivatives",) if publish else ()))
    found = [DEMANDS[demand] for demand in read(licence).demands if demand in closed]
    return f"the licence {licence!r}: {found[0]}" if found else ""


def names_of(source: SourceOptions) -> tuple[str, ...]:
    """Return the names by which the table may know a set."""
    return (source.name, source.dataset, source.url)


def origin(source: SourceOptions, own: Sequence[Agreement] = ()) -> Origin:
    """Return where the content of a source may go."""
    return Origin(
        f"the source {source.name}",
        restriction(source.licence, names_of(source), own, publish=False),
        frozenset(plain_host(one.host) for one in source.may_be_sent_to),
    )


def refused_sources(job: Job) -> dict[str, str]:
    """Return why the job leaves out whole sources, by their names."""
    found = {
        source.name: refusal(source.licence, job.corpus, names_of(source), job.agreements)
        for source in job.sources
    }
    return {name: reason for name, reason in found.items() if reason}
