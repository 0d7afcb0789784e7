# SPDX-License-Identifier: Apache-2.0

"""Did the model look, and does its score hold? The same questions, asked again in five other ways.

docs/evaluation.md explains the controls and their flags, which need :data:`FEWEST` pairs of answers or more;
all intervals are of 95 %. What can't be asked so (no image, options that are images, no gold answer) is left
out of that control. All draws depend on the question's id alone, so that a run that goes on asks the same.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from gmai_xtuner.core.rng import Rng, seed_of
from gmai_xtuner.evaluate.protocols import Asked
from gmai_xtuner.evaluate.questions import IMAGE_MARK, ImageSource, Question, load_image
from gmai_xtuner.evaluate.results import Measure, Scored, reason_of, score_all
from gmai_xtuner.evaluate.scoring.mentions import polarity
from gmai_xtuner.evaluate.statistics import (
    area_under_risk_coverage,
    calibration_error,
    interval_of,
    paired_test,
)
from gmai_xtuner.evaluate.store import Answer, AnswerKey, Given

FEWEST = 50
"""Pairs below which nothing is flagged."""
GAIN = 0.05
"""What counts as a difference."""
NONE_ABOVE = "None of the above"
_NONE_ABOVE = re.compile(
    r"\s*(?:(?:none|no|neither|na|n/a)\.?|(?:none|neither) (?:of|is|are)\b.*|(?:以上)?[都皆均][不非].*)\s*",
    re.IGNORECASE,
)
_NEGATED = 'Is "no" the right answer to the question "{}"?'
_NEGATED_ZH = "对于问题“{}”，回答“否”正确吗？"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_DRAWS = 20


@dataclass(frozen=True, slots=True)
class BlankImage:
    """A grey image of the size of another."""

    source: ImageSource
    name: ClassVar[str] = "a blank image"

    def read(self) -> bytes:
        from PIL import Image

        from gmai_xtuner.core.imaging.images import opened

        with opened(load_image(self.source), self.name) as image:
            size = image.size
        out = io.BytesIO()
        Image.new("RGB", size, (127, 127, 127)).save(out, "PNG")
        return out.getvalue()


@dataclass(frozen=True)
class Control:
    """Questions asked in another way, with ids of their own, and the ids of those they were made of."""

    asked: Asked
    origins: tuple[str, ...]


def controls_of(asked: Asked, questions: Sequence[Question]) -> dict[str, Control]:
    """Return what the controls of a protocol ask, by their names, but for those that have no question.

    Images may be exchanged with any of the benchmark's questions.
    """
    donors: dict[int, list[Question]] = {}
    for question in questions:
        donors.setdefault(len(question.images), []).append(question)
    found: dict[str, list[tuple[str, Question]]] = {}
    for question in asked.questions:
        if question.answer is not None:
            for name, control in _controls(question, donors[len(question.images)]):
                found.setdefault(name, []).append((question.id, control))
    controls = {}
    for name, pairs in found.items():
        origins, changed = zip(*pairs, strict=True)
        controls[name] = Control(replace(asked, questions=changed, control=name), origins)
    return controls


def _controls(question: Question, donors: Sequence[Question]) -> Iterator[tuple[str, Question]]:
    rng = Rng(seed_of(question.id, 0))
    if question.images:
        blank = tuple(BlankImage(image) for image in question.images)
        yield "blank_image", replace(question, id=f"{question.id}#blank_image", images=blank)
        if (donor := _donor(question, donors, rng)) is not None:
            name = f"{question.id}#image_of={donor.id}"
            yield "other_image", replace(question, id=name, images=donor.images)
    if question.options and not any(IMAGE_MARK in text for text in question.options):
        order = tuple(rng.sample(question.options, len(question.options)))
        # Options that stand as they stood have an answer already.
        moved = replace(question, id=f"{question.id}#shuffled", options=order, gold_letter="")
        yield "shuffled", question if order == question.options else moved
        if not any(_NONE_ABOVE.fullmatch(text) for text in question.options):
            name = f"{question.id}#none_of_the_above"
            options = (NONE_ABOVE if text == question.answer else text for text in question.options)
            changed = replace(question, id=name, options=tuple(options), answers=())
            yield "none_of_the_above", replace(changed, answer=NONE_ABOVE)
    if (negated := _negated(question)) is not None:
        yield "negated", negated


def _donor(question: Question, donors: Sequence[Question], rng: Rng) -> Question | None:
    """Draw a question with other images, of another answer if there is one among the first draws."""
    drawn = [rng.pick(donors) for _ in range(_DRAWS)]
    others = [one for one in drawn if not set(one.images) & set(question.images)]
    return next((one for one in others if one.answer != question.answer), next(iter(others), None))


def _negated(question: Question) -> Question | None:
    meant = polarity(question.answer or "")
    if meant is None:
        return None
    chinese = _CHINESE.search(question.text) is not None
    opposite = {"yes": ("No", "否"), "no": ("Yes", "是")}[meant][chinese]
    if question.options:
        others = [text for text in question.options if text != question.answer]
        if len(others) != 1 or polarity(others[0]) in (None, meant):
            return None
        opposite = others[0]
    text = (_NEGATED_ZH if chinese else _NEGATED).format(question.text)
    name = f"{question.id}#negated"
    changed = replace(question, id=name, text=text, answer=opposite)
    return replace(changed, answers=(), gold_letter="")


def measure(
    scored: Sequence[Scored],
    controls: Mapping[str, Control],
    answers: Mapping[AnswerKey, Answer],
    failed: Mapping[str, Given],
) -> tuple[tuple[Measure, ...], tuple[str, ...], Mapping[str, int]]:
    """Return the numbers, the flags, and why questions of the controls have no answer.

    A question counts in a control where both its answers can be scored: that to the question as it is
    (``scored``), and that to the control's.
    """
    base = {one.question.id: one for one in scored}
    measures: list[Measure] = []
    unanswered: Counter[str] = Counter()
    for name, control in controls.items():
        found, missing = score_all(control.asked, answers)
        unanswered.update(reason_of(question, one, failed) for question, one in missing)
        ids = (question.id for question in control.asked.questions)
        origins = dict(zip(ids, control.origins, strict=True))
        originals = (base.get(origins[one.question.id]) for one in found)
        pairs = [(one, other) for one, other in zip(originals, found, strict=True) if one]
        if pairs:
            measures += _compared(name, pairs)
    measures += _calibration(scored)
    return tuple(measures), tuple(_flags(measures)), dict(unanswered)


_SHOWN = {
    "blank_image": ("image-blind score (blank image)", "gain over a blank image"),
    "other_image": ("score with another question's image", "gain over another image"),
    "shuffled": ("score with options shuffled", "score less that with options shuffled"),
    "none_of_the_above": ("score where none of the above is right", "score less that of none of the above"),
    "negated": ("score of negated questions", "score less that of negated questions"),
}  # fmt: skip


def _compared(name: str, pairs: Sequence[tuple[Scored, Scored]]) -> Iterator[Measure]:
    values = [(one.score.value or 0.0, other.score.value or 0.0) for one, other in pairs]
    score, less = _SHOWN[name]
    yield _mean(score, [other for _, other in values])
    test = paired_test(*zip(*values, strict=True))
    yield Measure(less, test.n, test.difference, test.interval, test.p_value)
    if name == "blank_image":
        yield _mean("grounded accuracy", [max(0.0, one - other) for one, other in values])
    if name == "shuffled":
        # An order that is the old one shows nothing of consistency.
        moved = [pair for pair in pairs if pair[0].question.id != pair[1].question.id]
        if moved:
            yield _mean("consistency (options shuffled)", _agreement(moved, _chosen_text))
        yield from _position_bias(pairs)
    if name == "negated":
        yield _mean("consistency (question negated)", _agreement(pairs, _chosen_polarity))


def _mean(name: str, values: Sequence[float]) -> Measure:
    return Measure(name, len(values), sum(values) / len(values), interval_of([values]))


def _agreement(
    pairs: Sequence[tuple[Scored, Scored]], chosen: Callable[[Scored], str | None]
) -> list[float]:
    """Return 1 for each pair whose answers say the same; what was not understood says nothing."""
    return [float(None is not chosen(one) == chosen(other)) for one, other in pairs]


def _chosen_text(one: Scored) -> str | None:
    return one.question.lettered().get(one.score.parsed or "")


def _chosen_polarity(one: Scored) -> str | None:
    """Return yes or no, turned round for a negated question."""
    said = polarity(_chosen_text(one) or one.score.parsed or "")
    if said is None or not one.question.id.endswith("#negated"):
        return said
    return "no" if said == "yes" else "yes"


def _position_bias(pairs: Sequence[tuple[Scored, Scored]]) -> Iterator[Measure]:
    """Yield how much more often than its share the favourite letter is chosen after shuffling.

    The favourite is found in the answers to the options as they stood, less the gold letters. After shuffling
    whatever a model thinks right stands anywhere as likely, so that without a bias the expectation is 0.
    """
    excess: Counter[str] = Counter()
    for one, _ in pairs:
        gold = one.question.gold_letters()
        excess.update({letter: -1 / len(gold) for letter in gold})
        if one.score.parsed in one.question.lettered():
            excess[str(one.score.parsed)] += 1
    favourite = max(sorted(excess), key=lambda letter: excess[letter], default="")
    values = [
        (other.score.parsed == favourite) - 1 / len(letters)
        for _, other in pairs
        if favourite in (letters := other.question.lettered()) and other.score.parsed in letters
    ]
    if values:
        yield _mean(f"position bias ({favourite} chosen over its share)", values)


def _calibration(scored: Sequence[Scored]) -> Iterator[Measure]:
    """Yield how well the probabilities of the chosen options fit the score, where there are any."""
    pairs = [(_confidence(one), one.score.value) for one in scored]
    found = [pair for pair in pairs if None not in pair]
    if not found:
        return
    sure, right = np.array(found, np.float64).T
    error, interval = calibration_error(sure, right)
    n = len(found)
    yield Measure("calibration error (ECE)", n, error, interval)
    yield _mean("confidence less score", np.round(sure - right, 2).tolist())
    yield Measure("area under the risk-coverage curve", n, area_under_risk_coverage(sure, right))
    ordered = right[np.argsort(-sure, kind="stable")]
    for part in (0.25, 0.5, 0.75):
        yield _mean(f"score of the surest {part:.0%}", ordered[: max(1, round(part * n))].tolist())


def _confidence(one: Scored) -> float | None:
    """Return the probability of what an answer was understood as; None where it isn't known."""
    shares, parsed = one.answer.probabilities, one.score.parsed
    if shares is None or parsed is None:
        return None
    if parsed in one.question.lettered():
        return shares.get(parsed)
    said = [share for label, share in shares.items() if polarity(label) == parsed]
    return sum(said) if said else None


def _flags(measures: Sequence[Measure]) -> Iterator[str]:
    gains = [one for one in measures if one.name.startswith("gain over a")]
    blind = sorted(gains, key=lambda one: one.name != "gain over another image")[:1]
    biased = [one for one in measures if one.name.startswith("position bias")]
    overconfident = [one for one in measures if one.name == "confidence less score"]
    for flag, found, more in (
        ("image-blind", blind, ": that the image helps is not shown"),
        ("position-biased", biased, ""),
        ("overconfident", overconfident, ""),
    ):
        for one in found:
            ends = one.interval
            if ends and one.n >= FEWEST and (ends.low <= GAIN) == (found is blind):
                points = (
                    f"{100 * one.value:.1f} points, {100 * ends.low:.1f} to {100 * ends.high:.1f}"
                )
                yield f"{flag} ({one.name} {points}, n = {one.n}{more})"
