# SPDX-License-Identifier: Apache-2.0

"""Two runs on the same questions: which is better, and is it chance?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.results import RESULT_FILE, SCORES_FILE, Result, read_result, read_scores
from gmai_xtuner.evaluate.statistics import PairedTest, paired_test
from gmai_xtuner.evaluate.tables import NONE, Row, Table, percent, to_markdown

_KEY = ("benchmark", "variant", "protocol", "version", "scorer")
ResultKey = tuple[Any, ...]
"""A result's fields of these names."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One protocol and scorer that both runs have.

    Args:
        first, second: the results.
        test: over the questions that both have scored.
        only_first, only_second: questions that the other lacks.
        unanswered: questions of both that one of them gave no answer to, whatever the reason.
        means: mean scores over the questions compared, of the first and the second.
        unparsed: shares of their answers that were not understood.
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

    Args:
        common: compare the questions that both have, where they are not the same.

    Raises:
        EvaluationError: nothing in common, or different questions, or questions of one id that differ in
            words, options or gold answer.
    """
    one, two = results_in(first), results_in(second)
    shared = [key for key in one if key in two]
    if not shared:
        raise EvaluationError(
            f"{first} and {second} have no protocol and scorer in common: {_names(one)} against {_names(two)}"
        )
    return [_compare(one[key], two[key], common=common) for key in shared]


def results_in(folder: Path) -> dict[ResultKey, Path]:
    """Return every result under a folder by benchmark, variant, protocol, version and scorer.

    Raises:
        EvaluationError: there is none.
    """
    found: dict[ResultKey, Path] = {}
    for file in sorted(folder.rglob(RESULT_FILE)):
        one = read_result(file.parent)
        found[tuple(getattr(one, name) for name in _KEY)] = file.parent
    if not found:
        raise EvaluationError(f"no {RESULT_FILE} in or under {folder}: is it the --out of a run?")
    return found


def _compare(first: Path, second: Path, *, common: bool) -> Comparison:
    one, two = read_result(first), read_result(second)
    scores_one, scores_two = read_scores(first), read_scores(second)
    both = [name for name in scores_one if name in scores_two]
    only_first, only_second = len(scores_one) - len(both), len(scores_two) - len(both)
    if (only_first or only_second) and not common:
        raise EvaluationError(
            f"{first} and {second} are not about the same questions: {only_first} are only in the first, "
            f"{only_second} only in the second, {len(both)} in both. --common compares those in both"
        )
    for folder, scores in ((first, scores_one), (second, scores_two)):
        if any("question" not in scores[name] for name in both):
            raise EvaluationError(
                f"{folder / SCORES_FILE} does not say which questions its ids stand for: an earlier version "
                "has written it. Score its answers again (--score-only)"
            )
    others = [name for name in both if scores_one[name]["question"] != scores_two[name]["question"]]
    if others:
        raise EvaluationError(
            f"{first} and {second} are not about the same questions: {len(others)} of {len(both)} that have "
            f"one id differ in words, options or gold answer, the first is {others[0]}. Were the runs made "
            f"on different files? {dict(one.source)} against {dict(two.source)}"
        )
    pairs = [(scores_one[name], scores_two[name]) for name in both]
    answered = [pair for pair in pairs if all(one["value"] is not None for one in pair)]
    if not answered:
        raise EvaluationError(f"{first} and {second} have no scored question in common")
    n = len(answered)
    values = [[pair[side]["value"] for pair in answered] for side in (0, 1)]
    unparsed = [sum(pair[side]["parsed"] is None for pair in answered) for side in (0, 1)]
    return Comparison(
        one,
        two,
        paired_test(values[0], values[1]),
        only_first,
        only_second,
        unanswered=len(pairs) - n,
        means=(sum(values[0]) / n, sum(values[1]) / n),
        unparsed=(unparsed[0] / n, unparsed[1] / n),
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
            *(percent(mean) for mean in one.means),
            f"{100 * test.difference:+.2f}",
            f"{100 * ends.low:+.2f} to {100 * ends.high:+.2f}" if ends else NONE,
            *(str(test.first_better), str(test.second_better)),
            f"{test.p_value:.4f}" if test.p_value >= 0.0001 else f"{test.p_value:.1e}",
            *(test.method, *(percent(share) for share in one.unparsed)),
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
            notes.append(
                f"{name}: {one.unanswered} questions that a run has no answer to are left out."
            )
    left = sum(one.only_first + one.only_second for one in comparisons)
    if left:
        notes.append(f"{left} questions that only one run has are left out.")
    return to_markdown([Table("compare", "Two runs", _HEAD, tuple(rows), tuple(notes))])


def as_json(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Return what ``--json`` prints."""
    return [
        {
            **{name: getattr(one.first, name) for name in _KEY},
            "first": one.first.model_name,
            "second": one.second.model_name,
            **{name: getattr(one, name) for name in ("only_first", "only_second", "unanswered")},
            **dict(zip(("mean_first", "mean_second"), one.means, strict=True)),
            **dict(zip(("unparsed_first", "unparsed_second"), one.unparsed, strict=True)),
            **asdict(one.test),
        }
        for one in comparisons
    ]


def _names(results: Mapping[ResultKey, Path]) -> str:
    return ", ".join(f"{key[0]}-{key[1]} {key[2]}/{key[3]} {key[4]}" for key in results)
