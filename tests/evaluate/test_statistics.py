# SPDX-License-Identifier: Apache-2.0

"""Intervals against scipy and closed forms, tests against values worked out by hand."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from gmai_xtuner.evaluate import statistics
from gmai_xtuner.evaluate.statistics import bootstrap, interval_of, mcnemar, paired_test


@pytest.fixture
def many(monkeypatch):
    """More draws, for comparisons with what has no chance in it."""
    monkeypatch.setattr(statistics, "RESAMPLES", 100_000)


def test_the_interval_of_right_and_wrong_answers_is_the_binomials(many):
    values = [1.0] * 70 + [0.0] * 30
    found = bootstrap([values])
    # A resampled mean of 0 and 1 is Binomial(n, p) / n.
    assert found.low == stats.binom.ppf(0.025, 100, 0.7) / 100 == 0.61
    assert found.high == stats.binom.ppf(0.975, 100, 0.7) / 100 == 0.79


def test_the_interval_of_shares_is_scipys(many):
    values = np.random.default_rng(3).choice([0, 0.25, 0.5, 1 / 3, 1], size=80)
    found = bootstrap([values])
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", rng=1
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.004)
    assert found.high == pytest.approx(theirs.high, abs=0.004)


def test_the_interval_of_a_macro_average_draws_within_each_group(many):
    small, large = [1.0] * 5 + [0.0] * 5, [1.0] * 800 + [0.0] * 200
    found = bootstrap([small, large])
    # Each group's mean has variance p (1 - p) / n, their mean a quarter of the sum.
    sigma = math.sqrt((0.25 / 10 + 0.16 / 1000) / 4)
    assert (found.low + found.high) / 2 == pytest.approx(0.65, abs=0.01)
    assert found.high - found.low == pytest.approx(2 * 1.96 * sigma, rel=0.06)
    pooled = bootstrap([small + large])
    assert pooled.high - pooled.low < 0.06 < found.high - found.low


def test_nothing_is_said_of_one_question_and_all_right_is_a_point():
    assert bootstrap([[1.0]]) is None
    assert bootstrap([[1.0, 1.0], [0.0]]) is None
    assert bootstrap([]) is None
    found = bootstrap([[1.0] * 20])
    assert (found.low, found.high) == (1.0, 1.0)


def test_all_right_or_all_wrong_is_not_certain():
    # 0.025^(1/2) = 0.158114; of 20, exp(ln(0.025) / 20) = exp(-0.184444) = 0.831566.
    two = interval_of([[1.0, 1.0]])
    assert (two.low, two.high) == (pytest.approx(0.158114, abs=1e-6), 1.0)
    twenty = interval_of([[0.0] * 20])
    assert (twenty.low, twenty.high) == (0.0, pytest.approx(0.168434, abs=1e-6))
    theirs = stats.binomtest(20, 20).proportion_ci(0.95, "exact")
    assert interval_of([[1.0] * 20]).low == pytest.approx(theirs.low, rel=1e-9)
    # Over groups the mean of theirs: (0.158114 + 0.831566) / 2.
    assert interval_of([[1.0] * 2, [1.0] * 20]).low == pytest.approx(0.494840, abs=1e-6)


def test_any_other_scores_have_the_bootstraps_interval():
    for groups in ([[1.0, 0.0, 1.0]], [[0.5] * 9], [[1.0] * 5, [0.0] * 5], [[1.0]], []):
        assert interval_of(groups) == bootstrap(groups)


def test_the_difference_of_runs_that_agree_everywhere_is_not_certain():
    same = paired_test([1, 0] * 10, [1, 0] * 10).interval
    assert (same.low, same.high) == pytest.approx((-0.168434, 0.168434), abs=1e-6)
    apart = paired_test([1] * 20, [0] * 20).interval
    assert (apart.low, apart.high) == (pytest.approx(0.663133, abs=1e-6), 1.0)  # 1 - 2 * 0.1684335


def test_a_benchmark_of_89_000_questions_takes_no_time():
    values = np.zeros(88_996)
    values[:80_000] = 1
    start = time.perf_counter()
    bootstrap([values])
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("first", "second"), [(0, 0), (0, 5), (9, 1), (600, 700), (12_000, 12_600)]
)
def test_mcnemar_is_scipys_binomial_test(first, second):
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-8)


def test_the_permutation_test_is_scipys(many):
    generator = np.random.default_rng(5)
    one, two = generator.choice([0, 0.5, 1], 60), generator.choice([0, 0.25, 1], 60)
    theirs = stats.permutation_test(
        (one, two),
        lambda a, b: (a - b).sum(),
        permutation_type="samples",
        n_resamples=20_000,
        rng=1,
    ).pvalue
    found = paired_test(one, two)
    assert found.method == "permutation"
    assert found.p_value == pytest.approx(theirs, abs=0.02)
    assert found.difference == pytest.approx(one.mean() - two.mean())


def test_right_and_wrong_answers_are_compared_by_mcnemar():
    one = [1, 1, 1, 1, 1, 1, 0, 0, 1, 0]
    two = [0, 0, 0, 0, 0, 1, 0, 0, 1, 0]
    found = paired_test(one, two)
    assert (found.method, found.n, found.first_better, found.second_better) == ("mcnemar", 10, 5, 0)
    assert found.p_value == pytest.approx(2 / 32)
    assert found.difference == pytest.approx(0.5)
    assert found.interval.low < 0.5 < found.interval.high


def test_pairs_are_needed():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_test([1, 0], [1])
