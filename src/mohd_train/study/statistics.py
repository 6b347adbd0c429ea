"""Paired differences with 95% intervals: over seeds (Student's t), and over validation documents (bootstrap)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
DRAWS = 4000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` and its interval; without bounds where one observation can't give any."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the mean can be told."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_t(differences: Floats, level: float = LEVEL) -> Interval:
    """Mean of paired differences [S] with Student's interval: ``mean ± t_{S-1} * s / sqrt(S)``, s with S - 1 in the denominator."""
    mean, low, high = paired_t_along(np.asarray(differences, np.float64)[:, None], level)
    bounded = len(differences) > 1
    return Interval(
        float(mean[0]), float(low[0]) if bounded else None, float(high[0]) if bounded else None, len(differences)
    )


def paired_t_along(differences: Floats, level: float = LEVEL) -> tuple[Floats, Floats, Floats]:
    """:func:`paired_t` at each point of curves [S, P]: mean [P], low [P], high [P]; the bounds are NaN with one seed."""
    seeds = len(differences)
    mean = differences.mean(axis=0)
    if seeds < 2:
        return mean, np.full_like(mean, math.nan), np.full_like(mean, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, seeds - 1)) * differences.std(axis=0, ddof=1) / math.sqrt(seeds)
    return mean, mean - half, mean + half


def bootstrap_documents(
    difference: Floats,
    tokens: Floats,
    domain: NDArray[np.int64],
    *,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Difference of mean loss a token, with the percentile interval over documents drawn with replacement within each domain.

    Documents, not tokens or samples, are what is drawn: the losses within one are not independent.

    Args:
        difference: [D] of each document: its summed loss under one model less that under the other, nats.
        tokens: [D] its predicted tokens.
        domain: [D] its domain; each keeps its number of documents, since the mix is fixed by design.
    """
    generator = np.random.default_rng(seed)
    sums, totals = np.zeros(draws), np.zeros(draws)
    for index in np.unique(domain):
        mine = domain == index
        count = int(mine.sum())
        weights = generator.multinomial(count, np.full(count, 1 / count), size=draws)  # [draws, documents]
        sums += weights @ difference[mine]
        totals += weights @ tokens[mine]
    low, high = np.quantile(sums / totals, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.sum() / tokens.sum()), float(low), float(high), len(difference))
