"""The comparisons of a study: each setting against its baseline, paired by seed, at the end and as a function of tokens seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mohd_train.study.runs import Study, StudyRun, differing
from mohd_train.study.statistics import Interval, bootstrap_documents, paired_t, paired_t_along
from mohd_train.sweep.file import Comparison, variant_name

WITHIN, MEASURED = "the last validation within training", "every validation sample (mohd eval --perplexity)"


@dataclass(frozen=True)
class Curve:
    """A mean over seeds with its band at each of P validations that all of them have; the bounds are NaN with one seed."""

    tokens: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A setting less its baseline in nats a token: above 0, the setting is worse.

    Attributes:
        seeds: finished pairs, over which ``at_end`` is.
        at_end: over seeds, on what ``source`` of the comparison names; None before a pair is finished.
        documents: the same difference over validation documents, the seeds' models fixed; None where it isn't measured.
        curve: of all pairs, finished or not.
        trend: change of the difference over the second half of the tokens, over seeds; above 0, it moves against the setting.
        paper: the paper's, ln of the ratio of its perplexities.
    """

    model: str
    setting: str
    label: str
    variant: str
    baseline: str
    seeds: tuple[int, ...]
    under_way: tuple[int, ...]
    at_end: Interval | None
    documents: Interval | None
    curve: Curve | None
    trend: Interval | None
    paper: float | None

    @property
    def latest(self) -> Interval | None:
        """``at_end``; before a pair is finished, the difference at the last tokens that all of them have reached."""
        if self.at_end is not None or self.curve is None:
            return self.at_end
        mean, low, high = (float(part[-1]) for part in (self.curve.mean, self.curve.low, self.curve.high))
        bounded = not math.isnan(low)
        return Interval(mean, low if bounded else None, high if bounded else None, len(self.under_way))

    @property
    def verdict(self) -> str:
        """Whether the paper's sign is confirmed by the interval over seeds: ``holds``, ``does not hold`` or ``can't be told``; ``so
        far`` while no pair is finished."""
        latest = self.latest
        if latest is None or not self.paper or (self.at_end is None and latest.low is None):
            return "–"
        if not latest.excludes_zero:
            found = "can't be told"
        else:
            found = "holds" if (latest.mean > 0) == (self.paper > 0) else "does not hold"
        return found if self.at_end is not None else f"{found} so far"

    @property
    def direction(self) -> str:
        """Whether the effect ``grows`` or ``fades`` over the second half, or that ``can't be told``; needs two seeds or more."""
        if self.trend is None or self.trend.low is None or self.at_end is None:
            return "–"
        if not self.trend.excludes_zero:
            return "can't be told"
        return "grows" if (self.trend.mean > 0) == (self.at_end.mean > 0) else "fades"


@dataclass(frozen=True)
class Compared:
    """One comparison, evaluated: its differences, or a grid of mean losses where it has no baseline."""

    title: str
    source: str
    differences: list[Difference]
    grid: dict[tuple[str, str, str], Interval]  # (model, setting, variant) -> loss at the end over seeds
    rows: list[str]
    variants: list[str]

    def best(self, model: str, setting: str) -> str | None:
        """The grid's variant of the lowest loss for a setting."""
        found = {v: self.grid[model, setting, v].mean for v in self.variants if (model, setting, v) in self.grid}
        return min(found, key=found.__getitem__) if found else None


def curve_of(runs: list[StudyRun]) -> Curve | None:
    """Validation loss over tokens: mean and band over the finished runs (over all while none is), at the tokens that they share."""
    runs = [run for run in runs if run.finished] or runs
    if not runs:
        return None
    tokens = _common(runs)
    return Curve(tokens, *paired_t_along(np.stack([_at(run, tokens) for run in runs]))) if len(tokens) else None


def compare(study: Study, comparison: Comparison) -> Compared:
    """Evaluates one comparison on the results so far. Runs that can't be paired are named in the study's notes and left out."""
    rows, variants = list(comparison.rows), list(comparison.variants)
    source = _source(study, comparison)
    if comparison.baseline is None:
        grid = {}
        for model in study.models:
            for setting in rows:
                for variant in variants:
                    runs = [run for run in study.of(model, variant_name(setting, variant)).values() if run.finished]
                    if runs:
                        grid[model, setting, variant] = paired_t(np.array([_end(run, source) for run in runs]))
        return Compared(comparison.title, source, [], grid, rows, variants)
    differences = [
        _difference(study, comparison, model, setting, variant, source)
        for model in study.models
        for variant in variants
        for setting in rows
    ]
    return Compared(comparison.title, source, differences, {}, rows, variants)


def _source(study: Study, comparison: Comparison) -> str:
    """One source for a whole comparison: measured if every finished run of it is, on the same data."""
    names = {
        variant_name(setting, variant)
        for variant in comparison.variants
        for setting in (*comparison.rows, *filter(None, [comparison.baseline]))
    }
    finished = [run for run in study.runs if run.finished and run.setting in names]
    settings = [run.measured.settings for run in finished if run.measured is not None]
    alike = len(settings) == len(finished) and all(one == settings[0] for one in settings)
    return MEASURED if finished and alike else WITHIN


def _end(run: StudyRun, source: str) -> float:
    if source == MEASURED:
        assert run.measured is not None
        return run.measured.loss
    return float(run.losses[-1])


def _common(runs: list[StudyRun]) -> NDArray[np.int64]:
    tokens = runs[0].tokens
    for run in runs[1:]:
        tokens = np.intersect1d(tokens, run.tokens)
    return tokens


def _at(run: StudyRun, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    places = {int(t): i for i, t in enumerate(run.tokens)}  # a repeated validation: the last
    return run.losses[[places[int(t)] for t in tokens]]


def _difference(
    study: Study, comparison: Comparison, model: str, setting: str, variant: str, source: str
) -> Difference:
    assert comparison.baseline is not None
    ours = study.of(model, variant_name(setting, variant))
    theirs = study.of(model, variant_name(comparison.baseline, variant))
    pairs = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        problems = differing([ours[seed], theirs[seed]])
        if problems:
            study.notes.append(f"{ours[seed].name} and {theirs[seed].name} can't be paired: {problems[0]}")
        else:
            pairs[seed] = (ours[seed], theirs[seed])
    finished = {seed: pair for seed, pair in pairs.items() if all(run.finished for run in pair)}
    curve, by_seed = _difference_curve(list(pairs.values()))
    label = next((run.label for run in study.runs if run.setting == variant_name(setting, variant)), setting)
    paper = comparison.rows[setting]
    return Difference(
        model=model,
        setting=setting,
        label=label,
        variant=variant,
        baseline=comparison.baseline,
        seeds=tuple(finished),
        under_way=tuple(pairs.keys() - finished.keys()),
        at_end=paired_t(np.array([_end(a, source) - _end(b, source) for a, b in finished.values()]))
        if finished
        else None,
        documents=_over_documents(list(finished.values())) if source == MEASURED else None,
        curve=curve,
        trend=_trend(curve, by_seed) if finished and len(finished) == len(pairs) else None,
        paper=math.log(paper / comparison.paper) if paper and comparison.paper else None,
    )


def _difference_curve(pairs: list[tuple[StudyRun, StudyRun]]) -> tuple[Curve | None, NDArray[np.float64]]:
    """The curve over the tokens that every run has, and the differences of each pair on it [S, P]."""
    nothing = np.zeros((0, 0))
    if not pairs:
        return None, nothing
    tokens = _common([run for pair in pairs for run in pair])
    if not len(tokens):
        return None, nothing
    by_seed = np.stack([_at(a, tokens) - _at(b, tokens) for a, b in pairs])
    return Curve(tokens, *paired_t_along(by_seed)), by_seed


def _trend(curve: Curve | None, by_seed: NDArray[np.float64]) -> Interval | None:
    if curve is None or len(curve.tokens) < 2:
        return None
    half = int(np.abs(curve.tokens - curve.tokens[-1] / 2).argmin())
    return paired_t(by_seed[:, -1] - by_seed[:, half]) if half < len(curve.tokens) - 1 else None


def _over_documents(pairs: list[tuple[StudyRun, StudyRun]]) -> Interval | None:
    """Over documents, of the difference averaged over seeds."""
    difference, first = [], None
    for a, b in pairs:
        one, other = a.measured and a.measured.documents, b.measured and b.measured.documents
        if not one or not other:
            return None
        first = first or one
        if not all(
            np.array_equal(x.tokens, first.tokens) and np.array_equal(x.domain, first.domain) for x in (one, other)
        ):
            return None  # measured on other samples
        difference.append(one.nll - other.nll)
    if first is None:
        return None
    kept = first.tokens > 0
    _, domain = np.unique(first.domain, return_inverse=True)
    return bootstrap_documents(np.mean(difference, axis=0)[kept], first.tokens[kept], domain[kept])
