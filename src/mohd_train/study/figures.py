"""Figures of a study: learning curves, differences as a function of tokens seen, and differences at the end, with their bands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from mohd_train.analysis.plotting import PAPER, finish, panels, save, style
from mohd_train.study.compare import Compared, Curve, Difference, compare, curve_of
from mohd_train.study.runs import Study
from mohd_train.sweep.file import Comparison, variant_name


def draw_study(study: Study, output: Path) -> list[Path]:
    """Three figures for each comparison that has a baseline and runs. Returns the files, PDF and PNG."""
    paths: list[Path] = []
    for number, comparison in enumerate(study.comparisons, start=1):
        found = compare(study, comparison)
        for model in study.models:
            for variant in comparison.variants:
                some = [one for one in found.differences if (one.model, one.variant) == (model, variant)]
                some = [one for one in some if one.curve is not None]
                if some:
                    stem = "_".join(filter(None, [f"{study.name}_{number:02d}", model, variant]))
                    paths += _draw(study, comparison, found, some, output, stem)
    return paths


def _draw(
    study: Study, comparison: Comparison, found: Compared, some: list[Difference], output: Path, stem: str
) -> list[Path]:
    model, variant = some[0].model, some[0].variant
    where = f"{comparison.title}{f' ({variant})' if variant else ''}"
    figure, (left, right) = panels(2, width=6.0, height=4.4)
    names = [comparison.baseline or "", *(one.setting for one in some)]
    shown = []
    for i, name in enumerate(names):
        curve = curve_of(list(study.of(model, variant_name(name, variant)).values()))
        if curve is not None:
            _band(left, curve, i, name)
            shown.append(curve)
    for i, one in enumerate(some, start=1):
        assert one.curve is not None
        seeds = len(one.seeds) + len(one.under_way)
        _band(right, one.curve, i, f"{one.setting} ({seeds} seed{'s' * (seeds != 1)})")
    right.axhline(0, color="#000000", linewidth=0.8)
    finish(left, where, "tokens (millions)", "validation loss (nats a token)")
    finish(right, f"Difference to {comparison.baseline}, paired by seed", "tokens (millions)", "nats a token")
    left.set_ylim(_without_the_start(shown))
    right.set_ylim(_without_the_start([one.curve for one in some if one.curve is not None], 0.0))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=7)
    return save(figure, output, f"{stem}_curves") + _draw_end(where, comparison, some, output, f"{stem}_end")


def _band(axis: Axes, curve: Curve, number: int, label: str) -> None:
    look = style(number)
    millions = curve.tokens / 1e6
    axis.plot(millions, curve.mean, label=label, **look)
    if np.isfinite(curve.low).all():
        axis.fill_between(millions, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)


def _without_the_start(curves: list[Curve], *values: float) -> tuple[float, float]:
    """Limits of the y axis by the last three quarters and ``values``: the first steps are large and say little."""
    seen = list(values)
    for curve in curves:
        late = curve.tokens >= curve.tokens[-1] / 4
        seen += [
            *curve.mean[late],
            *curve.low[late & np.isfinite(curve.low)],
            *curve.high[late & np.isfinite(curve.high)],
        ]
    margin = 0.08 * (max(seen) - min(seen) or 0.1)
    return min(seen) - margin, max(seen) + margin


def _draw_end(where: str, comparison: Comparison, some: list[Difference], output: Path, name: str) -> list[Path]:
    ended = [one for one in some if one.at_end is not None]
    if not ended:
        return []
    figure, (axis,) = panels(1, width=6.0, height=1.2 + 0.35 * len(ended))
    for place, one in enumerate(reversed(ended)):
        assert one.at_end is not None
        for interval, offset, look in ((one.at_end, 0.0, style(1)), (one.documents, -0.25, style(2))):
            if interval is None:
                continue
            bars = None
            if interval.low is not None and interval.high is not None:
                bars = [[interval.mean - interval.low], [interval.high - interval.mean]]
            label = {0.0: "over seeds", -0.25: "over documents"}[offset] if place == 0 else None
            axis.errorbar(
                [interval.mean], [place + offset], xerr=bars, capsize=2, label=label, **{**look, "linestyle": "none"}
            )
        if one.paper is not None:
            axis.plot([one.paper], [place], label="paper" if place == 0 else None, **PAPER)
    axis.axvline(0, color="#000000", linewidth=0.8)
    axis.set_ylim(-0.6, len(ended) - 0.4)
    axis.set_yticks(range(len(ended)), [f"{one.setting} ({len(one.seeds)})" for one in reversed(ended)], fontsize=8)
    finish(axis, where, f"nats a token more than {comparison.baseline}, 95% intervals", "")
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        axis.legend(handles, labels, frameon=False, fontsize=7)
    return save(figure, output, name)
