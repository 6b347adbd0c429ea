"""Intervals against scipy's own, closed forms, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mohd_train.study.statistics import bootstrap_documents, paired_t, paired_t_along


def test_paired_t_is_scipy_s() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(3.4, 0.1, 7), generator.normal(3.3, 0.1, 7)
    found = paired_t(a - b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(float(np.mean(a - b)))
    assert found.n == 7


def test_paired_t_of_two_by_hand() -> None:
    """t of one degree of freedom is Cauchy's: its 97.5% quantile is tan(0.475 pi)."""
    found = paired_t(np.array([0.1, 0.3]))
    half = math.tan(0.475 * math.pi) * 0.1  # s / sqrt(2) = (0.2 / sqrt 2) / sqrt 2
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert not found.excludes_zero


def test_one_seed_has_no_interval() -> None:
    found = paired_t(np.array([0.143]))
    assert (found.mean, found.low, found.high, found.n) == (0.143, None, None, 1)
    assert not found.excludes_zero
    mean, low, high = paired_t_along(np.array([[0.1, 0.2]]))
    assert mean.tolist() == [0.1, 0.2]
    assert np.isnan([*low, *high]).all()


def test_curves_are_paired_point_by_point() -> None:
    curves = np.random.default_rng(1).normal(size=(4, 5))
    mean, low, high = paired_t_along(curves)
    for place in range(5):
        one = paired_t(curves[:, place])
        assert (mean[place], low[place], high[place]) == pytest.approx((one.mean, one.low, one.high))


def test_bootstrap_of_equal_documents_is_the_normal_s() -> None:
    """With documents of equal length the ratio is a mean, whose bootstrap interval is the normal one for many documents."""
    generator = np.random.default_rng(2)
    tokens = np.full(2000, 100.0)
    difference = generator.normal(2.0, 5.0, 2000)  # summed over 100 tokens
    found = bootstrap_documents(difference, tokens, np.zeros(2000, int), draws=4000, seed=3)
    mean, error = difference.mean() / 100, difference.std() / 100 / math.sqrt(2000)
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_bootstrap_is_scipy_s_for_documents_of_unequal_length() -> None:
    generator = np.random.default_rng(4)
    tokens = generator.integers(20, 3000, 300).astype(float)
    difference = tokens * generator.normal(0.05, 0.2, 300)

    def ratio(d: np.ndarray, t: np.ndarray, axis: int) -> np.ndarray:
        return d.sum(axis=axis) / t.sum(axis=axis)

    expected = stats.bootstrap(
        (difference, tokens), ratio, paired=True, vectorized=True, method="percentile", n_resamples=9999, rng=5
    ).confidence_interval
    found = bootstrap_documents(difference, tokens, np.zeros(300, int), draws=9999)
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)
    assert found.mean == pytest.approx(difference.sum() / tokens.sum())


def test_domains_keep_their_documents() -> None:
    """What differs between domains but not within them is no uncertainty: the mix is fixed."""
    tokens, domain = np.full(40, 10.0), np.repeat([0, 1], 20)
    found = bootstrap_documents(np.where(domain == 0, 1.0, -3.0), tokens, domain)
    assert (found.low, found.mean, found.high) == pytest.approx((-0.1, -0.1, -0.1))
    mixed = bootstrap_documents(np.where(domain == 0, 1.0, -3.0), tokens, np.zeros(40, int))
    assert mixed.high - mixed.low > 0.05


def test_the_same_draws_each_time() -> None:
    data = np.random.default_rng(6).normal(size=50)
    one, two = (bootstrap_documents(data, np.full(50, 7.0), np.zeros(50, int)) for _ in range(2))
    assert one == two


def test_paired_t_covers_the_truth_95_times_in_a_hundred() -> None:
    draws = np.random.default_rng(7).normal(0.1, 0.03, size=(3, 20_000))
    _, low, high = paired_t_along(draws)
    assert ((low < 0.1) & (high > 0.1)).mean() == pytest.approx(0.95, abs=0.005)
