# SPDX-License-Identifier: Apache-2.0

"""Two runs on the same questions: which is better, and is it chance?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.results import RESULT_FILE, Result, read_result, read_scores
from gmai_xtuner.evaluate.statistics import PairedTest, paired_test
from gmai_xtuner.evaluate.tables import NONE, Row, Table, percent, to_markdown

_KEY = ("benchmark", "variant", "protocol", "version", "scorer")
ResultKey = tuple[Any, ...]
"""A result's fields of these names."""
Found = tuple[Path, Result]
"""A result with the folder that it lies in."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One protocol and scorer that both runs have, tested over the questions that both have scored.

    ``only_first`` and ``only_second`` are questions that the other lacks, ``unanswered`` those of both that
    one gave no answer to; ``means`` are the scores compared, ``unparsed`` shares of answers not understood.
    """

    first: Result
    second: Result
    test: PairedTest
    only_first: int
    only_second: int
    unanswered: int
    means: tuple[float, float]
    unparsed: tuple[float, float]


def compare_runs(first: Path, second: Path, *, common: bool = False) -> list[Comparison]:
    """Compare what two runs have in common, by the folders of their ``--out``, or of one result in it.

    ``common`` compares the questions that both have, where they are not the same. An ``EvaluationError`` for
    nothing in common, different questions, or questions of one id that differ in words, options or gold
    answer.
    """
    one, two = results_in(first), results_in(second)
    shared = [key for key in one if key in two]
    if not shared:
        raise EvaluationError(
            f"{first} and {second} have no protocol and scorer in common: {_names(one)} against {_names(two)}"
        )
    return [_compare(one[key], two[key], common=common) for key in shared]


def results_in(folder: Path) -> dict[ResultKey, Found]:
    """Return every result under a folder, and its own folder, by the fields that tell results apart.

    An ``EvaluationError`` if there is none.
    """
    files = sorted(folder.rglob(RESULT_FILE))
    if not files:
        raise EvaluationError(f"no {RESULT_FILE} in or under {folder}: is it the --out of a run?")
    found = [(file.parent, read_result(file.parent)) for file in files]
    return {_key(result): (place, result) for place, result in found}


def _key(result: Result) -> ResultKey:
    return tuple(getattr(result, name) for name in _KEY)


def _names(results: Mapping[ResultKey, Found]) -> str:
    return ", ".join("{}-{} {}/{} {}".format(*key) for key in results)


def _compare(left: Found, right: Found, *, common: bool) -> Comparison:
    (first, one), (second, two) = left, right
    scores = [read_scores(first), read_scores(second)]
    both = [name for name in scores[0] if name in scores[1]]
    only_first, only_second = (len(found) - len(both) for found in scores)
    others = f"{first} and {second} are not about the same questions:"
    if (only_first or only_second) and not common:
        raise EvaluationError(
            f"{others} {only_first} are only in the first, {only_second} only in the second, {len(both)} in "
            "both. --common compares those in both"
        )
    pairs = [(scores[0][name], scores[1][name]) for name in both]
    different = [a["id"] for a, b in pairs if a["question"] != b["question"]]
    if different:
        raise EvaluationError(
            f"{others} {len(different)} of {len(both)} that have one id differ in words, options or gold "
            f"answer, the first is {different[0]}. Were the runs made on different files? {dict(one.source)} "
            f"against {dict(two.source)}"
        )
    answered = [pair for pair in pairs if all(side["value"] is not None for side in pair)]
    if not answered:
        raise EvaluationError(f"{first} and {second} have no scored question in common")
    n, sides = len(answered), list(zip(*answered, strict=True))
    values = [[score["value"] for score in side] for side in sides]
    means = sum(values[0]) / n, sum(values[1]) / n
    unparsed = [sum(score["parsed"] is None for score in side) / n for side in sides]
    test, unanswered = paired_test(*values), len(pairs) - n
    return Comparison(
        *(one, two, test, only_first, only_second, unanswered, means, (unparsed[0], unparsed[1]))
    )


_HEAD = (
    *("benchmark", "protocol", "scorer", "n", "first", "second", "first less second"),
    *("95 % interval", "first better", "second better", "p", "test"),
    *("unparsed %, first", "unparsed %, second"),
)


def as_text(comparisons: list[Comparison]) -> str:
    """Return a Markdown table and what must be said with it."""
    rows, names = [], comparisons[0]
    notes = [
        f"First: {names.first.model_name} ({names.first.model})",
        f"Second: {names.second.model_name} ({names.second.model})",
        "A difference above 0 says that the first scores higher.",
    ]
    for one in comparisons:
        test, first, ends = one.test, one.first, one.test.interval
        cells = (
            *(f"{first.protocol}/{first.version}", first.scorer, str(test.n)),
            *map(percent, one.means),
            f"{100 * test.difference:+.2f}",
            f"{100 * ends.low:+.2f} to {100 * ends.high:+.2f}" if ends else NONE,
            *(str(test.first_better), str(test.second_better)),
            f"{test.p_value:.4f}" if test.p_value >= 0.0001 else f"{test.p_value:.1e}",
            *(test.method, *map(percent, one.unparsed)),
        )
        rows.append(Row(f"{first.benchmark} {first.variant}", cells, "group"))
        name = f"{first.benchmark} {first.protocol} {first.scorer}"
        notes += [
            f"{name}: every answer of the {side} counts as wrong, {percent(share)} % of them since they were "
            "not understood."
            for side, mean, share in zip(("first", "second"), one.means, one.unparsed, strict=True)
            if mean == 0
        ]
        if one.unanswered:
            told = f"{one.unanswered} questions that a run has no answer to are left out."
            notes.append(f"{name}: {told}")
    if left := sum(one.only_first + one.only_second for one in comparisons):
        notes.append(f"{left} questions that only one run has are left out.")
    return to_markdown([Table("compare", "Two runs", _HEAD, tuple(rows), tuple(notes))])


def as_json(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Return what ``--json`` prints."""
    return [
        {
            **dict(zip(_KEY, _key(one.first), strict=True)),
            "first": one.first.model_name,
            "second": one.second.model_name,
            **{name: getattr(one, name) for name in ("only_first", "only_second", "unanswered")},
            "mean_first": one.means[0],
            "mean_second": one.means[1],
            "unparsed_first": one.unparsed[0],
            "unparsed_second": one.unparsed[1],
            **asdict(one.test),
        }
        for one in comparisons
    ]
