# SPDX-License-Identifier: Apache-2.0

"""What a source as a whole is refused for once it was read: no record, or labels that are no names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from data_tools.readers import SourceOptions
from data_tools.readers.files import listed
from data_tools.records import Drop

MOST_REASONS = 5

_CODE = re.compile(
    r"(?:(?:label|class|category|segment|structure|region|object|mask|roi|id|value|code)[\s_.#-]*)?"
    r"[-+]?\d+(?:[.,]\d+)?",
    re.IGNORECASE,
)


def is_code(label: str) -> bool:
    """Return whether a label is a number, or a numbered word that says nothing: ``7``, ``Segment_1``."""
    return _CODE.fullmatch(label) is not None


def refusal(source: SourceOptions, labels: Sequence[str], drops: Iterable[Drop]) -> str | None:
    """Return why nothing is said of a source, for its error; None if nothing speaks against it.

    Args:
        source: of the job.
        labels: of its records.
        drops: all that was left out of it.
    """
    if not labels:
        return f"source {source.name!r} has no record. {_reasons(drops)}"
    codes = [label for label in labels if is_code(label)]
    if not codes or source.codes_are_names:
        return None
    return (
        f"source {source.name!r} has labels that are no names: {listed(codes, at_most=60)}. Its records are "
        "kept, but no text is made of them. Say what they are, "
        f"`labels: {{{codes[0]!r}: ...}}`, or that they are meant so, `codes_are_names: true`."
    )


def _reasons(drops: Iterable[Drop]) -> str:
    found: dict[str, list[Drop]] = {}
    for drop in drops:
        found.setdefault(drop.reason, []).append(drop)
    if not found:
        return "Nothing was read from it: correct `root` and the patterns of its files."
    shown = "; ".join(
        f"{reason} ({len(of_reason)}, such as {': '.join(filter(None, (one.where, one.detail)))})"
        for reason, of_reason in list(found.items())[:MOST_REASONS]
        for one in of_reason[:1]
    )
    return f"All was left out: {shown}."
