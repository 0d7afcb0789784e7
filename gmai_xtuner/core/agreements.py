# SPDX-License-Identifier: Apache-2.0

"""Which content may be handed to third parties: agreements by licence or name of a set, and origins.

``agreements.yaml`` is the built-in table; a job adds entries of its own. An `Origin` is what every request
that carries content names; `core.sending` lets nothing out without one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gmai_xtuner.core.yaml_lines import Document

_TABLE = Path(__file__).with_name("agreements.yaml")


@dataclass(frozen=True)
class Agreement:
    """One licence or agreement, by its name for messages, the card and the report.

    ``third_parties``: content may be sent to hosts of others; ``publish``: what is made of it may be passed
    on. ``licences`` are regular expressions on a licence's name, see `simplified`; ``datasets`` sets that are
    under it whatever licence is stated. ``text``, at ``url``, is what it says; ``read`` on which date, None:
    it couldn't be.
    """

    name: str
    third_parties: bool
    publish: bool
    licences: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    text: str = ""
    url: str = ""
    read: str | None = None

    def covers(self, licence: str, names: Iterable[str]) -> bool:
        """Tell whether it is meant by a licence, or covers a set that is called so."""
        stated = simplified(licence)
        called = [f" {simplified(name)} " for name in names]
        return any(re.fullmatch(pattern, stated) for pattern in self.licences) or any(
            f" {simplified(name)} " in one for name in self.datasets for one in called
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of content that is to be sent, named as in ``source 'chest'``.

    ``forbidden`` is why no third party may have it (empty: anyone may), but for ``hosts`` and this machine.
    """

    name: str
    forbidden: str = ""
    hosts: frozenset[str] = frozenset()


@cache
def table() -> tuple[Agreement, ...]:
    """Return the built-in agreements."""
    rows = Document(_TABLE, what="table of agreements").data
    return tuple(
        Agreement(**row | {key: tuple(row[key]) for key in ("licences", "datasets")})
        for row in rows
    )


def agreement_of(
    licence: str, names: Sequence[str], own: Sequence[Agreement] = ()
) -> Agreement | None:
    """Return the agreement that counts for a set, built-in or of a job; None: no entry covers it.

    ``licence`` as it is stated, or ""; ``names`` are the set's title, its name in the job, its address.
    """
    found = [one for one in (*table(), *own) if one.covers(licence, names)]
    found.sort(key=lambda one: (one.third_parties, one.publish))
    return found[0] if found else None


def benchmark_origin(names: str) -> Origin:
    """Return the origin of a benchmark's questions; free unless the table knows one of its names."""
    agreement = agreement_of("", [names])
    forbidden = "" if agreement is None or agreement.third_parties else agreement.name
    return Origin(f"the benchmark {names}", forbidden)


def simplified(name: str) -> str:
    """Return lower-case words and numbers: "CC-BY-NC 4.0" and "cc by nc 4.0" are the same."""
    return " ".join(re.findall(r"[a-z]+|\d+", name.casefold()))


def plain_host(text: str) -> str:
    """Return a host's name in small letters, an address in its shortest form and as IPv4 where it can be."""
    name = text.strip().lower().strip("[]").removesuffix(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    return str(getattr(address, "ipv4_mapped", None) or address)
