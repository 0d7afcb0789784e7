# SPDX-License-Identifier: Apache-2.0

"""Why two numbers of one model differ: average, questions counted, prompt, reading or judge.

The same answers give 74.0 in one kit and 50.0 in another. Each score of a run is compared with the first
of its benchmark, step by step from one to the other, so that the parts add up to the difference:

1. average: the headline may be a mean over groups, the rest is over questions;
2. split: the questions that only one of both counts;
3. judge: what a judge has changed;
4. prompt: other answers to the same questions, read by the same rules;
5. reading: other rules on the same answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.compare import results_in
from gmai_xtuner.evaluate.results import Result, read_scores
from gmai_xtuner.evaluate.tables import Row, Table, percent

PARTS = ("average", "split", "judge", "prompt", "reading")


@dataclass(frozen=True)
class Side:
    """One score of a run.

    Args:
        values: scores of its questions by id, without those that have none.
        answers: what was answered to these.
    """

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
    """Score of ``first`` less score of ``second``, and its parts, from 0 to 1.

    Args:
        common: questions that both have scored.
        parts: name, see :data:`PARTS` -> its share of the difference; they add up to it.
    """

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
    for run in runs:
        for folder, result in results_in(run).values():
            key = (result.benchmark, result.variant)
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
    head = ("scores", "n", "common", "score %", "first %", "difference", *PARTS)
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


def as_json(differences: Collection[Difference]) -> list[dict[str, Any]]:
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
