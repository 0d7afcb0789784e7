# SPDX-License-Identifier: Apache-2.0

"""How sure a score is: bootstrap intervals, and the paired test between two runs on the same questions.

The exact test is scipy's binomial distribution. Bootstrap and permutation test are our own: 10,000 draws over
89,000 questions take scipy minutes and gigabytes; drawn by the counts of equal scores they take 0.1 s.

Shapes: ``n`` questions, ``R`` resamples, ``U`` different values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
_CELLS = 4_000_000
"""Numbers of a block of resamples: bounds the memory, whatever ``n`` is."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Ends of a confidence interval."""

    low: float
    high: float


def interval_of(groups: Sequence[Sequence[float] | np.ndarray]) -> Interval | None:
    """Return the interval of the mean over the means of groups: the bootstrap's, or the exact one.

    Where all scores are 1, or all 0, the bootstrap gives a point, as if the score were certain. There Clopper
    and Pearson's interval is taken: after ``n`` right answers of ``n`` from (alpha / 2)^(1 / n) to 1, after
    none from 0 to 1 - (alpha / 2)^(1 / n); over several groups the mean of theirs, which is wider than it
    must be. None where a group has fewer than two questions.
    """
    found = bootstrap(groups)
    values = {float(value) for group in groups for value in group}
    if found is None or values not in ({0.0}, {1.0}):
        return found
    missed = sum(_unseen(len(group)) for group in groups) / len(groups)
    return Interval(0.0, missed) if values == {0.0} else Interval(1 - missed, 1.0)


def _unseen(n: int) -> float:
    """Return Clopper and Pearson's upper end for what was seen in none of ``n`` questions."""
    return 1 - ((1 - CONFIDENCE) / 2) ** (1 / n)


def bootstrap(groups: Sequence[Sequence[float] | np.ndarray]) -> Interval | None:
    """Return the percentile interval of the mean over the means of groups, drawn over questions.

    The questions of each group are drawn with replacement, so many as there are: how often each different
    value is drawn is multinomial. The same numbers give the same interval; None as :func:`interval_of`.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or min(len(array) for array in arrays) < 2:
        return None
    rng = np.random.default_rng(SEED)
    means = np.sum([_resampled_means(array, rng) for array in arrays], axis=0)
    return _ends(means / len(arrays))


def _ends(resampled: np.ndarray) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return ``[R]`` means of ``n`` values drawn with replacement."""
    unique, counts = np.unique(values, return_counts=True)
    n, shares = len(values), counts / len(values)
    sums = [rng.multinomial(n, shares, size=size) @ unique for size in _blocks(len(unique))]
    return np.concatenate(sums) / n


def _blocks(width: int) -> Iterator[int]:
    """Yield how many resamples are drawn at once, of ``width`` numbers each."""
    block = max(1, _CELLS // width)
    yield from (min(block, RESAMPLES - start) for start in range(0, RESAMPLES, block))


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two runs on the same questions.

    ``method`` is ``mcnemar`` (exact) where all scores are 0 or 1, else ``permutation``. ``difference`` is the
    mean of the first less that of the second, ``interval`` its by :func:`bootstrap`; where right and wrong
    answers differ in no question, or in all of them the same way, by Clopper and Pearson's bound on the
    others.
    """

    method: Literal["mcnemar", "permutation"]
    n: int
    difference: float
    interval: Interval | None
    p_value: float
    first_better: int
    second_better: int


def paired_test(first: Iterable[float], second: Iterable[float]) -> PairedTest:
    """Compare two runs' scores of the same questions; a ``ValueError`` where they are no pairs, or none."""
    one, two = np.asarray(list(first), np.float64), np.asarray(list(second), np.float64)
    if one.shape != two.shape or not len(one):
        raise ValueError(f"a paired test needs pairs, got {len(one)} and {len(two)} scores")
    differences = one - two
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    binary = bool(np.isin(np.concatenate([one, two]), (0.0, 1.0)).all())
    interval = bootstrap([differences])
    if binary and interval is not None and len(np.unique(differences)) == 1:
        # A share of questions may differ from all of these, by 1 from no difference, by up to 2 from 1.
        seen = float(differences[0])
        reach = _unseen(len(one)) * (2 if seen else 1)
        interval = Interval(max(-1.0, seen - reach), min(1.0, seen + reach))
    return PairedTest(
        method="mcnemar" if binary else "permutation",
        n=len(one),
        difference=float(differences.mean()),
        interval=interval,
        p_value=mcnemar(better, worse) if binary else permutation(differences),
        first_better=better,
        second_better=worse,
    )


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the exact two-sided p-value of McNemar's test, from what only one of the runs has right."""
    from scipy.special import bdtr  # scipy.stats alone takes a second to import

    total, fewer = first_only + second_only, min(first_only, second_only)
    return min(1.0, 2 * float(bdtr(fewer, total, 0.5)))


def permutation(differences: np.ndarray) -> float:
    """Return the two-sided p-value of the paired permutation test: random signs of the differences ``[n]``.

    Of each different size the number of positive signs is binomial. The outcome itself counts as one of the
    draws, so that p is never 0.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    generator = np.random.default_rng(SEED)
    observed = abs(float(differences.sum()))
    extreme = 0
    for size in _blocks(len(sizes)):
        sums = (2 * generator.binomial(counts, 0.5, size=(size, len(sizes))) - counts) @ sizes
        # Sums of the same numbers in another order differ by rounding.
        extreme += int((np.abs(sums) >= observed * (1 - 1e-9)).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def calibration_error(
    confidence: np.ndarray, right: np.ndarray, *, bins: int = 10
) -> tuple[float, Interval | None]:
    """Return the expected calibration error and its bootstrap interval, which leans upwards in small samples.

    The mean over ``bins`` equally wide bins, weighted by their questions, of |confidence - score| (Guo and
    others, "On Calibration of Modern Neural Networks", 2017). Confidences ``[n]`` count in hundredths; scores
    ``[n]`` are from 0 to 1.
    """
    pairs = np.stack([np.round(confidence, 2), right], axis=1)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    place = np.minimum((unique[:, 0] * bins).astype(int), bins - 1)
    gaps = np.zeros((len(unique), bins))  # [U, bins]
    gaps[np.arange(len(unique)), place] = unique[:, 0] - unique[:, 1]
    n = len(pairs)
    drawn = np.random.default_rng(SEED).multinomial(n, counts / n, size=RESAMPLES)
    error = float(np.abs(counts @ gaps).sum() / n)
    return error, _ends(np.abs(drawn @ gaps).sum(axis=1) / n) if n > 1 else None


def area_under_risk_coverage(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean share of wrong answers among the ``k`` surest, over every ``k``; 0 is best.

    Equally sure answers count with their mean, so that their order does not matter.
    """
    _, place = np.unique(-confidence, return_inverse=True)
    means = np.bincount(place, 1 - right) / np.bincount(place)
    risks = means[np.sort(place)].cumsum() / np.arange(1, len(right) + 1)
    return float(risks.mean())
