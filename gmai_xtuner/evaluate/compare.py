# SPDX-License-Identifier: Apache-2.0

"""Two runs on the same questions: which is better, and is it chance? And why do two numbers differ?

The same answers give 74.0 in one kit and 50.0 in another. :func:`reconcile` compares each score of a run with
the first of its benchmark, step by step from one to the other, so that the parts add up to the difference:

1. average: the headline may be a mean over groups, the rest is over questions;
2. split: the questions that only one of both counts;
3. judge: what a judge has changed;
4. prompt: other answers to the same questions, read by the same rules;
5. reading: other rules on the same answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.results import RESULT_FILE, Result, read_result, read_scores
from gmai_xtuner.evaluate.statistics import PairedTest, paired_test
from gmai_xtuner.evaluate.tables import NONE, Row, Table, percent, to_markdown

_KEY = ("benchmark", "variant", "protocol", "version", "scorer", "scorer_version")
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
            f"{first} and {second} have no protocol and scorer of one version in common: {_names(one)} "
            f"against {_names(two)}. Stored answers are scored anew by --score-only"
        )
    return [_compare(one[key], two[key], common=common) for key in shared]


def results_in(folder: Path) -> dict[ResultKey, Found]:
    """Return every result under a folder, and its own folder, by the fields that tell results apart.

    An ``EvaluationError`` if there is none, or two that these don't tell apart.
    """
    files = sorted(folder.rglob(RESULT_FILE))
    if not files:
        raise EvaluationError(f"no {RESULT_FILE} in or under {folder}: is it the --out of a run?")
    found: dict[ResultKey, Found] = {}
    for place in (file.parent for file in files):
        result = read_result(place)
        other, _ = found.setdefault(_key(result), (place, result))
        if other != place:
            raise EvaluationError(
                f"{other} and {place} are two results of one benchmark, protocol and scorer. Name one of them"
            )
    return found


def _key(result: Result) -> ResultKey:
    return tuple(getattr(result, name) for name in _KEY)


def _names(results: Mapping[ResultKey, Found]) -> str:
    return ", ".join("{}-{} {}/{} {}/{}".format(*key) for key in results)


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


# Why the numbers differ

_PARTS = ("average", "split", "judge", "prompt", "reading")


@dataclass(frozen=True)
class Side:
    """One score of a run: ``values`` of its questions by id, where they have one, and their ``answers``."""

    run: Path
    result: Result
    values: Mapping[str, float]
    answers: Mapping[str, str]

    @property
    def rule(self) -> str:
        return self.result.scorer.partition("+")[0]

    @property
    def judge(self) -> str:
        return self.result.scorer.partition("+")[2]

    def mean(self, questions: Collection[str]) -> float:
        return sum(self.values[one] for one in questions) / len(questions)


@dataclass(frozen=True)
class Difference:
    """Score of ``first`` less score of ``second``, from 0 to 1; its ``parts``, see above, add up to it."""

    first: Side
    second: Side
    common: int
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def reconcile(runs: Collection[Path]) -> list[Difference]:
    """Compare every score under the folders of runs with the first score of the same benchmark and variant.

    An ``EvaluationError`` if there is none, two have no question in common, questions of one id differ, or a
    step between two can't be made, since these answers were never read by those rules.
    """
    sides: dict[tuple[str, str], list[Side]] = {}
    words: dict[tuple[str, str, str], str] = {}
    versions: dict[str, int] = {}
    for run in runs:
        for folder, result in results_in(run).values():
            key = (result.benchmark, result.variant)
            rule, version = result.scorer.partition("+")[0], result.scorer_version
            if versions.setdefault(rule, version) != version:
                raise EvaluationError(
                    f"{folder} was scored by version {version} of {rule}, an earlier result by version "
                    f"{versions[rule]}. Score the answers again (--score-only)"
                )
            values, answers = {}, {}
            for name, line in read_scores(folder).items():
                if words.setdefault((*key, name), line["question"]) != line["question"]:
                    raise EvaluationError(
                        f"{folder}: question {name} has other words, options or gold answer than in an "
                        "earlier result. Were the runs made on different files?"
                    )
                if line["value"] is not None:
                    values[name], answers[name] = float(line["value"]), line["answer"]
            if values:
                sides.setdefault(key, []).append(Side(run, result, values, answers))
    if not any(len(found) > 1 for found in sides.values()):
        raise EvaluationError("one score alone can't be compared. Score the answers by other rules, too: "
                              "--score-only --scorer all")  # fmt: skip
    return [_difference(found[0], other, found) for found in sides.values() for other in found[1:]]


def _difference(first: Side, second: Side, all_of_it: Collection[Side]) -> Difference:
    common = [name for name in first.values if name in second.values]
    if not common:
        raise EvaluationError(f"{_name(first)} and {_name(second)} have no question in common")

    def step(side: Side, rule: str) -> float:
        """Return the mean of the answers of a side by a rule without a judge."""
        for one in all_of_it:
            same = (one.run, one.result.protocol) == (side.run, side.result.protocol)
            whole = all(name in one.values for name in common)
            if same and one.rule == rule and not one.judge and whole:
                return one.mean(common)
        raise EvaluationError(
            f"{_name(side)}: its answers were not read by the rules of {rule}. Do so: --score-only "
            f"--protocol {side.result.protocol} --scorer {rule}"
        )

    own = [step(side, side.rule) for side in (first, second)]
    same_answers = all(first.answers[name] == second.answers[name] for name in common)
    crossed = own[0] if same_answers else step(second, first.rule)
    signs = ((first, 1), (second, -1))
    parts = {
        "average": sum(sign * (_headline(side) - side.mean(side.values)) for side, sign in signs),
        "split": sum(sign * (side.mean(side.values) - side.mean(common)) for side, sign in signs),
        "judge": sum(
            sign * (side.mean(common) - without)
            for (side, sign), without in zip(signs, own, strict=True)
        ),
        "prompt": own[0] - crossed,
        "reading": crossed - own[1],
    }
    return Difference(first, second, len(common), parts)


def _headline(side: Side) -> float:
    value = side.result.headline.value
    assert value is not None  # it has scored questions
    return value


def _name(side: Side) -> str:
    result = side.result
    return f"{side.run.name} {result.benchmark}-{result.variant} {result.protocol} {result.scorer}"


def table_of(differences: Collection[Difference]) -> Table:
    """Return the differences as a table in percent."""
    head = ("scores", "n", "common", "score %", "first %", "difference", *_PARTS)
    rows = []
    for one in differences:
        values = (one.second.result.headline.value, one.first.result.headline.value)
        shown = (
            *(str(len(one.second.values)), str(one.common), *map(percent, values)),
            *(f"{round(-100 * part, 2) + 0.0:+.2f}" for part in (one.total, *one.parts.values())),
        )
        rows.append(Row(_name(one.second), shown, "group"))
    firsts = dict.fromkeys(_name(one.first) for one in differences)
    notes = (f"Against {', '.join(firsts)}. The five parts add up to the difference.",)
    return Table("reconcile", "Why the numbers differ", head, tuple(rows), notes)


def differences_as_json(differences: Collection[Difference]) -> list[dict[str, Any]]:
    """Return what ``--json`` prints: differences are the second score less the first."""
    return [
        {
            "first": _name(one.first),
            "second": _name(one.second),
            "common": one.common,
            "difference": -one.total,
            **{name: -part for name, part in one.parts.items()},
        }
        for one in differences
    ]
